"""What several processes do side by side for the tests of ranks: meta-trainings that they share."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from bad_tasks import Failing
from problems import Quadratic, join
from pytest import MonkeyPatch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

import train_meta
from learnedopt import (
    Combined,
    ConjugateGradient,
    EvolutionStrategies,
    Execution,
    FinalLoss,
    Implicit,
    InnerLoop,
    MetaTrainer,
    PersistentES,
    Proximal,
    SumOfLosses,
    Truncated,
    Unrolled,
    Validation,
)
from learnedopt import optimizers as rules
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.core.objective import MetaObjective, OfLosses
from learnedopt.core.tree import Params, Theta
from learnedopt.training import launch
from learnedopt.training.ranks import present
from learnedopt.training.tracker import Metrics, NullTracker
from learnedopt.training.trainer import TrainingDiverged, TrainingResult

NUM_TASKS = 5
"""No multiple of 2, 3 or 4: shares differ."""
NUM_META_STEPS = 4
SIZES = (1, 2, 3, 4)
PATIENCE = 4.0
"""Seconds that the others wait for one that does not come: longer than a busy machine makes any other wait."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Bowl(Quadratic):
    """``(x - c)'H(x - c)/2``: small where it is low, so that differences of it mean something in float32 too."""

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Return one task's."""
        away = join(params) - batch["c"]
        return 0.5 * away @ (batch["hessian"] @ away)


class Kind(NamedTuple):
    """A kind of meta-training.

    ``starts``: whether what is learned is a start. ``fails``: whether some tasks do.
    """

    estimator: GradientEstimator
    objective: MetaObjective
    starts: bool = False
    fails: bool = False
    num_tasks: int = NUM_TASKS


@dataclass(frozen=True)
class Below(OfLosses):
    """The loss at the end, which is not finite above a limit: of each perturbed theta for itself."""

    limit: float
    split = "valid"

    def of_losses(self, before: Tensor, end: Tensor) -> Tensor:
        """Return the last one."""
        return torch.where(end > self.limit, torch.nan, end)


KINDS: dict[str, Kind] = {
    "unrolled": Kind(Unrolled(4), SumOfLosses()),
    "truncated": Kind(Truncated(3, horizon=9), SumOfLosses()),
    "implicit": Kind(Implicit(60, ConjugateGradient(5)), FinalLoss(), starts=True),
    "es": Kind(EvolutionStrategies(4, num_pairs=3, sigma=0.5), FinalLoss()),
    "pes": Kind(PersistentES(2, horizon=6, num_pairs=4, sigma=0.5), FinalLoss()),
    "es of one task": Kind(EvolutionStrategies(4, num_pairs=3, sigma=0.5), FinalLoss(), num_tasks=1),
    "es in windows": Kind(EvolutionStrategies(2, num_pairs=4, sigma=0.5, horizon=6), FinalLoss(), num_tasks=1),
    "pes of one task": Kind(PersistentES(2, horizon=6, num_pairs=4, sigma=0.5), FinalLoss(), num_tasks=1),
    "pes of two tasks": Kind(PersistentES(2, horizon=6, num_pairs=4, sigma=0.5), FinalLoss(), num_tasks=2),
    "es, high": Kind(EvolutionStrategies(4, num_pairs=3, sigma=0.5), Below(9.0), num_tasks=1),
    "pes, high": Kind(PersistentES(2, horizon=6, num_pairs=3, sigma=0.5), Below(6.5), num_tasks=1),
    "es, failing": Kind(EvolutionStrategies(2, 4, 0.5, horizon=6), FinalLoss(), fails=True, num_tasks=3),
    "failing": Kind(Truncated(3, horizon=9), SumOfLosses(), fails=True),
    "failing pes": Kind(PersistentES(3, horizon=6, num_pairs=1, sigma=0.5), SumOfLosses(), fails=True),
}
"""Of those that fail a task does in the second window: with four ranks, all that one has. With PES, whose episodes have
no end, it is back in the third. Of the high ones, some pairs are not finite at some meta-steps, and all at others."""


class Recorder(NullTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, metrics: Metrics, step: int) -> None:
        """Keep a row."""
        self.rows.append({**metrics, "step": step})


class Remembering(torch.optim.SGD):
    """Keeps the gradients that it is handed."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.grads: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        """Keep them, and take a step."""
        self.grads.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return super().step(closure)


def loop_of(kind: str, dtype: torch.dtype) -> InnerLoop:
    """Return the inner loop of a kind of training."""
    family, execution = Bowl(0.0 if KINDS[kind].starts else 0.3), Execution(dtype=dtype, vet=False)
    if KINDS[kind].fails:
        family = Failing(at=4, listed=(2,))
    if not KINDS[kind].starts:
        return InnerLoop(family, rules.make("lstm", hidden_size=3, num_layers=1), execution)
    params = family.init_params(family.sample(1, torch.Generator().manual_seed(0)))
    template = {k: v[0].to(dtype) for k, v in params.items()}
    rule = rules.make("maml", template=template, lr=0.3)
    return InnerLoop(family, rule, execution, Proximal(template, 1.0))


def trainer_of(kind: str, dtype: str, **options: Any) -> MetaTrainer:
    """Return a meta-training of a kind that remembers its meta-gradients."""
    loop = loop_of(kind, DTYPES[dtype])
    theta = {k: v.to(DTYPES[dtype]) for k, v in loop.init_theta(torch.Generator().manual_seed(1)).items()}
    made = KINDS[kind]
    options = {"num_tasks": made.num_tasks, "tracker": Recorder(), **options}
    return MetaTrainer(
        loop, made.estimator, made.objective, lambda params: Remembering(params, 0.01), theta=theta, **options
    )


def validated(kind: str, dtype: str) -> Validation:
    """Return a validation of three tasks, fewer than there are ranks."""
    return Validation(loop_of(kind, DTYPES[dtype]), FinalLoss(), 4, num_tasks=3, every=2)


def trained(kind: str, dtype: str) -> dict[str, Any]:
    """Return the meta-gradients of a short training, and what it ends with."""
    trainer = trainer_of(kind, dtype, validation=validated(kind, dtype))
    return outcome(trainer, trainer.run(NUM_META_STEPS))


def outcome(trainer: MetaTrainer, result: TrainingResult) -> dict[str, Any]:
    """Return what a training has come to."""
    (told,) = trainer.tracker.sinks
    assert isinstance(trainer.meta_optimizer, Remembering)
    return {
        "grads": torch.stack(trainer.meta_optimizer.grads),
        "theta": torch.cat([v.flatten() for v in result.theta.values()]),
        "best": result.best_value,
        "rows": getattr(told, "rows", []),
    }


def stopped(folder: Path, number: int, at: int) -> dict[str, Any]:
    """Return where a training ends, or goes on and ends, of which one rank alone is asked to stop, and how."""
    trainer = trainer_of("truncated", "float64", checkpoint=folder / "stopped.pt")
    trainer.estimator = At(trainer.estimator, at, lambda: os.kill(os.getpid(), number))
    try:
        trainer.run(NUM_META_STEPS)
    except (KeyboardInterrupt, SystemExit) as stop:
        return {"how": repr(stop), "step": trainer.progress.meta_step, "saved": (folder / "stopped.pt").exists()}
    return {}


def goes_on(kind: str, path: Path, num_meta_steps: int, **options: Any) -> dict[str, Any]:
    """Return where a training comes to that goes on from a checkpoint, or begins one."""
    trainer = trainer_of(kind, "float64", checkpoint=path, checkpoint_every=2, **options)
    if path.name == "stopped.pt":
        trainer.estimator = At(trainer.estimator, 0, lambda: None)
    return outcome(trainer, trainer.run(num_meta_steps))


def one_fails() -> None:
    """Train where one rank's third estimate raises an error."""
    _train_with(lambda: _raise(ValueError("its data are gone")))


def one_sleeps() -> None:
    """Train where one rank's third estimate takes longer than the others wait."""
    _train_with(lambda: time.sleep(2 * PATIENCE), timeout=PATIENCE)


def one_dies() -> None:
    """Train where one rank's third estimate ends its process."""
    _train_with(lambda: os.kill(os.getpid(), signal.SIGKILL))


def _raise(error: Exception) -> None:
    raise error


def _train_with(act: Callable[[], Any], **options: Any) -> None:
    trainer = trainer_of("truncated", "float64", ranks=present(**options))
    trainer.estimator = At(trainer.estimator, 3, act)
    trainer.run(NUM_META_STEPS)


class At(GradientEstimator):
    """An estimator which lets the last rank act before one of its estimates."""

    def __init__(self, inner: GradientEstimator, number: int, act: Callable[[], Any]) -> None:
        self._inner, self._left, self._act = inner, number, act

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
        """Act, where it is time, and estimate."""
        self._left -= 1
        if self._left == 0 and dist.get_rank() == dist.get_world_size() - 1:
            self._act()
        return self._inner.estimate(loop, theta, objective, carry)

    def start(self, *arguments: Any) -> Any:
        """See the estimator."""
        return self._inner.start(*arguments)

    def count_tasks(self, carry: Any) -> int:
        """See the estimator."""
        return self._inner.count_tasks(carry)

    def narrow(self, carry: Any, start: int, stop: int) -> Any:
        """See the estimator."""
        return self._inner.narrow(carry, start, stop)

    def join(self, carries: Any) -> Any:
        """See the estimator."""
        return self._inner.join(carries)


def differing(how: str) -> None:
    """Train where the last rank is another one."""
    last = dist.get_rank() == dist.get_world_size() - 1
    kind = "unrolled" if how == "estimator" and last else "truncated"
    options = {"seed": 5} if how == "seed" and last else {}
    if how == "recipe":
        options = {"config": {"meta": {"lr": 0.1 if last else 0.2}}}
    with MonkeyPatch.context() as patch:
        if how == "torch" and last:
            patch.setattr(torch, "__version__", "1.0")
        trainer = trainer_of(kind, "float64", **options)
        if how == "rule" and last:
            trainer.loop = replace(trainer.loop, rule=rules.Clip(trainer.loop.rule, 1.0))
        trainer.run(NUM_META_STEPS)


def more_than_tasks() -> None:
    """Train on fewer tasks than there are ranks."""
    trainer_of("truncated", "float64", num_tasks=dist.get_world_size() - 1).run(1)


def more_than_pairs() -> None:
    """Train on fewer perturbation pairs than there are ranks."""
    trainer_of("es of one task", "float64").run(1)


def of_ranks_of_pairs() -> None:
    """Train on one task by an estimator which ranks its pairs."""
    trainer = trainer_of("es of one task", "float64")
    trainer.estimator = EvolutionStrategies(4, num_pairs=3, sigma=0.5, ranked=True)
    trainer.run(1)


def of_no_shares(path: Path | None = None) -> None:
    """Train by an estimator that knows no shares, maybe from one process's checkpoint."""
    combined = Combined(Unrolled(4), EvolutionStrategies(4, num_pairs=2, sigma=0.1))
    loop = loop_of("unrolled", torch.float64)
    theta = {k: v.double() for k, v in loop.init_theta(torch.Generator().manual_seed(1)).items()}
    MetaTrainer(loop, combined, FinalLoss(), tracker=None, theta=theta, num_tasks=5, checkpoint=path).run(
        1 if dist.get_world_size() == 1 else 2
    )


def diverging() -> int:
    """Return after how many meta-steps a training ends whose theta is not finite."""
    trainer = trainer_of("truncated", "float64", max_skips_in_a_row=2)
    with torch.no_grad():
        next(iter(trainer.theta.values())).fill_(torch.inf)
    try:
        trainer.run(NUM_META_STEPS)
    except TrainingDiverged:
        return trainer.progress.meta_step
    return -1


def joins(backend: str | None, device: str | None, timeout: float = 30.0, late: bool = False) -> int:
    """Return how many processes a launcher's group has; the last one may never come to it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store.set("port", str(free.getsockname()[1]))
    told = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.get("port").decode()}
    dist.destroy_process_group()
    os.environ.update({k: str(v) for k, v in told.items()})
    try:
        if late and rank == size - 1:
            return 0
        with launch.process_group(device, backend, timeout):
            return present(timeout=timeout).size
    finally:
        for key in told:
            del os.environ[key]


def commanded(arguments: list[str]) -> tuple[int, str]:
    """Return what the command that meta-trains returns and prints in this process."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(out):
        code = train_meta.main(arguments)
    return code, out.getvalue()


class Case(NamedTuple):
    """Something for the first ``size`` processes to do together."""

    name: str
    size: int
    run: Callable[..., Any]
    arguments: tuple[Any, ...]


def side_by_side(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Let as many processes as are needed do all cases; return what each process found, by the name of the case."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, num = multiprocessing.get_context("spawn"), max(case.size for case in cases)
    started = [context.Process(target=work, args=(process, cases, folder, store.port)) for process in range(num)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [torch.load(folder / f"answers{process}.pt") for process in range(num)]


def work(process: int, cases: list[Case], folder: Path, port: int) -> None:
    """Do every case of this process; write what each returned, or the error that it raised, to a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = TCPStore("127.0.0.1", port, is_master=False)
    answers: dict[str, Any] = {}
    torch.save(answers, folder / f"answers{process}.pt")
    for number, case in enumerate(cases):
        if process < case.size:
            dist.init_process_group(
                "gloo", rank=process, world_size=case.size, store=PrefixStore(f"case {number}", store),
                timeout=timedelta(seconds=300),
            )  # fmt: skip
            answers[case.name] = _answer(case)
            gc.collect()  # connections end with what holds them
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.save(answers, folder / f"answers{process}.pt")


def _answer(case: Case) -> Any:
    try:
        return case.run(*case.arguments)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
