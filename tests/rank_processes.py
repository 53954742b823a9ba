"""What several processes do side by side for the tests of ranks: meta-trainings that they share."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from problems import Quadratic
from torch import Tensor

from learnedopt import (
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
from learnedopt.core.estimator import GradientEstimator
from learnedopt.core.objective import MetaObjective
from learnedopt.training.tracker import Metrics, NullTracker
from learnedopt.training.trainer import TrainingResult

NUM_TASKS = 5
"""No multiple of 2, 3 or 4: shares differ."""
NUM_META_STEPS = 7
SIZES = (1, 2, 3, 4)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Kind(NamedTuple):
    """A kind of meta-training: with which estimator and objective, and whether the inner objective has a start."""

    estimator: GradientEstimator
    objective: MetaObjective
    starts: bool = False


KINDS: dict[str, Kind] = {
    "unrolled": Kind(Unrolled(4), SumOfLosses()),
    "truncated": Kind(Truncated(3, horizon=9), SumOfLosses()),
    "implicit": Kind(Implicit(60, ConjugateGradient(5)), FinalLoss(), starts=True),
    "es": Kind(EvolutionStrategies(4, num_pairs=3, sigma=0.1), FinalLoss()),
    "pes": Kind(PersistentES(2, horizon=6, num_pairs=4, sigma=0.1), FinalLoss()),
}


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
    family, execution = Quadratic(0.0 if KINDS[kind].starts else 0.3), Execution(dtype=dtype)
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
    options = {"num_tasks": NUM_TASKS, "tracker": Recorder(), **options}
    made = KINDS[kind]
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


class Case(NamedTuple):
    """Something for the first ``size`` processes to do together."""

    name: str
    size: int
    run: Callable[..., Any]
    arguments: tuple[Any, ...]


def side_by_side(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Let as many processes as are needed do all cases; return what each process found, by the name of the case."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    num = max(case.size for case in cases)
    torch.multiprocessing.spawn(work, (cases, folder, store.port), nprocs=num)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"answers{process}.pt") for process in range(num)]


def work(process: int, cases: list[Case], folder: Path, port: int) -> None:
    """Do every case of this process; write what each returned, or the error that it raised, to a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    answers: dict[str, Any] = {}
    for number, case in enumerate(cases):
        if process < case.size:
            dist.init_process_group(
                "gloo", rank=process, world_size=case.size, store=dist.PrefixStore(f"case {number}", store),
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            answers[case.name] = _answer(case)
            gc.collect()  # connections end with what holds them
            dist.destroy_process_group()
            torch.save(answers, folder / f"answers{process}.pt")


def _answer(case: Case) -> Any:
    try:
        return case.run(*case.arguments)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
