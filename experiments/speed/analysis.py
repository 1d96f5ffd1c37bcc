"""Tables, verdicts and plot of the measurements, from their `results.jsonl` and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from rlsched.experiments.journal import read
from rlsched.experiments.speed.plan import INTERVAL, Measurement, Perceptron, Plan
from rlsched.experiments.speed.run import RESULTS, key
from rlsched.experiments.table import markdown, publish

MODES = {False: "eager", True: "compiled"}
COLORS = {False: "tab:blue", True: "tab:red"}
MB = 1e6


class Verdict(NamedTuple):
    """A target and what was measured, which is NaN if it was left out."""

    target: str
    measured: float
    bound: float
    at_most: bool = False

    @property
    def outcome(self) -> str:
        if np.isnan(self.measured):
            return "not measured"
        met = self.measured <= self.bound if self.at_most else self.measured >= self.bound
        return "met" if met else "**missed**"


class Results:
    """The measurements of a plan. All seconds are those of the core; medians over the rounds."""

    def __init__(self, out: Path, plan: Plan) -> None:
        measured = read(out / RESULTS, key)
        self.plan = plan
        self.rows = {m: measured[m] for group in plan.groups() for m in group}

    def rates(self, m: Measurement) -> np.ndarray:
        """Inner steps per second in each round; NaN if the plan leaves them out."""
        if m not in self.rows:
            return np.array([np.nan])
        row = self.rows[m]
        return np.array([r["calls"] * row["facts"]["inner_steps"] / r["cpu"] for r in row["rounds"]])

    def rate(self, m: Measurement) -> float:
        return float(np.median(self.rates(m)))

    def stacks(self, network: Perceptron, compile: bool) -> list[Measurement]:
        """The environments of this network, by size."""
        return [self.plan.one("environments", network, size, compile=compile) for size in self.plan.sizes]

    def over_eight(self, m: Measurement) -> float:
        """Rate over that of eight single environments."""
        return self.rate(m) / self.rate(self.plan.one("eight", m.task, 8))

    def over_loop(self, m: Measurement) -> float:
        """Rate over that of a plain loop over one network."""
        return self.rate(m) / self.rate(self.plan.one("loop", m.task))

    def over_ceiling(self, m: Measurement) -> float:
        """Rate over that of the matrix products alone."""
        return self.rate(m) / self.rate(self.plan.one("matmul", m.task, m.size))

    def update(self, compile: bool) -> dict[str, float]:
        """Seconds of an update of PPO by part."""
        rounds = self.rows[self.plan.one("training", *self.plan.training, compile=compile)]["rounds"]
        return {part: float(np.median([r[part] for r in rounds])) for part in ("environment", "rollout", "update")}

    def share_of_ppo(self, compile: bool) -> float:
        """The part of an update that is not the environment's; NaN if the plan leaves it out."""
        if compile not in self.plan.modes:
            return np.nan
        seconds = self.update(compile)
        return 1 - seconds["environment"] / sum(seconds.values())


def verdicts(results: Results) -> list[Verdict]:
    """The targets, each at the number of networks that is fastest."""
    small, large = results.plan.networks
    best = {(p, c): max(results.stacks(p, c), key=results.rate) for p in (small, large) for c in MODES}
    return [
        Verdict(f"{small}: × eight environments, eager", results.over_eight(best[small, False]), 20),
        Verdict(f"{small}: × eight environments, compiled", results.over_eight(best[small, True]), 50),
        Verdict(f"{large}: × eight environments, compiled", results.over_eight(best[large, True]), 4),
        Verdict(f"{large}: share of the ceiling, compiled", results.over_ceiling(best[large, True]), 0.5),
        *(
            Verdict(f"PPO's own share of training, {name}", results.share_of_ppo(compile), 0.25, at_most=True)
            for compile, name in MODES.items()
        ),
    ]


def tables(results: Results) -> str:
    """Every table, as Markdown."""
    plan = results.plan
    names = [MODES[compile] for compile in plan.modes]
    sections = {
        "Targets": markdown(
            ["", "target", "measured", ""],
            [
                [v.target, f"{'at most' if v.at_most else 'at least'} {v.bound:g}", _number(v.measured), v.outcome]
                for v in verdicts(results)
            ],
        )
    }
    for network in plan.networks:
        sections[f"{network} ({network.parameters:,} parameters)"] = _speeds(results, network)
    sections["Matrix products alone"] = _ceiling(results)
    sections[f"Growth, {plan.grown_size} networks at once"] = markdown(
        ["network", "parameters", "MFLOP of an inner step", *(f"µs, {name}" for name in names)],
        [
            [str(p), _number(p.parameters), _number(p.flops / 1e6), *map(_number, _microseconds(results, p))]
            for network in plan.networks
            for p in sorted({network, *plan.grown(network)}, key=lambda p: (p.batch_size, p.hidden))
        ],
    )
    sections["An update of PPO, mixture {}, {} inner runs".format(*plan.training)] = markdown(
        ["", "environment, s", "rest of the rollouts, s", "training, s", "share of PPO"],
        [
            [MODES[compile], *map(_number, results.update(compile).values()), f"{results.share_of_ppo(compile):.0%}"]
            for compile in plan.modes
        ],
    )
    sections[f"Families, {plan.grown_size} networks at once"] = markdown(
        [
            *("family", "parameters", *(f"inner steps/s, {name}" for name in names)),
            *(f"environment steps/s, {name}" for name in names),
        ],
        [_family(results, family) for family in plan.families],
    )
    sections[f"Memory of {plan.memory_size} environments"] = _memory(results)
    return "\n\n".join([_origin(results), *(f"## {title}\n\n{text}" for title, text in sections.items())])


def plot(results: Results) -> Figure:
    """Speed by number of networks, and how the time of an inner step grows."""
    plan = results.plan
    figure = Figure(figsize=(12, 9), layout="constrained")
    (*speed_axes,), (width_axis, batch_axis) = figure.subplots(2, 2)
    for axis, network in zip(speed_axes, plan.networks, strict=True):
        for compile in plan.modes:
            rates = [results.rate(m) for m in results.stacks(network, compile)]
            axis.plot(plan.sizes, rates, "o-", color=COLORS[compile], label=f"stack, {MODES[compile]}")
        ceiling = [results.rate(plan.one("matmul", network, size)) for size in plan.sizes]
        axis.plot(plan.sizes, ceiling, "--", color="tab:green", label="matrix products alone")
        axis.axhline(results.rate(plan.one("loop", network)), color="black", ls=":", label="plain loop, one network")
        axis.axhline(results.rate(plan.one("eight", network, 8)), color="tab:gray", ls=":", label="eight environments")
        axis.set(title=str(network), xscale="log", yscale="log", xlabel="networks at once", ylabel="inner steps / s")
        axis.set_xticks(plan.sizes, list(map(str, plan.sizes)))
        axis.minorticks_off()
        axis.legend(fontsize="small")
    for axis, grown, fixed in ((width_axis, "parameters", "batch_size"), (batch_axis, "batch_size", "hidden")):
        for network, marker in zip(plan.networks, "os", strict=True):
            line = [p for p in {network, *plan.grown(network)} if getattr(p, fixed) == getattr(network, fixed)]
            line.sort(key=lambda p: getattr(p, grown))
            costs = np.array([_microseconds(results, p) for p in line])
            for compile, cost in zip(plan.modes, costs.T, strict=True):
                style = {"color": COLORS[compile], "marker": marker, "label": f"{network}, {MODES[compile]}"}
                axis.plot([getattr(p, grown) for p in line], cost, **style)
        axis.set(xscale="log", yscale="log", xlabel=grown.replace("_", " "))
        axis.set(ylabel=f"µs per inner step, {plan.grown_size} networks at once")
        axis.legend(fontsize="small")
    return figure


def report(out: Path, plan: Plan) -> str:
    """Write `table.md` and `plot.png` beside the `results.jsonl` in `out`, and return the tables."""
    results = Results(out, plan)
    return publish(out, tables(results), plot(results))


def _origin(results: Results) -> str:
    rows = results.rows.values()
    origins = [row["provenance"] for row in rows]
    what = {key: ", ".join(sorted({o[key] for o in origins})) for key in origins[0]}
    delays = [r["wall"] / r["cpu"] for row in rows for r in row["rounds"] if "wall" in r]
    return (
        f"Medians of {results.plan.rounds} rounds, per second of one core; ± is half the range of the rounds. "
        f"{what['processor']} ({what['machine']}), torch {what['torch']}, commit {what['commit']}. On the clock, "
        f"rounds took {np.median(delays) - 1:.0%} longer in the median, and {max(delays) - 1:.0%} at most."
    )


def _speeds(results: Results, network: Perceptron) -> str:
    one = results.plan.one
    measured = [("plain loop, one network", one("loop", network)), ("eight environments", one("eight", network, 8))]
    measured += [
        (f"{m.size}, {MODES[compile]}", m) for compile in results.plan.modes for m in results.stacks(network, compile)
    ]
    rows = []
    for name, m in measured:
        rates, facts = results.rates(m), results.rows[m]["facts"]
        row = [name, _number(results.rate(m) / INTERVAL), _number(results.rate(m))]
        row += [f"{np.ptp(rates) / 2 / np.median(rates):.0%}"]
        row += [_number(results.over_eight(m)), _number(results.over_loop(m))]
        if m.kind == "environments":
            row += [f"{results.over_ceiling(m):.0%}", _number(facts["reset"]["cpu"] / m.size * 1000)]
            row += [_number(facts["first_step"]["wall"])]
        rows.append(row)
    return markdown(
        [
            *("networks at once", "environment steps/s", "inner steps/s", "±", "× eight environments", "× plain loop"),
            *("share of the ceiling", "reset of one, ms", "first step (wall), s"),
        ],
        rows,
    )


def _ceiling(results: Results) -> str:
    plan = results.plan
    square = plan.one("square", "", plan.square)
    row = results.rows[square]
    peak = float(np.median([r["calls"] * row["facts"]["flops"] / r["cpu"] for r in row["rounds"]]))
    rows = []
    for network in plan.networks:
        rates = [results.rate(plan.one("matmul", network, size)) for size in plan.sizes]
        rows.append([str(network), *(f"{_number(r)} ({_number(r * network.flops / 1e9)})" for r in rates)])
    table = markdown(["inner steps/s (GFLOP/s)", *(f"stack of {size}" for size in plan.sizes)], rows)
    return f"{table}\n\nOne product of matrices {plan.square} × {plan.square}: {_number(peak / 1e9)} GFLOP/s."


def _microseconds(results: Results, task: Perceptron) -> list[float]:
    """Time of an inner step of one network, eager and compiled."""
    plan = results.plan
    return [1e6 / results.rate(m) for m in plan.environments(task, plan.grown_size)]


def _family(results: Results, family: str) -> list[str]:
    environments = results.plan.environments(family, results.plan.grown_size)
    facts = results.rows[environments[0]]["facts"]
    rates = np.array([results.rate(m) for m in environments])
    return [family, *map(_number, [facts["parameters"], *rates, *(rates / facts["interval"])])]


def _memory(results: Results) -> str:
    plan = results.plan
    facts = {f: results.rows[plan.one("memory", f, plan.memory_size)]["facts"] for f in plan.families}
    rows = [[f, *(_number(facts[f][what] / MB) for what in ("tensors", "resident", "peak"))] for f in plan.families]
    table = markdown(["family", "tensors, MB", "growth of the process, MB", "at its peak, MB"], rows)
    most = max(f["process"] for f in facts.values())
    return f"{table}\n\nA process that has trained one network occupies up to {_number(most / MB)} MB to begin with."


def _number(value: float) -> str:
    """Three digits, or all of those before the point."""
    if np.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
