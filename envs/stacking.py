"""Networks of one architecture as one function of their stacked weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap

from rlsched.envs.draws import seeded

Buffers = dict[str, Tensor]  # name -> (networks, *shape)


class Stack:
    """The loss and its gradient, for N networks at once.

    The trainable weights of all networks are one matrix (networks, parameters), in the order of `parameters()`; what
    else belongs to a network (buffers, frozen weights) is stacked by name. All networks are computed together through
    `torch.func.vmap`; or, with a warning that says why, one by one, if the module does not allow that.

    Args:
        network: the architecture; its weights are used for a first trial only.
        loss: (outputs, targets) -> 0-d.
        inputs, targets: a mini-batch for that trial, on the device of the training to come.

    Raises:
        ValueError: the loss is not one number per network, or the trainable weights are none or not of float32, or the
            network remembers something outside of its buffers.
    """

    def __init__(
        self, network: nn.Module, loss: Callable[[Any, Tensor], Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
        types = sorted({str(p.dtype) for p in trainable.values()})
        if types != ["torch.float32"]:
            raise ValueError(f"network must have trainable weights, of torch.float32; it has {types or 'none'}")
        self._shapes = {name: p.shape for name, p in trainable.items()}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self.parameters = sum(self._sizes)
        self._tied = len(_named_tensors(network, remove_duplicate=False)) > len(_named_tensors(network))
        self._loss = loss
        still = deepcopy(network).requires_grad_(False).to(inputs.device)
        self._in_training, self._in_evaluation = _Observed(still).train(), _Observed(deepcopy(still)).eval()
        self._changing = tuple(name for name, _ in network.named_buffers())  # the buffers that may change
        self.looped = False
        self._try_out(network, inputs, targets)

    def flatten(self, network: nn.Module, gain: float = 1.0) -> tuple[Tensor, Buffers]:
        """A network's weights (parameters,), its matrices times `gain`; and its buffers and frozen weights."""
        weights = [p.detach() * (gain if p.dim() > 1 else 1) for p in network.parameters() if p.requires_grad]
        frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        return torch.cat([w.flatten() for w in weights]), frozen | dict(network.named_buffers())

    def gradient(
        self, params: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Buffers]:
        """The gradients of `scale` (networks,) times the losses, these losses, and the buffers that have changed."""
        arguments = params, buffers, inputs, targets, scale
        # A stack of one is faster without vmap; but compiled, it is then no longer one graph.
        if self.looped or (len(params) == 1 and not torch.compiler.is_compiling()):
            gradients, losses, changed = zip(*(self._gradient(*each) for each in _each(arguments)), strict=True)
            return (
                torch.stack(gradients),
                torch.stack(losses),
                {n: torch.stack([c[n] for c in changed]) for n in changed[0]},
            )
        gradient, (loss, buffers) = vmap(grad_and_value(self._train, has_aux=True), randomness="different")(*arguments)
        return gradient, loss, buffers

    def evaluate(self, params: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor) -> Tensor:
        """The losses in evaluation mode, (networks,)."""
        arguments = params, buffers, inputs, targets
        if self.looped or len(params) == 1:
            return torch.stack([self._evaluate(*each) for each in _each(arguments)])

        def evaluate(params: Tensor, *rest: Any) -> Tensor:
            # vmap alone refuses recurrent layers, but takes what becomes of them where gradients may be wanted.
            return vjp(lambda params: self._evaluate(params, *rest), params)[0]

        return vmap(evaluate, randomness="different")(*arguments)

    # --- One network ------------------------------------------------------------------------------------------------

    def _train(
        self, params: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor, scale: Tensor
    ) -> tuple[Tensor, Buffers]:
        outputs, after = self._call(self._in_training, params, buffers, inputs)
        return scale * self._loss_of(outputs, targets), {name: after[name] for name in self._changing}

    def _evaluate(self, params: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss_of(self._call(self._in_evaluation, params, buffers, inputs)[0], targets)

    def _gradient(self, params: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Buffers]:
        params = params.detach().requires_grad_()
        loss, changed = self._train(params, *arguments)
        gradient = torch.autograd.grad(loss, params)[0]
        return gradient, loss.detach(), {name: b.detach() for name, b in changed.items()}

    def _call(self, network: nn.Module, params: Tensor, buffers: Buffers, inputs: Tensor) -> tuple[Any, Buffers]:
        pieces = zip(self._shapes.items(), params.split(self._sizes), strict=True)
        weights = {name: piece.view(shape) for (name, shape), piece in pieces}
        own = {name: b.clone() if name in self._changing else b for name, b in buffers.items()}
        state = {f"network.{name}": tensor for name, tensor in (weights | own).items()}
        return functional_call(network, state, (inputs,), tie_weights=self._tied)

    def _loss_of(self, outputs: Any, targets: Tensor) -> Tensor:
        loss = self._loss(outputs, targets)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
            raise ValueError(f"loss must return one number per network, a 0-d tensor; it returned {given}")
        return loss

    def _try_out(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Find out what training changes, and whether the network can be stacked. The user's own errors surface."""
        device = inputs.device
        params, buffers = self.flatten(network.to(device))
        single = params, buffers, inputs, targets, torch.ones((), device=device)
        two: list[Any] = [
            {n: torch.stack([b, b]) for n, b in a.items()} if isinstance(a, dict) else torch.stack([a, a])
            for a in single
        ]
        with seeded(0, device):
            _, loss, after = self._gradient(*single)
            self._evaluate(*single[:-1])
        with seeded(0, device):
            _, again, _ = self._gradient(*single)
        if not torch.allclose(loss, again, rtol=1e-3, equal_nan=True):
            raise ValueError(
                f"network must keep what it remembers in buffers: the same weights, buffers and random numbers of "
                f"torch gave the loss {loss:.6g} and then {again:.6g}"
            )
        may_change = self._changing
        self._changing = tuple(n for n in may_change if not torch.equal(after[n], buffers[n]))
        try:
            with seeded(0, device):
                self.gradient(*two)
                self.evaluate(*two[:-1])
        except Exception as error:
            self.looped, self._changing = True, may_change  # what a branch changes, this trial need not have met
            reason = str(error).strip() or type(error).__name__
            warnings.warn(
                f"the {type(network).__name__} cannot be trained in a stack, so its networks are trained one by "
                f"one, which is slower. The reason: {reason.splitlines()[0]}",
                stacklevel=2,
            )


class _Observed(nn.Module):
    """A network that tells its buffers after the forward pass, be they changed in place or replaced."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> tuple[Any, Buffers]:
        return self.network(inputs), dict(self.network.named_buffers())


def _each(arguments: tuple[Any, ...]) -> Any:
    """The arguments of every network in turn."""
    for i in range(len(arguments[0])):
        yield [{n: b[i] for n, b in a.items()} if isinstance(a, dict) else a[i] for a in arguments]


def _named_tensors(network: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, Tensor]]:
    return [
        *network.named_parameters(remove_duplicate=remove_duplicate),
        *network.named_buffers(remove_duplicate=remove_duplicate),
    ]
