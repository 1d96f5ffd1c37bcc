"""Gradients that are accumulated over several mini-batches, and what becomes of their losses."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class BackwardPasses:
    """Counts the backward passes of a step, to tell a loss that was divided by their number before it was reported."""

    def __init__(self) -> None:
        self.losses_are_quotients = False
        self._passes = 0
        self._watched: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Count the gradients that arrive at the first parameter that gets any."""
        first = next((p for p in parameters if p.requires_grad and p.is_leaf), None)
        if first is not self._watched:
            self.detach()
            this = weakref.ref(self)

            def begin(_: Tensor) -> None:  # the passes before were of a step that nobody took: a GradScaler skips some
                counter = this()
                if counter is not None and counter._watched is not None and counter._watched.grad is None:
                    counter._passes = 0

            def count(_: Tensor) -> None:
                if (counter := this()) is not None:
                    counter._passes += 1

            self._watched = first
            if first is not None:
                self._handles = [first.register_hook(begin), first.register_post_accumulate_grad_hook(count)]

    def parts(self) -> int:
        """The number of parts that the losses of a step were divided into; the next step begins."""
        parts = self._passes if self.losses_are_quotients else 1
        self._passes, self.losses_are_quotients = 0, False
        return max(1, parts)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._watched, self._handles = None, []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watched": None, "_handles": []}
