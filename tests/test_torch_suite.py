"""What torch asks of its own optimizers, asked of an optimizer under a schedule.

The checks of torch's test/test_optim.py, over the configurations of its database, written anew: both are beyond reach
without torch's test dependencies. Each is made of the plain optimizer too, which shows that the check is one; and of it
wrapped and attached to, under policies that stand still, where a schedule is to make no difference.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close

from rlsched import ScheduledOptimizer, SchedulePolicy, attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:rlsched. no parameter has a gradient"),
    pytest.mark.filterwarnings("ignore:rlsched. no loss was reported"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # of torch's own doing
    pytest.mark.filterwarnings("ignore:rlsched. a torch scheduler, or other code"),
]


class Kind(NamedTuple):
    """An optimizer and its configurations."""

    make: Callable[..., torch.optim.Optimizer]
    variants: list[dict[str, Any]]
    flags: tuple[str, ...] = ("foreach", "differentiable")  # other implementations than the loop over all parameters
    closure: bool = False  # whether step needs one
    dense: bool = True  # whether it takes dense gradients
    sparse: dict[str, Any] | None = None  # if it takes sparse gradients too: with what
    complex: bool = True  # whether it takes complex parameters
    matrices: bool = False  # whether it takes nothing else
    later: tuple[str, ...] = ("maximize", "foreach", "fused", "differentiable", "capturable")  # since its first version

    def configurations(self, flags=("foreach", "fused")):
        """All variants, in these implementations too as far as there are any."""
        for variant in self.variants:
            for flag in (None, *(flag for flag in flags if flag in self.flags)):
                if not (flag == "foreach" and isinstance(variant.get("lr"), torch.Tensor)):
                    yield {**copy.deepcopy(variant), **({flag: True} if flag else {})}


DECAY, UPHILL = {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}
EVERY = ("foreach", "fused", "differentiable")
ADAM = [{}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, DECAY, UPHILL, {**DECAY, "amsgrad": True}]
DECAYING = (torch.optim.AdamW, getattr(torch.optim, "Muon", None))  # weights, by default
KINDS = {
    "Adadelta": Kind(
        torch.optim.Adadelta,
        [{}, {"lr": 0.01}, DECAY, {"maximize": True}, UPHILL, {"rho": 0.95, "weight_decay": 0.9}],
    ),
    "Adafactor": Kind(
        torch.optim.Adafactor,
        [{}, {**DECAY, "lr": 0.01}, UPHILL, {"beta2_decay": -1.0}, {"d": 1.5}],
        flags=("foreach",),
        complex=False,
        later=(),
    ),
    "Adagrad": Kind(
        torch.optim.Adagrad,
        [
            {},
            {"lr": 0.1},
            {"lr": torch.tensor(0.001)},
            DECAY,
            UPHILL,
            {**DECAY, "initial_accumulator_value": 0.1},
            {**DECAY, "lr": 0.1, "lr_decay": 0.5},
        ],
        EVERY,
        sparse={"lr": 0.1},
    ),
    "Adam": Kind(torch.optim.Adam, ADAM, EVERY),
    "AdamW": Kind(torch.optim.AdamW, ADAM, EVERY),
    "Adamax": Kind(torch.optim.Adamax, [{}, {"lr": 0.1}, DECAY, {"maximize": True}, UPHILL]),
    "ASGD": Kind(torch.optim.ASGD, [{}, {"lambd": 0.1}, {"lr": 0.02}, {"t0": 100}, DECAY, {"maximize": True}, UPHILL]),
    "LBFGS": Kind(
        torch.optim.LBFGS,
        [{}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"tolerance_grad": 1e-6}, {"line_search_fn": "strong_wolfe"}],
        flags=(),
        closure=True,
    ),
    "NAdam": Kind(
        torch.optim.NAdam,
        [
            {},
            {"lr": 0.001},
            {"momentum_decay": 6e-3},
            DECAY,
            {**DECAY, "momentum_decay": 6e-3},
            {**DECAY, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
            UPHILL,
        ],
    ),
    "RAdam": Kind(
        torch.optim.RAdam, [{}, {"lr": 0.002}, {"eps": 1e-6}, DECAY, {**DECAY, "decoupled_weight_decay": True}, UPHILL]
    ),
    "RMSprop": Kind(
        torch.optim.RMSprop,
        [
            {},
            {"lr": 0.001},
            DECAY,
            {"maximize": True},
            UPHILL,
            {**DECAY, "centered": True},
            {**DECAY, "centered": True, "momentum": 0.1},
            {**UPHILL, "centered": True, "momentum": 0.1},
        ],
    ),
    "Rprop": Kind(
        torch.optim.Rprop, [{}, {"lr": 2e-4}, {"etas": (0.5, 1.5)}, {"step_sizes": (2e-6, 100)}, {"maximize": True}]
    ),
    "SGD": Kind(
        torch.optim.SGD,
        [
            {},
            {"lr": 0.01},
            {"lr": torch.tensor(0.001)},
            {"weight_decay": 0.5},
            UPHILL,
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.5},
            {"momentum": 0.9, "weight_decay": 0.1},
            {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        ],
        EVERY,
        sparse={"lr": 4.8e-3},
    ),
    "SparseAdam": Kind(
        torch.optim.SparseAdam,
        [{}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"maximize": True}],
        flags=(),
        dense=False,
        sparse={"lr": 0.04},
        complex=False,
    ),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    KINDS["Muon"] = Kind(
        torch.optim.Muon,
        [
            {},
            {"lr": 0.01},
            {"lr": torch.tensor(0.001)},
            {"weight_decay": 0.2},
            {"momentum": 0.8},
            {"ns_steps": 6},
            {"ns_coefficients": (3.4, -4.7, 2.0)},
        ],
        flags=(),
        complex=False,
        matrices=True,
        later=(),
    )


# --- The faces ------------------------------------------------------------------------------------------------------


class Driven(NamedTuple):
    """An optimizer, and all that has a state of its own."""

    optimizer: torch.optim.Optimizer
    parts: list[Any]

    def state(self):
        """A copy of what is to be saved."""
        return copy.deepcopy([part.state_dict() for part in self.parts])

    def load(self, state):
        """Go on from it."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def plain(inner):
    """The optimizer alone."""
    return Driven(inner, [inner])


def wrapped(inner):
    """Wrapped, without controls."""
    optimizer = ScheduledOptimizer(inner, total_steps=1000, decisions=250, controls=())
    return Driven(optimizer, [optimizer])


def attached(inner):
    """Attached to, under the policy that stands still."""
    return Driven(inner, [inner, attach(inner, total_steps=1000, decisions=250, policy=SchedulePolicy.zero())])


FACES = {face.__name__: face for face in (plain, wrapped, attached)}


@pytest.fixture(params=FACES.values(), ids=FACES)
def drive(request):
    """What makes of the parameters and arguments of an optimizer one under a schedule."""
    return lambda kind, params, **arguments: request.param(kind.make(params, **arguments))


def over(condition=lambda kind: True):
    """A test for each of the optimizers of which this is true."""
    kinds = {name: kind for name, kind in KINDS.items() if condition(kind)}
    return pytest.mark.parametrize("kind", kinds.values(), ids=kinds)


# --- Problems to solve ----------------------------------------------------------------------------------------------


class Linear:
    """A linear map of one input, with the square of its outputs for a loss."""

    def __init__(self, kind, contiguous=True):
        self.kind = kind
        self.weight, self.bias = (
            Parameter(torch.randn(shape) if contiguous else torch.randn(*shape, 2)[..., 0])
            for shape in ((10, 5), (10, 1) if kind.matrices else (10,))
        )
        self.input = torch.randn(5)
        self.params = [self.weight, self.bias]

    def again(self):
        """The same at the weights that it has."""
        other = copy.copy(self)
        other.params = other.weight, other.bias = [Parameter(p.detach().clone()) for p in self.params]
        return other

    def backward(self, optimizer):
        """Leave gradients, and return the loss."""
        optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias.view(-1)).square().sum()
        loss.backward()
        if not self.kind.dense:
            for p in self.params:
                p.grad = p.grad.to_sparse()
        return loss

    def step(self, optimizer):
        """One step, with a closure where one is needed."""
        if self.kind.closure:
            return optimizer.step(lambda: self.backward(optimizer))
        loss = self.backward(optimizer)
        optimizer.step()
        return loss


def assert_descends(problem, optimizer, arguments, after_step=lambda loss: None):
    """The loss gets smaller in training, or larger where that is asked for."""
    first = problem.backward(optimizer).item()
    for _ in range(2 if problem.kind.closure else 20):
        after_step(problem.step(optimizer))
    last = problem.backward(optimizer).item()
    assert last > first if arguments.get("maximize") else last < first


def rosenbrock(xy):
    """A valley with its end at (1, 1)."""
    x, y = xy
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def without_names(states):
    """States without the names of parameters, which need not be the same."""
    states = copy.deepcopy(states)
    for group in states[0]["param_groups"]:
        group.pop("param_names", None)
    return states


# --- Going down -----------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "none": lambda optimizer: None,
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
}


@over()
@pytest.mark.parametrize(("scheduler", "contiguous"), [*((name, True) for name in SCHEDULERS), ("none", False)])
def test_goes_in_the_right_direction(drive, kind, scheduler, contiguous):
    """Whatever else is right, training would be lost; beside a scheduler as well, or where weights do not lie side by
    side."""
    for arguments in kind.configurations(("foreach", "fused") if contiguous else ()):
        problem = Linear(kind, contiguous)
        optimizer = drive(kind, problem.params, **arguments).optimizer
        beside = SCHEDULERS[scheduler](optimizer)

        def after_step(loss, beside=beside):
            if beside is not None:
                beside.step(*([loss.detach()] if scheduler == "ReduceLROnPlateau" else []))

        assert_descends(problem, optimizer, arguments, after_step)


@over(lambda kind: not kind.closure)
def test_group_without_weight_decay(drive, kind):
    """Biases are left out of it by most."""
    if not kind.dense:
        return
    for arguments in kind.configurations():
        problem = Linear(kind)
        groups = [
            {"params": [problem.weight], **arguments},
            {"params": [problem.bias], **arguments, "weight_decay": 0.0},
        ]
        if kind.make is not torch.optim.Rprop:
            assert_descends(problem, drive(kind, groups).optimizer, arguments)


@over(lambda kind: not kind.closure)
def test_group_with_a_learning_rate_of_its_own(drive, kind):
    """A group that is to stand still would move with the others."""
    for arguments in kind.configurations():
        problem = Linear(kind)
        still = Parameter(torch.randn(2, 1))
        before = still.detach().clone()
        groups = [{"params": problem.params, "lr": 1e-3, **arguments}, {"params": [still]}]
        others = {"step_sizes": (0, 50)} if kind.make is torch.optim.Rprop else {}
        optimizer = drive(kind, groups, lr=1e-28, **others).optimizer
        backward = problem.backward

        def with_gradient(optimizer, backward=backward, still=still):
            loss = backward(optimizer)
            still.grad = torch.rand_like(still)
            if not kind.dense:
                still.grad = still.grad.to_sparse()
            return loss

        problem.backward = with_gradient
        assert_descends(problem, optimizer, arguments)
        assert_close(still.detach(), before)


@over()
def test_tensor_for_the_learning_rate(drive, kind):
    """It is one more number, and no other training."""
    for arguments in kind.configurations():
        lr = 1.0 if kind.closure else 1e-3
        arguments.pop("lr", None)
        problem = Linear(kind)
        other = problem.again()
        optimizer = drive(kind, problem.params, lr=lr, **arguments).optimizer
        try:
            inner = drive(kind, other.params, lr=torch.tensor(lr), **arguments).optimizer
        except ValueError as error:
            assert "lr as a Tensor is not supported" in str(error)
            continue
        for _ in range(5):
            problem.step(optimizer)
            other.step(inner)
            assert_close(other.params, problem.params)


@over(lambda kind: set(kind.flags))
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_implementations_are_one(drive, kind, flag):
    """The fast ones would take other steps: with frozen layers, in a step without gradients, for a scalar."""
    if flag not in kind.flags:
        return
    for variant in kind.variants:
        if flag == "foreach" and isinstance(variant.get("lr"), torch.Tensor):
            continue
        models, driven = [], []
        for value in (False, True):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).double()
            scalar = torch.zeros((), dtype=torch.float64, requires_grad=True)
            scalar.grad = torch.ones_like(scalar)
            models.append(model)
            arguments = {**copy.deepcopy(variant), flag: value}
            driven.append(drive(kind, [*model.parameters(), scalar], **arguments))
        for step in range(7):
            for model, one in zip(models, driven, strict=True):
                one.optimizer.zero_grad()
                model[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    model(torch.arange(6.0).double().view(3, 2) / 10).sum().backward()
                one.optimizer.step()
            assert_close(*[[p.detach() for p in model.parameters()] for model in models])
            states = [one.optimizer.state_dict()["state"] for one in driven]
            assert_close(*states)


@over(lambda kind: "fused" in kind.flags)
def test_fused_parameters_without_values_are_refused(drive, kind):
    """The device "meta" has none."""
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    optimizer = drive(kind, model.parameters(), fused=True).optimizer
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors"):
        optimizer.step()


# --- Gradients of all kinds -----------------------------------------------------------------------------------------


@over(lambda kind: kind.sparse is not None)
@pytest.mark.parametrize("scheduler", ["none", "StepLR"])
def test_sparse_gradients(drive, kind, scheduler):
    """They hold one number of two in several parts, as those of an embedding do: the same training as by dense ones."""
    for arguments in kind.configurations(["foreach"]):
        if "momentum" in arguments or "weight_decay" in arguments:
            continue  # torch has none for sparse gradients
        arguments = {**arguments, **kind.sparse}
        both = [Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64)) for _ in range(2)]
        optimizers = [drive(kind, [p], **arguments).optimizer for p in both]
        schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in optimizers]
        for step in range(16):
            for p, optimizer, is_sparse in zip(both, optimizers, (True, not kind.dense), strict=True):

                def closure(p=p, optimizer=optimizer, is_sparse=is_sparse, i=step % 2):
                    optimizer.zero_grad()
                    loss = rosenbrock(p)
                    loss.backward()
                    g = p.grad[i]
                    parts = torch.stack([g / 4, g - g / 4])
                    p.grad = torch.sparse_coo_tensor([[i, i]], parts, (2,), check_invariants=True)
                    p.grad = p.grad if is_sparse else p.grad.to_dense()
                    return loss

                optimizer.step(closure)
            for beside in schedulers:
                if beside is not None:
                    beside.step()
            assert_close(both[0].detach(), both[1].detach(), rtol=5e-6, atol=5e-6)
        start, end = rosenbrock(torch.tensor([1.5, 1.5])), rosenbrock(both[0].detach())
        assert end > start if arguments.get("maximize") else end < start


def complex_and_real(shapes):
    """Complex parameters and one that is real, and all of them as real ones."""
    whole = [torch.randn(shape, dtype=torch.complex64, requires_grad=True) for shape in shapes]
    whole.append(torch.randn(10, 5, requires_grad=True))
    return whole, [as_real(p).requires_grad_() for p in whole]


def as_real(p):
    """A copy, as real numbers."""
    return (torch.view_as_real(p) if p.is_complex() else p).detach().clone()


@over(lambda kind: kind.complex)
def test_complex_parameters_are_two_real_ones(drive, kind):
    """They are no less in use, in signal processing and physics."""
    for arguments in kind.configurations(["foreach"]):
        whole, real = complex_and_real([(10, 5), (10,)])
        optimizers = [drive(kind, params, **arguments).optimizer for params in (whole, real)]
        seen = []

        def closure_of_real(seen=seen, real=real):
            for p in real:
                p.grad = torch.randn_like(p)
            seen.append(([p.detach().clone() for p in real], [p.grad.clone() for p in real], torch.rand(())))
            return seen[-1][-1].clone()

        def closure_of_whole(seen=seen, whole=whole):
            weights, grads, loss = seen.pop(0)
            assert_close([as_real(p) for p in whole], weights)
            for p, grad in zip(whole, grads, strict=True):
                p.grad = torch.view_as_complex(grad) if p.is_complex() else grad
            return loss

        for _ in range(3):
            for optimizer, closure in zip(optimizers[::-1], (closure_of_real, closure_of_whole), strict=True):
                if kind.closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        assert_close([as_real(p) for p in whole], [p.detach() for p in real])
        assert not seen


@over(lambda kind: kind.complex)
def test_complex_parameters_are_their_parts(drive, kind):
    """The gradient of a real loss, by its real and its imaginary part."""
    for arguments in kind.configurations(["foreach"]):
        torch.manual_seed(2024)
        whole = torch.randn(2, dtype=torch.complex64, requires_grad=True)
        parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
        optimizers = [drive(kind, params, **arguments).optimizer for params in ([whole], parts)]
        seen = []

        def closure_of_whole(optimizer=optimizers[0], whole=whole, seen=seen):
            optimizer.zero_grad()
            loss = rosenbrock(whole).abs()
            loss.backward()
            seen.append((whole.detach().clone(), loss.detach()))
            return loss

        def closure_of_parts(optimizer=optimizers[1], parts=parts, seen=seen):
            weights, expected = seen.pop(0)
            for part, value in zip(parts, (weights.real, weights.imag), strict=True):
                assert_close(part.detach(), value)
                part.data.copy_(value)  # of a sum in another order a line search makes other steps
            optimizer.zero_grad()
            loss = rosenbrock(torch.complex(*parts)).abs()
            assert_close(loss.detach(), expected)
            loss.backward()
            return loss

        for _ in range(3):
            for optimizer, closure in zip(optimizers, (closure_of_whole, closure_of_parts), strict=True):
                if kind.closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            assert_close(whole.detach(), torch.complex(*parts).detach())
        assert not seen


@over()
def test_step_without_gradients_moves_nothing(drive, kind):
    """Nor does it fail."""
    for arguments in kind.configurations(EVERY):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = copy.deepcopy(params)
        drive(kind, params, **arguments).optimizer.step(lambda: torch.tensor([1.0]))
        assert_close(params, before)


@over()
def test_step_with_gradients_of_zero_moves_nothing(drive, kind):
    """Clipping would divide them by their norm."""
    for arguments in kind.configurations():
        if {"weight_decay", "lambd"} & arguments.keys() or kind.make in DECAYING:
            continue
        p = torch.randn(5, 1, requires_grad=True)
        before = p.detach().clone()
        optimizer = drive(kind, [p], **arguments).optimizer
        if kind.dense:
            p.grad = torch.zeros_like(p)
        else:
            indices, values = torch.empty(1, 0, dtype=torch.long), torch.empty(0, 1)
            p.grad = torch.sparse_coo_tensor(indices, values, (5, 1), check_invariants=True)
        optimizer.step(lambda: torch.tensor([1.0]))
        assert_close(p.detach(), before)


# --- State ----------------------------------------------------------------------------------------------------------


@over()
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)])
def test_state_is_all_that_the_future_depends_on(drive, kind, named):
    """A run that is loaded would go on otherwise; and two equal runs would not be told by their states."""

    def params(problem, is_named):
        return [(f"p{i}", p) for i, p in enumerate(problem.params)] if is_named else problem.params

    for arguments in list(kind.configurations())[: 1 if any(named) else None]:
        problem = Linear(kind)
        one = drive(kind, params(problem, named[0]), **arguments)
        for _ in range(6):
            problem.step(one.optimizer)
        copied = problem.again()
        other = drive(kind, params(copied, named[1]), **arguments)
        other.load(one.state())
        for _ in range(6):
            problem.step(one.optimizer)
            copied.step(other.optimizer)
            assert_close(copied.params, problem.params, rtol=0, atol=0)
        assert same(without_names(one.state()), without_names(other.state()))
        if any(named):
            assert other.state()[0]["param_groups"][0]["param_names"] == ["p0", "p1"]
        other.optimizer.param_groups.extend(other.optimizer.param_groups)  # and what is repeated is the same
        groups = [without_names(x.state())[0]["param_groups"][-1] for x in (one, other)]
        assert same(*groups)


def same(one, other):
    """Whether nested states are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@over()
@pytest.mark.parametrize("change", ["flags", "steps"])
def test_older_states_load(drive, kind, change):
    """They lack the flags that came later, and have numbers where there are tensors now."""
    for arguments in kind.configurations():
        problem = Linear(kind)
        it = drive(kind, problem.params, **arguments)
        for _ in range(3):
            problem.step(it.optimizer)
        state = it.state()
        for group in state[0]["param_groups"] if change == "flags" else ():
            for flag in kind.later:
                group.pop(flag, None)
        for each in state[0]["state"].values() if change == "steps" else ():
            if isinstance(each.get("step"), torch.Tensor):
                each["step"] = each["step"].item()
        it.load(state)
        problem.step(it.optimizer)


@over()
@pytest.mark.parametrize("weights_only", [True, False])
def test_state_comes_back_from_a_file(drive, kind, weights_only):
    """Without pickle's dangers, too."""
    for arguments in kind.configurations():
        problem = Linear(kind)
        it = drive(kind, problem.params, **arguments)
        for _ in range(3):
            problem.step(it.optimizer)
        file = io.BytesIO()
        torch.save(it.state(), file)
        file.seek(0)
        assert same(torch.load(file, weights_only=weights_only), it.state())


@over()
def test_state_of_each_parameter_is_not_empty(drive, kind):
    """Who looks into it finds something."""
    for arguments in kind.configurations():
        problem = Linear(kind)
        optimizer = drive(kind, problem.params, **arguments).optimizer
        problem.step(optimizer)
        assert all(len(state) > 0 for state in optimizer.state.values())


@over()
def test_copies_have_all_attributes(drive, kind):
    """Of a copy, of a pickle, and in print."""
    for arguments in kind.configurations(()):
        problem = Linear(kind)
        optimizer = drive(kind, problem.params, **arguments).optimizer
        for _ in range(3):
            problem.step(optimizer)
        names = {name for name in vars(optimizer) if not name.startswith("_")}
        for duplicate in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
            other = duplicate(optimizer)
            assert {name for name in vars(other) if not name.startswith("_")} == names
            assert len(repr(other)) > 10


# --- Hooks ----------------------------------------------------------------------------------------------------------


def hooked(drive, kind, arguments, **hooks):
    """An optimizer with these hooks."""
    it = drive(kind, [torch.rand(2, 3, requires_grad=True)], **arguments)
    for name, hook in hooks.items():
        getattr(it.optimizer, f"register_{name}_hook")(hook)
    return it.optimizer


def mark_state(optimizer):
    """Before state_dict."""
    optimizer.state["mark"] = 1 + optimizer.state.get("mark", 0)


def unmark(optimizer, state_dict):
    """After it."""
    return {**state_dict, "marked": state_dict["state"].pop("mark", None)}


@over()
def test_hooks_of_state_dict(drive, kind):
    """Whoever stores by them what the optimizer does not know would lose it."""
    for arguments in kind.configurations(()):
        assert hooked(drive, kind, arguments, state_dict_pre=mark_state).state_dict()["state"]["mark"] == 1
        assert hooked(drive, kind, arguments, state_dict_post=unmark).state_dict()["marked"] is None
        state = hooked(drive, kind, arguments, state_dict_pre=mark_state, state_dict_post=unmark).state_dict()
        assert state["marked"] == 1
        assert "mark" not in state["state"]


def lr_in_place(optimizer, state_dict):
    """Before load_state_dict, without a return value."""
    state_dict["param_groups"][0]["lr"] = 0.002


def lr_in_a_copy(optimizer, state_dict):
    """Before load_state_dict, with one."""
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


def note_lr(optimizer):
    """After load_state_dict."""
    optimizer.state["loaded"] = (*optimizer.state.get("loaded", ()), optimizer.param_groups[0]["lr"])


@over()
def test_hooks_of_load_state_dict(drive, kind):
    """Whoever translates by them the states of another version would load what does not fit."""
    for arguments in kind.configurations(()):
        optimizer = hooked(drive, kind, arguments, load_state_dict_pre=lr_in_place)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(lr_in_a_copy, prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer = hooked(drive, kind, arguments, load_state_dict_pre=lr_in_a_copy, load_state_dict_post=note_lr)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["loaded"] == (0.003,)


@over()
def test_hooks_of_step(drive, kind):
    """Those of one optimizer and those of all: each once in a step, and in their order."""
    calls = []
    closure = (lambda: 1.0) if kind.closure else None
    for arguments in kind.configurations(EVERY):
        params = [torch.ones(2, 3)]
        optimizer, other = drive(kind, params, **arguments).optimizer, torch.optim.SGD(params)
        handles = [
            register_optimizer_step_pre_hook(lambda *_: calls.append("all, before")),
            register_optimizer_step_post_hook(lambda *_: calls.append("all, after")),
        ]
        for one in (optimizer, other):
            handles.append(one.register_step_pre_hook(lambda *_: calls.append("before")))
            handles.append(one.register_step_post_hook(lambda *_: calls.append("after")))
        order = ["all, before", "before", "after", "all, after"]
        for one in (optimizer, other, optimizer):
            one.step(closure)
            assert calls == order
            calls.clear()
        for handle in handles:
            handle.remove()
        for one in (optimizer, other):
            one.step(closure)
        assert calls == []


# --- Misuse ---------------------------------------------------------------------------------------------------------


@over(lambda kind: kind.closure)
def test_types_of_what_second_order_returns(drive, kind):
    """Whether it stops at once, or goes on."""
    for variant in kind.variants:
        values = [
            drive(kind, [torch.randn(10, 5)], **{**variant, "tolerance_grad": tolerance}).optimizer.step(
                lambda: torch.tensor([10.0])
            )
            for tolerance in (math.inf, -math.inf)
        ]
        assert type(values[0]) is type(values[1])


def complex_gradient():
    """A complex parameter with a gradient."""
    p = torch.rand(2, 3, dtype=torch.complex64)
    p.grad = torch.rand_like(p)
    return p


def dense_gradient():
    """A parameter with a dense gradient."""
    p = torch.rand(2, 3)
    p.grad = torch.rand_like(p)
    return p


REFUSED = {
    "Adafactor": (complex_gradient, "does not support complex parameters"),
    "Muon": (complex_gradient, "does not support complex parameters"),
    "SparseAdam": (dense_gradient, "does not support dense gradients"),
}


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in KINDS])
def test_what_the_optimizer_refuses_in_its_step(drive, kind):
    """Its own error would be hidden behind another one."""
    make, message = REFUSED[kind]
    optimizer = drive(KINDS[kind], [make()]).optimizer
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@over()
def test_groups_that_share_parameters_are_refused(drive, kind):
    """And those with names beside those without."""
    if kind.closure:
        return
    p, q = (Parameter(torch.randn(2, 3)) for _ in range(2))
    optimizer = drive(kind, [p]).optimizer
    for group, error in (({"params": [p]}, "more than one parameter group"), ({"params": [("q", q)]}, "names")):
        with pytest.raises(ValueError, match=error):
            optimizer.add_param_group(group)
    optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 2
