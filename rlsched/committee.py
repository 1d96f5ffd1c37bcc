"""Several policies as one, a committee, which does what its members would on average; and corrections of a policy.

Policies of one kind that were trained apart err apart, and their mean errs less (Breiman 1996, "Bagging Predictors").

What they learn is too careful on other tasks than those that they were trained on, which `bolder` makes up for; too
bold where a network learns its data by heart and no validation loss tells it, of which `calmer` takes back; under SGD
without momentum, too ready to yield to gradients that oppose each other, against which `steadier` holds; and, under
SGD with it, too impatient of a loss that does not fall yet, which `warier` does not let them force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import torch

from rlsched.actors import Actor, Perceptron
from rlsched.control import LR
from rlsched.policy import SchedulePolicy


def committee_of(policies: Sequence[SchedulePolicy]) -> SchedulePolicy:
    """The committee of some policies: an actor as wide as theirs together, whose actions are the mean of theirs.

    The mean is taken of what the actors say, before it is bounded. Each of them sees what it saw, and one that does not
    move a control votes for standing still. The committee starts runs as the most careful member does, and is trusted
    where the first member is that sees all that the committee sees.

    Args:
        policies: perceptrons of as many layers, with one activation, that modulate one base schedule; one of them sees
            what the others see.

    Raises:
        ValueError: they are none of this; there are fewer than two, or one is there twice.
    """
    members = list(policies)
    if len({member.digest for member in members}) < max(2, len(members)):
        raise ValueError(f"policies must be at least two, each of them another, got {members}")
    actors = [member.actor for member in members]
    for what, found in (
        ("kind of actor", [actor.name for actor in actors]),
        ("number of layers", [len(actor.hidden) for actor in actors]),
        ("activation", [actor.activation for actor in actors]),
        ("base schedule", [member.base_schedule.name for member in members]),
    ):
        if len(set(found)) > 1:
            raise ValueError(f"policies must have one {what}, they have {found}")
    if actors[0].name != Perceptron.name:
        raise ValueError(f"policies must be perceptrons, got {actors[0].name!r}")
    observations, controls = _all(m.observations for m in members), _all(m.controls for m in members)
    seeing = [member for member in members if set(member.observations) == set(observations)]
    if not seeing:
        raise ValueError(f"policies must have one among them that sees what the others see, {list(observations)}")
    domain = seeing[0].domain
    if domain is not None:
        order = [seeing[0].observations.index(name) for name in observations]
        domain = domain._replace(mean=domain.mean[order], whitening=domain.whitening[:, order])
    return SchedulePolicy(
        _side_by_side(members, observations, controls, share=1 / len(members)),
        observations,
        controls,
        safe_start=min(member.safe_start for member in members),
        domain=domain,
        base_schedule=members[0].base_schedule,
        info={"committee": [{"digest": member.digest, **member.info} for member in members]},
    )


def bolder(policy: SchedulePolicy, by: float) -> SchedulePolicy:
    """A policy with so much more on each of its actions on the learning rate, before they are bounded.

    Args:
        policy: a perceptron that moves the learning rate.
        by: how much, in [-1, 1]: an action of 1 raises the learning rate by a factor of 2 in the first fifth of a run,
            and by 1.28 later.

    Raises:
        ValueError: the number is out of its range, or the policy is none of this.
    """
    if not -1 <= by <= 1:
        raise ValueError(f"bolder: by must be in [-1, 1], got {by!r}")
    _check_moves_lr(policy)
    actor = deepcopy(policy.actor)
    actor.state_dict()[f"layers.{len(actor.hidden)}.bias"][policy.controls.index(LR.name)] += by
    return _noted(policy, actor, "bolder", by)


def calmer(policy: SchedulePolicy, by: float) -> SchedulePolicy:
    """A policy with as much less on its actions on the learning rate where data seem to be learnt by heart.

    That is where no validation loss is told, and the training loss has all but gone, and its gradient with it; where
    the few points that are left throw both about; or the gradient points against the weights, so that the loss falls on
    as they grow (Soudry et al. 2018, "The Implicit Bias of Gradient Descent on Separable Data"). A regression shows
    some of these signs, where it began without a mean, is exact, or has few points in a mini-batch, but not all.

    Args:
        policy: a perceptron of two tanh layers that moves the learning rate and sees all this.
        by: how much, in [0, 2], before actions are bounded.

    Raises:
        ValueError: the number is out of its range, or the policy is none of this.
    """
    return _where_all_signs(policy, "calmer", by, _BY_HEART, -1.0)


def steadier(policy: SchedulePolicy, by: float) -> SchedulePolicy:
    """A policy with as much more on its actions on the learning rate where gradients oppose each other in small steps.

    That is under SGD without momentum, where the gradients of successive steps point against each other, their norm and
    the loss are steady, and updates are small: below 10 % of the weights where the norm is always the same, as that of
    gradients that are clipped at every step, and the less the more it varies. A language model is trained so for most
    of a good run: it swings between the walls of a valley and goes down along it, which a lower learning rate would
    only slow ("river valley", Wen et al. 2024, "Understanding Warmup-Stable-Decay Learning Rates"). A policy takes it
    for the edge of divergence.

    Args:
        policy: a perceptron of two tanh layers that moves the learning rate and sees all this.
        by: how much, in [0, 2], before actions are bounded.

    Raises:
        ValueError: the number is out of its range, or the policy is none of this.
    """
    return _where_all_signs(policy, "steadier", by, _SWINGING, 1.0)


def warier(policy: SchedulePolicy, by: float) -> SchedulePolicy:
    """A policy with as much less on its actions on the learning rate where nothing is learnt yet in large steps.

    That is under SGD with momentum, where the loss is not 11 % below the first one, and updates are above 1.2 % of the
    weights. Deep networks without normalisation begin on such a plateau, and leave it by themselves; a policy raises
    the learning rate, time after time, until the network leaves it by an explosion, after which its units may all be
    off.

    Args:
        policy: a perceptron of two tanh layers that moves the learning rate and sees all this.
        by: how much, in [0, 2], before actions are bounded.

    Raises:
        ValueError: the number is out of its range, or the policy is none of this.
    """
    return _where_all_signs(policy, "warier", by, _UNLEARNT, -1.0)


CORRECTIONS = {correct.__name__: correct for correct in (bolder, calmer, steadier, warier)}


def corrected(policy: SchedulePolicy, **by: float) -> SchedulePolicy:
    """The policy with corrections by their names, of `CORRECTIONS`, and by how much each."""
    for name, how_much in by.items():
        policy = CORRECTIONS[name](policy, how_much)
    return policy


# Each sign: weights of what is observed, and where they come to 0.
Signs = Sequence[tuple[Mapping[str, float], float]]
_BY_HEART: Signs = (
    ({"loss_vs_first": -1.4}, 4.2),  # e^-6 of what it was
    ({"grad_norm_change": -2.5}, 4.75),  # e^-1.9
    ({"grad_norm_noise": 5.0, "grad_weights_cosine": -12.0}, 3.75),  # a standard deviation of 0.75, less for a cosine
    ({"loss_noise": 4.0}, 5.0),  # a standard deviation of 0.42
    ({"validation_age": -8.0}, 4.0),  # none
)
_SWINGING: Signs = (
    ({"momentum": -16.0, "adaptive": -16.0}, 24.0),  # SGD without any
    ({"grad_cosine": -6.0}, 1.2),  # a cosine of −0.1
    ({"grad_norm_noise": -6.0}, -1.8),  # a standard deviation of 0.3
    ({"update_ratio": -6.0, "grad_norm_noise": -12.0}, -5.4),  # 0.1 of the weights, 0.03 at a deviation of 0.2
    ({"loss_noise": -12.0}, -2.4),  # a standard deviation of 0.07
)
_UNLEARNT: Signs = (
    ({"momentum": 16.0}, -12.0),  # any
    ({"adaptive": -3.0}, 0.0),  # SGD
    ({"loss_vs_first": 60.0}, -3.6),  # 0.89 of what it was
    ({"update_ratio": 8.0}, 1.6),  # 0.012 of the weights
)


def _where_all_signs(policy: SchedulePolicy, name: str, by: float, signs: Signs, direction: float) -> SchedulePolicy:
    """The policy with `by` on its actions on the learning rate where all signs are there, and as it is elsewhere."""
    if not 0 <= by <= 2:
        raise ValueError(f"{name}: by must be in [0, 2], got {by!r}")
    _check_moves_lr(policy)
    seen = tuple(dict.fromkeys(name for weights, _ in signs for name in weights))
    if len(policy.actor.hidden) != 2 or policy.actor.activation != "tanh" or not {*seen} <= {*policy.observations}:
        raise ValueError(
            f"policy must have two layers of tanh and see {[*seen]}, it has {len(policy.actor.hidden)} of "
            f"{policy.actor.activation} and sees {list(policy.observations)}"
        )
    correction = SchedulePolicy(_gate(direction * by, signs, seen), seen, (LR.name,))
    actor = _side_by_side([policy, correction], policy.observations, policy.controls, share=1.0)
    return _noted(policy, actor, name, by)


def _gate(by: float, signs: Signs, seen: Sequence[str]) -> Perceptron:
    """From what is `seen`, to 0 where a sign is missing and `by` where all are there; between, a smooth step."""
    actor = Perceptron(len(seen), 1, (len(signs), 1))
    weights = actor.state_dict()
    for i, (sign, half_way) in enumerate(signs):
        for name, weight in sign.items():
            weights["layers.0.weight"][i, seen.index(name)] = weight
        weights["layers.0.bias"][i] = -half_way
    weights["layers.1.weight"][:] = 3.0  # tanh(3) is 1, near enough
    weights["layers.1.bias"][:] = 3.0 * (1 - len(signs))
    weights["layers.2.weight"][:] = weights["layers.2.bias"][:] = by / 2
    return actor


def _noted(policy: SchedulePolicy, actor: Actor, name: str, by: float) -> SchedulePolicy:
    """The policy with another actor; corrections of one name add up, in what it says of itself too."""
    return policy.with_actor(actor, {**policy.info, name: policy.info.get(name, 0.0) + by})


def _check_moves_lr(policy: SchedulePolicy) -> None:
    if policy.actor.name != Perceptron.name or LR.name not in policy.controls:
        raise ValueError(f"policy must be a perceptron that moves {LR.name!r}, got {policy!r}, of {policy.controls}")


def _all(names: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Each once, in the order in which they come."""
    return tuple(dict.fromkeys(name for each in names for name in each))


def _side_by_side(
    members: list[SchedulePolicy], observations: Sequence[str], controls: Sequence[str], share: float
) -> Perceptron:
    """The perceptron whose layers are blocks of the members', and whose outputs are `share` times the sum of theirs."""
    widths = [sum(layer) for layer in zip(*(member.actor.hidden for member in members), strict=True)]
    actor = Perceptron(len(observations), len(controls), widths, members[0].actor.activation)
    whole, last = actor.state_dict(), len(widths)  # the actor's own tensors, and no copies
    row, column = [0] * (last + 1), [0] * (last + 1)
    for member in members:
        own = member.actor.state_dict()
        for depth in range(last + 1):
            weight, bias = own[f"layers.{depth}.weight"], own[f"layers.{depth}.bias"]
            outputs, inputs = weight.shape
            rows, columns = torch.arange(outputs) + row[depth], torch.arange(inputs) + column[depth]
            if depth == 0:
                columns = torch.tensor([observations.index(name) for name in member.observations])
            if depth == last:
                rows = torch.tensor([controls.index(name) for name in member.controls])
                weight, bias = weight * share, bias * share
            whole[f"layers.{depth}.weight"][rows[:, None], columns] += weight
            whole[f"layers.{depth}.bias"][rows] += bias
            row[depth], column[depth] = row[depth] + outputs, column[depth] + inputs
    return actor
