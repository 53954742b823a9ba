"""Tasks that fail, for the tests of what a training does then."""

from __future__ import annotations

from typing import Any

import torch
from problems import FLOAT, Quadratic
from torch import Tensor

from learnedopt import Tasks


class Failing(Quadratic):
    """``Quadratic`` whose tasks fail by chance: from an inner step of their own on, their targets are NaN.

    Args:
        chance: of a task to fail.
        at: at which inner step it does.
        listed: positions of the tasks that fail, in place of chance.
    """

    def __init__(self, chance: float = 0.2, at: int = 1, listed: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.chance, self.at, self.listed = chance, at, listed

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        tasks = super().sample(num_tasks, generator)
        bad = torch.rand(num_tasks, generator=generator) < self.chance
        if self.listed is not None:
            bad = torch.tensor([i in self.listed for i in range(num_tasks)])
        return {**tasks, "bad": bad, "seed": torch.randint(1000, (num_tasks,), generator=generator)}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        batch = super().batch(tasks, step, split)
        failing = tasks["bad"] & (step >= self.at)
        return {**batch, "c": torch.where(failing[:, None], torch.full((5,), torch.nan, dtype=FLOAT), batch["c"])}


class Steep(Quadratic):
    """``Quadratic`` of which some tasks have a finite loss and no finite gradient from an inner step on."""

    def __init__(self, at: int, listed: tuple[int, ...]) -> None:
        super().__init__()
        self.at, self.listed = at, listed

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        bad = torch.tensor([float(i in self.listed) for i in range(num_tasks)], dtype=FLOAT)
        return {**super().sample(num_tasks, generator), "bad": bad}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return {**super().batch(tasks, step, split), "steep": tasks["bad"] * (step >= self.at)}

    def loss(self, params: Any, batch: Any) -> Tensor:
        # The slope of a square root at 0 is infinite.
        return super().loss(params, batch) + ((1 - batch["steep"]) * params["b"].square().sum()).sqrt()
