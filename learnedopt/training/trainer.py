"""The outer loop: theta follows meta-gradients, with validation, checkpoints and an exact resume."""

from __future__ import annotations

import inspect
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.checks import require_count
from learnedopt.core.estimator import Estimate, GradientEstimator, as_leaves, call_objective, check_objective
from learnedopt.core.inner import InnerLoop, InnerSolver, solve_inner
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.training.progress import Progress, load_progress, require_loadable, save_progress
from learnedopt.training.tracker import NullTracker, Tracker, Trackers

VALIDATION = -1
"""The episode that validation tasks count as: none that training ever reaches."""


def task_generator(seed: int, episode: int) -> torch.Generator:
    """Return the generator that an episode's tasks are drawn with."""
    # Torch's CPU generator reads the low 32 bits of a seed only: both numbers must be mixed into these.
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + episode) % 2**32)


class TrainingDiverged(RuntimeError):
    """Too many meta-gradients in a row were not finite."""


@dataclass(frozen=True)
class Validation:
    """How good theta is on tasks that it is not trained on; the same tasks every time.

    Args:
        loop: the inner loop of held-out tasks, such as a family with ``meta_split="valid"``.
        objective: what is measured, a mean over tasks; lower is better.
        num_steps: inner steps from a fresh start.
        num_tasks: how many tasks.
        every: meta-steps between two validations.
        seed: which tasks; not those of a training of the same seed.
        inner: solves the inner problem in place of the rule's own steps, as in ``Implicit``; the objective then reads
            the end alone.
    """

    loop: InnerLoop
    objective: MetaObjective
    num_steps: int
    num_tasks: int = 16
    every: int = 100
    seed: int = 0
    inner: InnerSolver | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_tasks", "every"):
            require_count(name, getattr(self, name), least=0 if name == "num_steps" else 1)
        _require_seed(self.seed)

    def vet(self, theta: Theta) -> None:
        """Raise what ``measure`` would raise on bad input, by measuring two tasks at most."""
        replace(self, num_tasks=min(self.num_tasks, 2)).measure(theta)

    def measure(self, theta: Theta) -> float:
        """Return the objective on the held-out tasks, without a graph."""
        tasks = self.loop.family.sample(self.num_tasks, task_generator(self.seed, VALIDATION))
        theta = tree.detach(theta)
        carry = self.loop.begin(theta, self.loop.start(tasks))
        if self.inner is not None:
            check_objective(self.loop, theta, self.objective, carry, self.num_steps, end_only=True)
        rollout = solve_inner(self.loop, theta, carry, self.num_steps, self.inner)
        return float(call_objective(self.objective, self.loop, theta, rollout)[0])


class TrainingResult(NamedTuple):
    """What a meta-training ends with: the last theta, the best by validation (the last without one), and counts."""

    theta: Theta
    best_theta: Theta
    best_value: float
    meta_step: int
    num_skipped: int


@dataclass(kw_only=True)
class _Options:
    """Settings of ``MetaTrainer`` that most runs leave as they are."""

    num_tasks: int = 1
    seed: int = 0
    theta: Theta | None = None
    max_grad_norm: float | None = None
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    validation: Validation | None = None
    checkpoint: Path | str | None = None
    checkpoint_every: int = 100
    max_skips_in_a_row: int = 10
    config: dict[str, Any] = field(default_factory=dict)
    report: Callable[[TrainingResult, Tracker], None] | None = None

    def __post_init__(self) -> None:
        for name in ("num_tasks", "checkpoint_every", "max_skips_in_a_row"):
            require_count(name, getattr(self, name), least=1)
        _require_seed(self.seed)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm!r} must be positive; None leaves gradients as they are"
            )


class MetaTrainer:
    """Trains the meta-parameters of ``loop.rule``.

    Each meta-step estimates a meta-gradient on a batch of tasks and lets ``meta_optimizer`` move theta. Where the
    estimator returns a carry, the next meta-step goes on from it; otherwise fresh tasks are drawn. A meta-gradient that
    is not finite is skipped and counted, and its episode is dropped.

    Args:
        loop: family, rule and execution.
        estimator: how the meta-gradient is found.
        objective: what is minimised.
        meta_optimizer: makes any ``torch.optim.Optimizer`` from a list of tensors; default Adam at 1e-3.
        tracker: what is told about the run. A failure of it is reported by ``logging`` and stops nothing.
        num_tasks: tasks a meta-batch.
        seed: of theta's initialisation and of the tasks; the engine reads no global randomness.
        theta: where to start instead of the rule's own initialisation.
        max_grad_norm: the meta-gradient is scaled down to this norm where it is longer.
        scheduler: makes a learning-rate scheduler from the meta-optimizer; stepped after each of its steps.
        validation: held-out tasks; the theta with the lowest value is kept.
        checkpoint: file of the training state. Where it exists, ``run`` goes on from it, bitwise as if it had never
            stopped (same machine and execution).
        checkpoint_every: meta-steps between two checkpoints.
        max_skips_in_a_row: after so many non-finite meta-gradients in a row ``TrainingDiverged`` is raised.
        config: what the tracker is told about the run at its start.
        report: called with the result and the tracker when all meta-steps are done, for figures and artifacts: after
            it the tracker is finished.

    Raises:
        TypeError, ValueError: an option is out of its range; the rule has no meta-parameters; the meta-optimizer or the
            scheduler needs more at a step than a step, as LBFGS does, or cannot be kept in a checkpoint.

    Example:
        >>> trainer = MetaTrainer(loop, Truncated(20, horizon=100), SumOfLosses(), num_tasks=128)
        >>> result = trainer.run(num_meta_steps=1000)
        >>> learnedopt.save("my-optimizer", loop.rule, result.best_theta)
    """

    def __init__(
        self,
        loop: InnerLoop,
        estimator: GradientEstimator,
        objective: MetaObjective,
        meta_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda params: torch.optim.Adam(params, 1e-3),
        tracker: Tracker | None = None,
        **options: Any,
    ) -> None:
        self.loop, self.estimator, self.objective = loop, estimator, objective
        unknown = sorted(options.keys() - {f.name for f in fields(_Options)})
        if unknown:
            raise TypeError(
                f"MetaTrainer has no option {unknown}; its options are {[f.name for f in fields(_Options)]}"
            )
        self.options = _Options(**options)
        self._checkpoint = None if self.options.checkpoint is None else Path(self.options.checkpoint)
        self.tracker = tracker if isinstance(tracker, Trackers) else Trackers([tracker or NullTracker()])
        theta = self.options.theta
        if theta is None:
            theta = loop.init_theta(torch.Generator().manual_seed(self.options.seed))
        self.theta: Theta = as_leaves(
            {k: v.detach().clone().to(loop.execution.device or v.device) for k, v in theta.items()}
        )
        self.meta_optimizer = meta_optimizer(list(self.theta.values()))
        _require_plain_step(self.meta_optimizer)
        self.scheduler = self.options.scheduler(self.meta_optimizer) if self.options.scheduler else None
        if self.scheduler is not None:
            _require_plain_step(self.scheduler)
        if self.options.checkpoint is not None:
            require_loadable(self.meta_optimizer, self.scheduler)
        self.progress = Progress()

    def run(self, num_meta_steps: int) -> TrainingResult:
        """Train until meta-step ``num_meta_steps`` of the run, counted from its very beginning.

        Ctrl-C and SIGTERM end it after the meta-step in progress, with a checkpoint: KeyboardInterrupt or SystemExit
        (143) is raised then. A second Ctrl-C does not wait.

        Raises:
            TrainingDiverged: too many non-finite meta-gradients in a row.
            ValueError: bad input, before the first inner step; or a checkpoint of another run.
        """
        require_count("num_meta_steps", num_meta_steps)
        if self.options.validation is not None:
            self.options.validation.vet(self.theta)  # now, as the first validation may be hours away
        self._resume()
        exit_code = 1
        with _Interrupts() as interrupts:
            try:
                self.tracker.start(self.options.config)
                while interrupts.number is None and self.progress.meta_step < num_meta_steps:
                    self._meta_step()
                    if self.progress.meta_step % self.options.checkpoint_every == 0:
                        self._save()
                self._save()
                interrupts.deliver()
                result = self._result()
                if self.options.report is not None:
                    self.options.report(result, self.tracker)
                exit_code = 0
            except (KeyboardInterrupt, SystemExit):
                exit_code = 128 + (interrupts.number or signal.SIGINT)
                raise
            finally:
                self.tracker.finish(exit_code)
        return result

    def _meta_step(self) -> None:
        progress, began = self.progress, time.perf_counter()
        carry = progress.carry or self._fresh_carry()
        # From here on the episode counts as begun, and its carry comes back only with a finite meta-gradient.
        progress.carry = None
        estimate = self.estimator.estimate(self.loop, self.theta, self.objective, carry)
        norm = math.sqrt(sum(float(g.square().sum()) for g in estimate.grads.values()))
        progress.meta_step += 1
        if math.isfinite(norm) and math.isfinite(float(estimate.loss)):
            self._apply(estimate, norm)
            progress.carry, progress.skips_in_a_row = estimate.carry, 0
        else:
            progress.num_skipped, progress.skips_in_a_row = progress.num_skipped + 1, progress.skips_in_a_row + 1
        metrics = {
            "meta_loss": float(estimate.loss),
            "grad_norm": norm,
            "step_ms": 1e3 * (time.perf_counter() - began),
            "skipped": progress.num_skipped,
            "inner_loss": estimate.info["losses"].tolist() if "losses" in estimate.info else [],
        }
        metrics.update({k: v for k, v in estimate.info.items() if isinstance(v, (int, float))})
        self.tracker.log({**metrics, **self._validate()}, progress.meta_step)
        self._require_progress()

    def _fresh_carry(self) -> Carry:
        # Every episode has a generator of its own, so that a resumed run needs no random state but this count.
        generator = task_generator(self.options.seed, self.progress.episode)
        self.progress.episode += 1
        tasks = self.loop.family.sample(self.options.num_tasks, generator)
        return self.estimator.start(self.loop, tree.detach(self.theta), tasks, generator)

    def _apply(self, estimate: Estimate, norm: float) -> None:
        limit = self.options.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / norm
        for k, p in self.theta.items():
            p.grad = estimate.grads[k] * scale
        self.meta_optimizer.step()
        if self.scheduler:
            self.scheduler.step()

    def _validate(self) -> dict[str, float]:
        validation, progress = self.options.validation, self.progress
        if validation is None or progress.meta_step % validation.every:
            return {}
        value = validation.measure(tree.detach(self.theta))
        if value < progress.best_value:
            progress.best_value = value
            progress.best_theta = {k: v.detach().clone() for k, v in self.theta.items()}
        return {"validation": value, "best_validation": progress.best_value}

    def _require_progress(self) -> None:
        if self.progress.skips_in_a_row < self.options.max_skips_in_a_row:
            return
        self._save()
        raise TrainingDiverged(
            f"{self.progress.skips_in_a_row} meta-gradients in a row were not finite (meta-step "
            f"{self.progress.meta_step}, {self.progress.num_skipped} skipped in all): theta cannot move. Lower the "
            "meta-learning rate, set max_grad_norm, or shorten the unroll"
        )

    def _result(self) -> TrainingResult:
        last = {k: v.detach().clone() for k, v in self.theta.items()}
        progress = self.progress
        return TrainingResult(
            last, progress.best_theta or last, progress.best_value, progress.meta_step, progress.num_skipped
        )

    def _save(self) -> None:
        path = self._checkpoint
        if path is not None:
            save_progress(path, self.progress, self.theta, self.meta_optimizer, self.scheduler, self._identity())

    def _resume(self) -> None:
        path = self._checkpoint
        if path is not None and path.exists():
            self.progress = load_progress(
                path, self.theta, self.meta_optimizer, self.scheduler, self._identity(), self._example_carry
            )
        # Also at step 0: a run may have been killed before its first checkpoint.
        self.tracker.rewind(self.progress.meta_step)

    def _identity(self) -> dict[str, Any]:
        """Return what tells a checkpoint of another training where no shape does."""
        parts = {
            "family": self.loop.family,
            "rule": self.loop.rule,
            "estimator": self.estimator,
            "meta_optimizer": self.meta_optimizer,
            "scheduler": self.scheduler,
        }
        names = {k: type(part).__name__ for k, part in parts.items()}
        return {**names, "num_tasks": self.options.num_tasks, "seed": self.options.seed}

    def _example_carry(self) -> Carry:
        generator, theta = torch.Generator().manual_seed(0), tree.detach(self.theta)
        tasks = self.loop.family.sample(self.options.num_tasks, generator)
        return self.loop.begin(theta, self.estimator.start(self.loop, theta, tasks, generator))


class _Interrupts:
    """Notes Ctrl-C and SIGTERM in ``number`` instead of tearing a meta-step; a second one is raised at once.

    Only the main thread may do so: elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._waiting = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed by Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def deliver(self) -> None:
        """Raise what has been noted, and whatever comes from now on at once."""
        self._waiting = False
        if self.number is not None:
            raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(128 + self.number)

    def _note(self, number: int, frame: Any) -> None:
        at_once = not self._waiting or self.number is not None
        self.number = int(number)
        if at_once:
            self.deliver()


def _require_seed(seed: int) -> None:
    require_count("seed", seed)
    if seed >= 2**32:
        raise ValueError(f"seed={seed!r} is too large: of a seed torch's generators read 32 bits; pass one below 2**32")


def _require_plain_step(thing: Any) -> None:
    """Refuse what cannot be stepped by ``step()`` alone: closures and metrics are not at hand."""
    needed = [k for k, p in inspect.signature(thing.step).parameters.items() if p.default is p.empty]
    if needed:
        raise ValueError(
            f"{type(thing).__name__}.step needs {', '.join(needed)}, which meta-training cannot give; choose another, "
            "such as torch.optim.Adam or CosineAnnealingLR"
        )
