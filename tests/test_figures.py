"""The figures of a decision, held against what was done to the network."""

import math

import pytest
import torch
from helpers import always, lively_policy, loss_at, network, train

from rlsched import ScheduledOptimizer, attach, controller
from rlsched.domain import Domain
from rlsched.figures import FIGURES, figure_table
from rlsched.signals import OBSERVATION_NAMES, SLOW

STEPS, DECISIONS = 21, [1, 6, 11, 16]
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def told(model, make=torch.optim.SGD, given=SGD, steps=STEPS, **options):
    """The optimizer, and the list that gets (step, figures) of its decisions."""
    options = {"total_steps": STEPS, "decisions": 5, "policy": lively_policy(), **options}
    optimizer, heard = ScheduledOptimizer(make(model.parameters(), **given), **options), []
    optimizer.controller.log.listeners.append(lambda step, figures: heard.append((step, figures)))
    return optimizer, heard


def geometric_mean(values):
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))


def norm_of(tensors):
    """Of all of them together."""
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in tensors))


def test_figures_are_what_was_done_to_the_network():
    """A chart that shows something else than its name says misleads whoever trusts it."""
    model = network()
    optimizer, heard = told(model, policy=always(clip=-1.0, lr=0.3, momentum=0.2, weight_decay=-0.5), max_grad_norm=0.3)
    done = []  # of each step
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step(loss=loss)
        group = optimizer.param_groups[0]
        norm, after = norm_of(grads), norm_of(p.grad for p in model.parameters())
        update = norm_of(p - q for p, q in zip(model.parameters(), before, strict=True)) / norm_of(before)
        done.append((loss.item(), norm, after, update, group["lr"], group["momentum"], group["weight_decay"]))
    assert [step for step, _ in heard] == DECISIONS
    clipped, expected = 0, None
    for (step, figures), begin in zip(heard, [0, *DECISIONS], strict=False):
        losses, norms, afters, updates, *_ = zip(*done[begin:step], strict=True)
        lr, momentum, weight_decay = done[step][4:]
        share = [after < 0.9999 * norm for norm, after in zip(norms, afters, strict=True)]
        log_loss = math.log(geometric_mean(losses))
        expected = log_loss if expected is None else expected + SLOW * (log_loss - expected)
        base_lr = 0.1 * (1 - step / STEPS)
        wanted = {
            "rlsched/loss": geometric_mean(losses),
            "rlsched/loss_trend": log_loss - expected,
            "rlsched_gradients/norm": geometric_mean(norms),
            "rlsched_gradients/norm_clipped": geometric_mean(afters),
            "rlsched_gradients/clipped": sum(share) / len(share),
            "rlsched/update_ratio": geometric_mean(updates),
            "rlsched/lr": lr,
            "rlsched/momentum": momentum,
            "rlsched/weight_decay": weight_decay,
            "rlsched/lr_base_schedule": base_lr,
            "rlsched/lr_log10_factor": math.log10(lr / (1 - momentum) * (1 - 0.9) / base_lr),
        }
        assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        after, norm = done[step][2], done[step][1]
        assert after == pytest.approx(min(norm, figures["rlsched_gradients/clip_threshold"]), rel=1e-5)
        clipped += sum(share)
    assert clipped, "nothing is tested of clipping"


def test_what_is_held_back_is_seen():
    """What the policy wanted would look like what it got, and a bound that holds it would go unnoticed."""
    optimizer, heard = told(network(), policy=always(lr=1.0), lr_bounds=(0.0, 0.11))
    train(model_of(optimizer), optimizer, range(STEPS))
    assert all(figures["rlsched/lr"] <= 0.11 for _, figures in heard)
    assert any(figures["rlsched_policy/proposed_lr"] > 0.11 == figures["rlsched/lr"] for _, figures in heard)
    assert all(figures["rlsched_policy/action_lr"] == 1 for _, figures in heard)
    free, heard = told(network(), policy=always(lr=0.2))
    train(model_of(free), free, range(STEPS))
    for _, figures in heard:
        assert figures["rlsched/lr"] == pytest.approx(figures["rlsched_policy/proposed_lr"])


def model_of(optimizer):
    """What `loss_at` needs of a network: a call that goes through its parameters."""
    one, two, three, four = optimizer.param_groups[0]["params"]
    return lambda x: torch.tanh(x @ one.T + two) @ three.T + four


def test_interventions_are_counted():
    """That a run was rescued, and how often, would have to be read in the messages."""
    model = network()
    optimizer, heard = told(model)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    model[0].weight.grad = torch.full_like(model[0].weight, math.nan)
    optimizer.step(loss=math.nan)
    train(model, optimizer, range(4, STEPS))
    counts = [figures["rlsched/safety_interventions"] for _, figures in heard]
    assert counts[1] == counts[0] + 1
    assert counts[-1] == len(optimizer.controller.interventions)


def test_distance_is_that_of_the_policys_domain():
    """A policy that has lost its influence, far from what it knows, would look like one that wants nothing."""
    observations = torch.randn(400, len(OBSERVATION_NAMES), generator=torch.Generator().manual_seed(0)) / 100
    domain = Domain.of(observations)
    model = network()
    optimizer, heard = told(model, policy=lively_policy(domain=domain))
    train(model, optimizer, range(STEPS))
    for _, figures in heard:
        distance, influence = figures["rlsched_policy/distance"], figures["rlsched_policy/influence"]
        assert distance > 1 and influence == pytest.approx(distance**-2)
        seen = torch.tensor([figures[f"rlsched_seen/{name}"] for name in OBSERVATION_NAMES])
        assert distance == pytest.approx(float(domain.distance(seen) / domain.limit), rel=1e-5)


def test_shadow_shows_what_is_in_use_beside_what_is_proposed():
    """The trial of a policy would show its proposals as if they were followed."""
    model = network()
    optimizer, heard = told(model, policy=always(lr=1.0, clip=-1.0), shadow=True)
    train(model, optimizer, range(STEPS))
    for _, figures in heard:
        assert (figures["rlsched/lr"], figures["rlsched/momentum"]) == (0.1, 0.9)
        assert figures["rlsched_policy/proposed_lr"] > 0.1
        assert figures["rlsched_gradients/norm_clipped"] == figures["rlsched_gradients/norm"]
        assert not {"rlsched_gradients/clip_multiple", "rlsched_gradients/clip_threshold"} & figures.keys(), (
            "nobody clips"
        )


def test_controls_that_are_left_alone_are_shown_as_they_are():
    """A momentum that a scheduler of the user's own moves would be shown as it was at the start."""
    model = network()
    optimizer, heard = told(model, controls=("lr",))
    train(model, optimizer, range(10))
    optimizer.param_groups[0]["momentum"] = 0.5
    train(model, optimizer, range(10, 12))
    assert [figures["rlsched/momentum"] for _, figures in heard] == [0.9, 0.9, 0.5]


def test_unknown_is_left_out():
    """A NaN breaks charts, and files of JSON."""
    model = network()
    optimizer, heard = told(model, torch.optim.SGD, {"lr": 0.1})
    for step in range(8):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        with pytest.warns(UserWarning, match="no loss was reported") if step == 1 else torch.no_grad():
            optimizer.step()
    for _, figures in heard:
        assert all(type(value) is float and math.isfinite(value) for value in figures.values())
        assert not {"rlsched/loss", "rlsched/loss_trend"} & figures.keys()
        assert "rlsched_gradients/norm" in figures


def test_nobody_pays_for_figures_that_nobody_hears(monkeypatch):
    """Decisions of small networks would take longer for nothing."""
    monkeypatch.setattr(controller, "figures_of", lambda *_: 1 / 0)
    model = network()
    it = attach(torch.optim.SGD(model.parameters(), 0.1), total_steps=STEPS, decisions=5, policy=lively_policy())
    train(model, it.optimizer, range(STEPS))
    assert it.step_count == STEPS


def test_table_has_every_figure():
    """A reader of a chart has to find what it shows."""
    rows = figure_table(FIGURES.values()).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == sorted(FIGURES)
