"""Small trainings, and their states read into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt import InnerLoop, MetaTrainer, SumOfLosses, Truncated, optimizers, tasks
from learnedopt.training import progress
from learnedopt.training.result import TrainingDiverged


def trainer(path: Path) -> MetaTrainer:
    """Return a small training whose state is in ``path``; after three meta-steps that has a carry."""
    loop = InnerLoop(tasks.make("quadratic", dim=2), optimizers.make("momentum", learn=("lr",)))

    def halved(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])

    return MetaTrainer(
        loop, Truncated(2, horizon=8), SumOfLosses(), tracker=None, num_tasks=2, checkpoint=path, average=0.3,
        scheduler=halved, config={"meta": {"lr": 0.01}},
    )  # fmt: skip


def trainer_of_before(path: Path) -> MetaTrainer:
    """Return the training whose states in the first format lie in the tests' data, in float64."""
    family = tasks.make("quadratic", dim=2)
    template = {k: p[0] for k, p in family.init_params(family.sample(1, torch.Generator().manual_seed(0))).items()}
    inner = {"name": "momentum", "options": {"lr": 0.005, "learn": ["lr", "momentum"]}}
    loop = InnerLoop(family, optimizers.make("learned-init", template=template, rule=inner))

    def momentum(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, 1e-3, momentum=0.9)

    def halved(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])

    return MetaTrainer(
        loop, Truncated(2, horizon=8), SumOfLosses(), momentum, tracker=None, num_tasks=2, checkpoint=path,
        scheduler=halved,
    )  # fmt: skip


def plain(value: Any) -> Any:
    """Return nested values with tensors as lists, to be compared."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else repr(value)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class State:
    """Reads training states into one training, of which nothing may change where one is refused."""

    def __init__(self, make: Callable[[Path], MetaTrainer] = trainer, dtype: torch.dtype = torch.float32) -> None:
        self._make, self._dtype = make, dtype
        self._begin()

    def _begin(self) -> None:
        with _default(self._dtype):
            self._training = self._make(Path("nowhere"))._describe()
        self._before = self._state()

    def read(self, path: Path) -> Any:
        """Load the state, compare what was refused, and forget what was not."""
        try:
            with _default(self._dtype):
                found = progress.load_progress(path, self._training)
        except ValueError:
            if self._state() != self._before:
                raise AssertionError(f"{path} was refused, and a part of it restored") from None
            raise
        result = plain(found), self._state()
        self._begin()
        self._go_on(path, found.meta_step)
        return result

    def _go_on(self, path: Path, meta_step: int) -> None:
        """Take a meta-step from a state that was not refused, which must not fail for what is in it."""
        try:
            with _default(self._dtype):
                self._make(path).run(meta_step + 1)
        except TrainingDiverged:
            pass  # numbers may be any
        except Exception as error:
            raise AssertionError(f"{path} was restored, and does not go on: {type(error).__name__}: {error}") from error

    def _state(self) -> Any:
        made = self._training
        return plain((made.theta, made.optimizer.state_dict(), made.scheduler.state_dict()))
