"""Several policies as one."""

import pytest
import torch
from helpers import lively_policy

from rlsched import SchedulePolicy
from rlsched.actors import Perceptron, Recurrent
from rlsched.cli import main
from rlsched.committee import bolder, calmer, committee_of, steadier, warier
from rlsched.domain import Domain
from rlsched.signals import OBSERVATION_NAMES


def member(
    seed,
    observations=OBSERVATION_NAMES,
    controls=("lr", "clip"),
    hidden=(8, 5),
    kind=Perceptron,
    **options,
):
    """A policy of drawn weights."""
    actor = kind(len(observations), len(controls), hidden)
    generator = torch.Generator().manual_seed(seed)
    drawn = {k: 0.5 * torch.randn(v.shape, generator=generator) for k, v in actor.state_dict().items()}
    actor.load_state_dict(drawn)
    return SchedulePolicy(actor, observations, controls, **options)


def test_actions_are_the_mean_of_the_members():
    """A member that saw another's observations, or moved another's control, would ruin what the others know."""
    few = ("lr", "progress", "loss_trend")
    size = len(OBSERVATION_NAMES)
    domain = Domain(torch.linspace(-1, 1, size), torch.randn(size, size).triu(), torch.tensor(2.0))
    one = member(0, few, ("momentum", "lr"), safe_start=1.0)
    other = member(1, hidden=(4, 9), safe_start=0.3, domain=domain)
    made = committee_of([one, other])
    assert made.controls == ("momentum", "lr", "clip") and set(made.observations) == set(OBSERVATION_NAMES)
    assert made.actor.hidden == (12, 14) and made.safe_start == 0.3
    seen = dict(zip(OBSERVATION_NAMES, torch.rand(size, 50), strict=True))

    def said(policy):
        return dict(
            zip(policy.controls, policy.actor(torch.stack([seen[n] for n in policy.observations], 1))[0].T, strict=True)
        )

    still = torch.zeros(50)
    first, second, joint = said(one), said(other), said(made)
    for name in made.controls:
        torch.testing.assert_close(joint[name], (first.get(name, still) + second.get(name, still)) / 2)
    expected = other.influence(torch.stack([seen[n] for n in other.observations], 1))
    assert 0 < expected.min() < 1
    torch.testing.assert_close(made.influence(torch.stack([seen[n] for n in made.observations], 1)), expected)


def test_what_cannot_be_one_policy_is_refused():
    """A committee of which a member is silently left out would be scored, and shipped."""
    for policies, said in (
        ([lively_policy()], "policies must be at least two"),
        ([lively_policy(), lively_policy()], "each of them another"),
        ([member(0), member(1, hidden=(8,))], r"one number of layers, they have \[2, 1\]"),
        ([member(0), member(1, kind=Recurrent)], "one kind of actor"),
        ([member(0, kind=Recurrent), member(1, kind=Recurrent)], "must be perceptrons, got 'recurrent'"),
        ([member(0), member(1, base_schedule="constant")], r"one base schedule, they have \['linear', 'constant'\]"),
        ([member(0, ("lr",)), member(1, ("progress",))], r"one among them that sees .*\['lr', 'progress'\]"),
    ):
        with pytest.raises(ValueError, match=said):
            committee_of(policies)


def test_bolder_policy_says_as_much_more():
    """More or less than what was chosen, or more of another control, would be a policy that nobody has measured."""
    policy, observations = member(0, controls=("clip", "lr")), torch.rand(6, len(OBSERVATION_NAMES))
    before = policy.actor(observations)[0].clone()
    made = bolder(policy, 0.2)
    more = made.actor(observations)[0] - before
    torch.testing.assert_close(more, torch.tensor([0.0, 0.2]).expand(6, 2))
    assert made.info["bolder"] == 0.2
    assert torch.equal(policy.actor(observations)[0], before), "the policy itself stays as it is"


def test_bolder_policy_is_the_same_in_all_else():
    """What starts lower, or is trusted elsewhere, is another policy in more than it says."""
    size = len(OBSERVATION_NAMES)
    domain = Domain(torch.linspace(-1, 1, size), torch.randn(size, size).triu(), torch.tensor(2.0))
    policy = member(0, safe_start=0.3, domain=domain, base_schedule="constant", info={"training": {"seed": 3}})
    made = bolder(policy, 0.2)
    assert made.safe_start == 0.3 and made.base_schedule == policy.base_schedule
    assert made.info["training"] == {"seed": 3}
    observations = torch.randn(20, size)
    torch.testing.assert_close(made.influence(observations), policy.influence(observations))
    assert made.digest != policy.digest


def test_policy_that_cannot_be_bolder_is_refused():
    """A percentage, or a policy that leaves the learning rate alone, would be no bolder as asked."""
    for policy, by, said in (
        (member(0), 20.0, r"bolder: by must be in \[-1, 1\], got 20.0"),
        (member(0), float("nan"), r"bolder: by must be in \[-1, 1\], got nan"),
        (member(0, controls=("clip",)), 0.2, r"a perceptron that moves 'lr', got .*\('clip',\)"),
        (member(0, kind=Recurrent), 0.2, "must be a perceptron"),
    ):
        with pytest.raises(ValueError, match=said):
            bolder(policy, by)


def seen(**observations):
    """What a policy sees, (1, observations), all else 0."""
    return torch.tensor([[float(observations.get(name, 0.0)) for name in OBSERVATION_NAMES]])


def test_calmer_policy_takes_back_where_data_are_learnt_by_heart_and_nowhere_else():
    """A regression whose loss fell far, since it began without a mean or is exact, would hardly be learnt on; where
    data are learnt by heart, the learning rate would be raised a thousand times."""
    policy = member(0, controls=("clip", "lr"))
    made = calmer(policy, 1.8)
    by_heart = {
        "loss_vs_first": -4.0,
        "grad_norm_change": -3.0,
        "grad_norm_noise": 1.5,
        "grad_weights_cosine": -0.3,
        "loss_noise": 2.0,
        "validation_age": -1.0,
    }
    for missing, expected in (
        ({}, 1.8),
        (dict.fromkeys(by_heart, 0.0), 0.0),
        ({"loss_vs_first": -1.5}, 0.0),
        ({"grad_norm_change": -1.0}, 0.0),  # the mean of a regression was learnt
        ({"grad_norm_noise": 0.3}, 1.8),  # but it points against the weights
        ({"grad_norm_noise": 0.3, "grad_weights_cosine": 0.0}, 0.0),
        ({"loss_noise": 0.5}, 0.0),  # an exact regression
        ({"validation_age": 0.1}, 0.0),  # validation losses tell, and the wrapper goes back
        ({"loss_vs_first": -3.0}, 0.9),  # half-way
    ):
        observation = seen(**{**by_heart, **missing})
        less = policy.actor(observation)[0] - made.actor(observation)[0]
        torch.testing.assert_close(less, torch.tensor([[0.0, expected]]), atol=0.1, rtol=0)
    assert made.info["calmer"] == 1.8 and made.safe_start == policy.safe_start


def test_steadier_policy_holds_on_while_gradients_swing_in_small_steps_and_nowhere_else():
    """A language model under SGD without momentum would be trained at a fifth of its learning rate; one whose gradient
    is thrown about, or whose updates are large already, would be driven over the edge. Clipped at every step, its
    gradient has one norm, and large updates are safe."""
    policy = member(0, controls=("clip", "lr"))
    made = steadier(policy, 0.5)
    swinging = {
        "momentum": -1.0,
        "adaptive": -1.0,
        "grad_cosine": -1.0,
        "grad_norm_noise": 0.0,
        "update_ratio": 0.2,
        "loss_noise": 0.0,
    }
    for missing, expected in (
        ({}, 0.5),
        (dict.fromkeys(swinging, 0.0), 0.0),
        ({"momentum": 0.0}, 0.0),
        ({"adaptive": 1.0}, 0.0),  # RMSprop, Adadelta
        ({"grad_cosine": 0.3}, 0.0),
        ({"grad_norm_noise": 1.0}, 0.0),
        ({"loss_noise": 0.6}, 0.0),
        ({"loss_noise": 0.2}, 0.2),  # nearly half-way, as all signs are smooth
        ({"update_ratio": 1.4}, 0.0),
        ({"update_ratio": 0.9}, 0.2),
        ({"grad_norm_noise": 0.2}, 0.45),
        ({"grad_norm_noise": 0.2, "update_ratio": 0.9}, 0.0),
        ({"grad_norm_noise": 0.2, "update_ratio": -0.3}, 0.45),
    ):
        observation = seen(**{**swinging, **missing})
        more = made.actor(observation)[0] - policy.actor(observation)[0]
        torch.testing.assert_close(more, torch.tensor([[0.0, expected]]), atol=0.05, rtol=0)
    assert made.info["steadier"] == 0.5 and made.safe_start == policy.safe_start


def test_warier_policy_waits_on_a_plateau_and_nowhere_else():
    """A deep network would be blown up before it has begun to learn; one that learns would be slowed."""
    policy = member(0, controls=("clip", "lr"))
    made = warier(policy, 1.5)
    waiting = {"momentum": 0.0, "adaptive": -1.0, "loss_vs_first": 0.0, "update_ratio": 0.6}
    for missing, expected in (
        ({}, 1.5),
        ({"momentum": -0.4}, 1.5),  # the policy has lowered it
        ({"momentum": -1.0}, 0.0),
        ({"loss_vs_first": 0.1}, 1.5),
        ({"adaptive": 1.0}, 0.0),
        ({"loss_vs_first": -0.12}, 0.0),
        ({"loss_vs_first": -0.06}, 0.75),  # half-way
        ({"update_ratio": -0.2}, 0.0),
    ):
        observation = seen(**{**waiting, **missing})
        less = policy.actor(observation)[0] - made.actor(observation)[0]
        torch.testing.assert_close(less, torch.tensor([[0.0, expected]]), atol=0.1, rtol=0)
    assert made.info["warier"] == 1.5 and made.safe_start == policy.safe_start


@pytest.mark.parametrize("correct", [bolder, calmer, steadier, warier])
def test_corrections_add_up(correct):
    """A file that says the last of two numbers would be made again as another policy."""
    assert correct(correct(member(0), 0.3), 0.2).info[correct.__name__] == pytest.approx(0.5)


@pytest.mark.parametrize(("correct", "sign"), [(calmer, "loss_vs_first"), (steadier, "momentum"), (warier, "momentum")])
def test_policy_that_cannot_be_corrected_is_refused(correct, sign):
    """A policy that does not see the signs would be corrected nowhere, or everywhere."""
    for policy, by, said in (
        (member(0), -0.1, rf"{correct.__name__}: by must be in \[0, 2\], got -0.1"),
        (member(0), float("nan"), rf"{correct.__name__}: by must be in \[0, 2\], got nan"),
        (member(0, controls=("clip",)), 1.0, r"a perceptron that moves 'lr'"),
        (member(0, hidden=(8,)), 1.0, r"two layers of tanh and see .*, it has 1 of tanh"),
        (member(0, ("progress", "loss_noise")), 1.0, rf"see \['{sign}', .* sees \['progress',"),
    ):
        with pytest.raises(ValueError, match=said):
            correct(policy, by)


def test_command_exports_a_committee(tmp_path, capsys):
    """Whoever has trained three seeds would choose one of them and throw the others away."""
    files = [str(member(seed).save(tmp_path / f"{seed}.safetensors")) for seed in range(3)]
    out = tmp_path / "all.safetensors"
    assert main(["export", *files, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    made = SchedulePolicy.load(out)
    assert made.digest == committee_of([SchedulePolicy.load(file) for file in files]).digest
    assert [each["digest"] for each in made.info["committee"]] == [SchedulePolicy.load(f).digest for f in files]
    assert main(["export", files[0], files[0], "--out", str(out)]) == 1
    assert "policies must be at least two, each of them another" in capsys.readouterr().err


def test_command_exports_a_corrected_policy(tmp_path, capsys):
    """The number that was chosen has to get from the command to the file."""
    file, out = member(0).save(tmp_path / "mine.safetensors"), tmp_path / "bolder.safetensors"
    assert main(["export", str(file), "--bolder", "0.2", "--out", str(out)]) == 0
    assert SchedulePolicy.load(out).digest == bolder(member(0), 0.2).digest
    assert main(["export", str(file), "--bolder", "0.2", "--calmer", "1.8", "--out", str(out)]) == 0
    assert SchedulePolicy.load(out).digest == calmer(bolder(member(0), 0.2), 1.8).digest
    assert main(["export", str(file), "--steadier", "0.5", "--out", str(out)]) == 0
    assert SchedulePolicy.load(out).digest == steadier(member(0), 0.5).digest
    assert main(["export", str(file), "--warier", "1.5", "--out", str(out)]) == 0
    assert SchedulePolicy.load(out).digest == warier(member(0), 1.5).digest
    for option in ("bolder", "calmer", "steadier", "warier"):
        assert main(["export", str(file), f"--{option}", "20", "--out", str(out)]) == 1
        assert f"{option}: by must be in [" in capsys.readouterr().err
