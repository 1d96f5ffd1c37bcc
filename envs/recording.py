"""A function of tensors that is recorded once, as the plain operations of torch that it comes to, and then replayed.

`torch.func`, autograd and modules decide anew at every call what they decided before: for a stack of small networks,
that takes longer than the arithmetic. A recording has the same numbers, to the bit.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from rlsched.envs.draws import seeded

CALLS = 200  # before a function is recorded, which takes as long as a hundred calls and saves a third of each later one


class Recorded:
    """A function of tensors that is called over and over with tensors of the same few shapes.

    What it does must depend on nothing but the shapes and on what is no tensor: there is a recording for each of these.
    A function that draws from the random numbers of Python or NumPy is called as it is, and so is one that cannot be
    recorded, with a warning that says why.

    Args:
        function: of tensors and other values, and of tuples and dictionaries of them; it may change tensors in place.
        compile: compile the recordings with `torch.compile`, at their first call.
    """

    def __init__(self, function: Callable[..., Any], *, compile: bool = False) -> None:
        self._function, self._compile = function, compile
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = structure, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        replay = self._recordings.get(key)
        if replay is None:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= CALLS and not self._compile:
                return self._function(*arguments)
            replay = self._recordings[key] = self._record(leaves, structure)
        return replay(tensors)

    def _record(self, leaves: list[Any], structure: TreeSpec) -> Callable[[list[Tensor]], Any]:
        form: list[TreeSpec] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            arguments = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], structure)
            results, shape = tree_flatten(self._function(*arguments))
            form.append(shape)
            return results

        def as_it_is(tensors: list[Tensor]) -> Any:
            results = flat(*tensors)
            return tree_unflatten(results, form.pop())

        before = _other_random_numbers()
        copies = [x.clone() for x in leaves if isinstance(x, Tensor)]  # recording calls the function
        try:
            with seeded(0, copies[0].device):
                graph = make_fx(flat)(*copies)
                with torch.no_grad():
                    graph(*copies)  # an LSTM's operations are recorded, and cannot be called like this
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"inner steps cannot be recorded, which is slower. The reason: {reason}", stacklevel=2)
            return as_it_is
        if _other_random_numbers() != before:
            return as_it_is
        _simplify(graph)
        results = form.pop()
        replay = _compiled(graph) if self._compile else graph

        @torch.no_grad()
        def replayed(tensors: list[Tensor]) -> Any:
            return tree_unflatten(replay(*tensors), results)

        return replayed


def _simplify(graph: GraphModule) -> None:
    """Leave out what changes nothing: a third of all operations of a stack are views of a tensor as itself."""
    aten = torch.ops.aten
    views = aten.view.default, aten._unsafe_view.default, aten.expand.default
    for node in graph.graph.nodes:
        if node.target in views and node.meta["val"].shape == node.args[0].meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _other_random_numbers() -> Hashable:
    """Where the random numbers are that do not come from torch."""
    _, key, *rest = np.random.get_state()
    return random.getstate(), np.asarray(key).tobytes(), *rest


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with graphs of its own: those that tasks share are searched one by one, and end at eight."""
    isolated: dict[str, Any] = (
        {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    )
    return torch.compile(function, dynamic=False, **isolated)
