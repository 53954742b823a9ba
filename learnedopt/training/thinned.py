"""Trackers that are told less often than every meta-step, and of theta's statistics then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learnedopt.core import tree
from learnedopt.core.tree import Theta
from learnedopt.training.tracker import Metrics, Tracker, Trackers


class Thinned:
    """Tells its sinks of every ``every``-th meta-step, of all that hold a validation, and of the last one.

    A compiled meta-step may take less than a row of W&B. Each row that is told gains ``theta/norm`` and, for each
    tensor of theta after the step, ``theta/<name>/mean`` and ``theta/<name>/std``; and where rows are left out, each
    at a multiple of ``every`` the mean of the ``meta_loss`` since the one before, as ``mean_meta_loss``. Where
    ``every`` is a multiple of the windows of an episode, that is a mean over whole episodes: it has no sawtooth.

    Args:
        sinks: who is told; what is not a row is passed on as it comes, after the last row before it.
        every: meta-steps, at least 1.
    """

    def __init__(self, sinks: Sequence[Tracker], every: int = 1) -> None:
        self.sinks: Trackers = Trackers(sinks)
        self.every: int = every
        self._theta: Theta = {}
        self._left: tuple[Metrics, int] | None = None  # the latest row, where it was not told
        self._losses: list[float] = []

    def start(self, config: dict[str, Any]) -> None:
        """Pass it on."""
        self.sinks.start(config)

    def watch(self, theta: Theta) -> None:
        """Keep theta, to take its statistics when a row is told."""
        self._theta = theta

    def log(self, metrics: Metrics, step: int) -> None:
        """Pass the row on, or keep it until it is known whether it is the last."""
        loss = metrics.get("meta_loss")
        if isinstance(loss, int | float):
            self._losses.append(loss)
        due = step % self.every == 0
        if due and self.every > 1 and self._losses:
            # Not math.fsum, which raises where an inf meets a -inf, or finite losses overflow.
            metrics = {**metrics, "mean_meta_loss": sum(self._losses) / len(self._losses)}
        if due:
            self._losses = []
        if due or "validation" in metrics:
            self._tell(metrics, step)
        else:
            self._left = metrics, step

    def figure(self, name: str, path: Path) -> None:
        """Pass it on."""
        self._tell_last()
        self.sinks.figure(name, path)

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Pass it on."""
        self._tell_last()
        self.sinks.artifact(name, paths, metadata)

    def lines(self, name: str, lines: Mapping[str, Sequence[float]], xname: str) -> None:
        """Pass it on."""
        self._tell_last()
        self.sinks.lines(name, lines, xname)

    def rewind(self, step: int) -> None:
        """Pass it on; what was not told is forgotten."""
        self._left, self._losses = None, []
        self.sinks.rewind(step)

    def finish(self, exit_code: int = 0) -> None:
        """Tell the last row, and the end."""
        self._tell_last()
        self.sinks.finish(exit_code)

    def _tell(self, metrics: Metrics, step: int) -> None:
        self._left = None
        self.sinks.log({**metrics, **statistics(self._theta)}, step)

    def _tell_last(self) -> None:
        if self._left is not None:
            self._tell(*self._left)


def statistics(theta: Theta) -> dict[str, float]:
    """Return the norm of theta, and mean and standard deviation (of the numbers there are) of each tensor.

    They are read from the device at once. What is not finite stays so.
    """
    parts = {name: tensor.detach() for name, tensor in theta.items() if tensor.numel()}
    if not parts:
        return {}
    exact = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts.values()]
    pairs = [torch.stack(torch.std_mean(part, correction=0)).double() for part in exact]
    rows: list[tuple[float, float]] = tree.numbers(torch.stack(pairs))
    squares = (part.numel() * (std**2 + mean**2) for part, (std, mean) in zip(exact, rows, strict=True))
    found = {"theta/norm": math.sqrt(sum(squares))}
    for name, (std, mean) in zip(parts, rows, strict=True):
        found |= {f"theta/{name}/mean": mean, f"theta/{name}/std": std}
    return found
