"""A step captured as a CUDA graph: its kernels are launched in one go, without Python between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core import tree

_WARM_UP = 2  # calls before the capture, in which libraries choose their ways and take their memory


@final
class CapturedStep:
    """``fn(params, state, batch) -> params, state, loss``, played again from a graph of its kernels.

    What it returns but the loss is memory of its own, which the next call overwrites; what it is called with is copied
    there unless it is that already.

    Args:
        fn: neither waits for the GPU nor draws random numbers, and does the same whatever the values.
        params: of the first call, as are the others; only shapes count.
        state: see ``params``.
        batch: see ``params``.

    Raises:
        ValueError: the parameters do not lie on a GPU.
    """

    def __init__(self, fn: Callable[..., tuple[Any, Any, Tensor]], params: Any, state: Any, batch: Any) -> None:
        if not tree.leaves(params)[0].is_cuda:
            raise ValueError(
                "a step can be captured as a CUDA graph only on a GPU; leave the graph out, or pass a device"
            )
        self._fn, self._batch = fn, tree.tree_map(torch.clone, batch)
        self._held = tree.tree_map(torch.clone, (params, state))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                fn(*self._held, self._batch)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._advance()

    def __call__(self, params: Any, state: Any, batch: Any) -> tuple[Any, Any, Tensor]:
        """Return what ``fn`` does."""
        _overwrite(self._held, (params, state))
        _overwrite(self._batch, batch)
        self._graph.replay()
        return *self._held, self._loss.clone()

    def _advance(self) -> Tensor:
        """Take a step in the held memory, and return the loss."""
        *moved, loss = self._fn(*self._held, self._batch)
        # What a rule remembers may be the old parameters themselves, which are about to be overwritten.
        held = {x.untyped_storage().data_ptr() for x in tree.leaves(self._held)}
        kept = [x.clone() if x.untyped_storage().data_ptr() in held else x for x in tree.leaves(tuple(moved))]
        for x, y in zip(tree.leaves(self._held), kept, strict=True):
            x.copy_(y)
        return loss


def _overwrite(held: Any, new: Any) -> None:
    for x, y in zip(tree.leaves(held), tree.leaves(new), strict=True):
        if x is not y:
            x.copy_(y)
