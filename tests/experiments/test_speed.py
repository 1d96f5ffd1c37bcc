"""The benchmark of inner training."""

import json
import math
from dataclasses import asdict, replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from rlsched.envs import SchedulingVectorEnv
from rlsched.experiments.speed import measure, scale
from rlsched.experiments.speed.__main__ import main
from rlsched.experiments.speed.analysis import Results, Verdict, report, verdicts
from rlsched.experiments.speed.measure import KINDS, WARM_UP
from rlsched.experiments.speed.plan import LARGE, QUICK, SMALL, Measurement, Perceptron, Plan
from rlsched.experiments.speed.run import RESULTS
from rlsched.experiments.table import PLOT, TABLE

PLAN = replace(QUICK, compile=False)


def command(out):
    """Run the command."""
    assert main(["--quick", "--no-compile", "--out", str(out)]) == 0


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder that the command leaves."""
    out = tmp_path_factory.mktemp("speed")
    command(out)
    return out


def rows(out):
    """The lines of the results."""
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def test_every_measurement_is_there_once_with_its_rounds(quick):
    """A table from half of the measurements, or from one round, would pass for the whole."""
    planned = [json.loads(json.dumps(asdict(m))) for group in PLAN.groups() for m in group]
    assert [row["measurement"] for row in rows(quick)] == planned
    for row in rows(quick):
        assert len(row["rounds"]) == (0 if row["measurement"]["kind"] == "memory" else PLAN.rounds)
        assert {"commit", "torch", "machine", "processor"} <= row["provenance"].keys()
    assert (quick / PLOT).stat().st_size > 10_000


def test_measured_networks_are_those_that_are_meant(quick):
    """A wrong layer would be a benchmark of another network."""
    assert (SMALL.parameters, LARGE.parameters) == (676, 25_450)
    for row in rows(quick):
        task = row["measurement"]["task"]
        if row["measurement"]["kind"] == "environments" and isinstance(task, dict):
            assert row["facts"]["parameters"] == Perceptron(**task).parameters


def test_ratios_are_quotients_of_the_recorded_times(quick):
    """A ratio of numbers that were never measured side by side proves nothing."""
    rates = {}
    for row in rows(quick):
        m = row["measurement"]
        if m["kind"] in ("environments", "eight", "matmul", "loop"):
            first, second = (r["calls"] * row["facts"]["inner_steps"] / r["cpu"] for r in row["rounds"])
            rates[m["kind"], str(m["task"]), m["size"]] = (first + second) / 2
    results = Results(quick, PLAN)
    task, size = str(asdict(LARGE)), PLAN.sizes[0]
    (m,) = PLAN.environments(LARGE, size)
    own = rates["environments", task, size]
    assert results.over_eight(m) == pytest.approx(own / rates["eight", task, 8])
    assert results.over_loop(m) == pytest.approx(own / rates["loop", task, 1])
    assert results.over_ceiling(m) == pytest.approx(own / rates["matmul", task, size])
    assert f"| {size}, eager |" in (quick / TABLE).read_text()


def test_share_of_ppo_leaves_the_first_update_out(quick):
    """The evaluation before the first update would count as the environment's, or as PPO's."""
    (row,) = (row for row in rows(quick) if row["measurement"]["kind"] == "training")
    assert len(row["rounds"]) == PLAN.rounds
    for part in row["rounds"]:
        assert part.keys() == {"environment", "rollout", "update"}
        assert min(part.values()) > 0
    assert 0 < Results(quick, PLAN).share_of_ppo(False) < 1


def test_interrupted_benchmark_goes_on(quick, tmp_path, capsys):
    """Half an hour of measurements must survive Ctrl-C, and none may be repeated or lost."""
    lines = (quick / RESULTS).read_text().splitlines(keepends=True)
    missing = lines.pop(1)
    (tmp_path / RESULTS).write_text("".join(lines))
    command(tmp_path)
    *kept, new = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    assert kept == lines
    assert json.loads(new)["measurement"] == json.loads(missing)["measurement"]
    assert capsys.readouterr().out.startswith((tmp_path / TABLE).read_text())


def test_what_was_left_out_is_not_judged(quick):
    """A target that nobody measured must not pass for met."""
    outcomes = {v.target: v.outcome for v in verdicts(Results(quick, PLAN))}
    assert all((outcome == "not measured") == ("compiled" in target) for target, outcome in outcomes.items())
    assert [Verdict("", x, 4).outcome for x in (3.9, 4, math.nan)] == ["**missed**", "met", "not measured"]
    assert [Verdict("", x, 4, at_most=True).outcome for x in (4, 4.1)] == ["met", "**missed**"]


def test_results_of_another_plan_are_not_mistaken_for_this_one(quick):
    """Figures of a quick trial in the same folder would end up in the full table."""
    with pytest.raises(KeyError):
        report(quick, Plan())


@pytest.mark.parametrize("kind", ["loop", "matmul"])
@pytest.mark.parametrize("network", [SMALL, LARGE], ids=str)
def test_floating_point_operations_are_those_of_an_inner_step(kind, network):
    """A ceiling with one matrix product too many, or too few, would be out of reach, or no ceiling."""
    size = 1 if kind == "loop" else 3
    rounds = KINDS[kind](Measurement(kind, network, size, seconds=0.0))
    facts = next(rounds)
    with FlopCounterMode(display=False) as counter:
        row = next(rounds)
    assert counter.get_total_flops() == (WARM_UP + row["calls"]) * facts["inner_steps"] * network.flops


def test_episodes_do_not_end_together():
    """If all runs began at once, a round would have either no resets in it or all of them."""
    env = SchedulingVectorEnv(64, [SMALL.task()])
    env.reset(seed=0)
    measure._spread_ends(env)
    (group,) = env._groups
    left = (group.run.total_steps - group.state.step) / group.training.task.interval
    assert (left == left.round()).all()
    assert (left >= 1).all()
    assert len(left.unique()) > 20


def test_unknown_option_is_refused(tmp_path, capsys):
    """A misspelt option that is ignored costs twenty minutes."""
    with pytest.raises(SystemExit, match="2"):
        main(["--quik", "--out", str(tmp_path)])
    assert "--quik" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("networks", (SMALL,)), ("families", ("vgg",)), ("sizes", (0,)), ("rounds", 0), ("seconds", -1.0)],
)
def test_plan_names_the_wrong_field(field, value):
    """A wrong value would end the benchmark in a process of its own, after minutes, with its traceback."""
    with pytest.raises(ValueError, match=field):
        Plan(**{field: value})


def test_cores_that_one_learner_feeds_follow_from_three_costs():
    """Whoever rents cores by this table would pay for those that wait."""
    engines = [{"engine": "ray", "workers": 1, "step": 1.0, "travel": 9.0, "packing": 0.01}]
    found = {"num_envs": 100, "core": 0.4, "learner": 0.01 * scale.STEPS, "engines": engines}
    said = scale.paper(found)  # a decision: 4 ms of the environment, 0.1 ms on the way, 0.1 ms of the learner
    assert "| 1 | 238 | 95% |" in said and "| 16 | 2,222 | 56% |" in said
    assert said.endswith("Half of the time at 20 cores; never more than 5,000 decisions/s.")
