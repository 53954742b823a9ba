"""The outer loop: theta follows meta-gradients, with validation, checkpoints and an exact resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt import tree
from learnedopt.estimator import MetaGrad, MetaGradient, call_objective
from learnedopt.inner import Carry, InnerLoop, Tape, require_count
from learnedopt.objective import MetaObjective
from learnedopt.progress import Progress, load_progress, save_progress
from learnedopt.tracker import NullTracker, Rewindable, Tracker
from learnedopt.tree import Theta


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
        seed: which tasks.
    """

    loop: InnerLoop
    objective: MetaObjective
    num_steps: int
    num_tasks: int = 16
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_tasks", "every"):
            require_count(name, getattr(self, name), least=0 if name == "num_steps" else 1)

    def measure(self, theta: Theta) -> float:
        """Return the objective on the held-out tasks, without a graph."""
        tasks = self.loop.family.sample(self.num_tasks, torch.Generator().manual_seed(self.seed))
        rollout = self.loop.run(theta, self.loop.start(tasks), self.num_steps, Tape.NONE)
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
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    max_skips_in_a_row: int = 10
    config: dict[str, Any] = field(default_factory=dict)
    report: Callable[[TrainingResult, Tracker], None] | None = None

    def __post_init__(self) -> None:
        for name in ("num_tasks", "checkpoint_every", "max_skips_in_a_row"):
            require_count(name, getattr(self, name), least=1)
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
        tracker: what is told about the run.
        num_tasks: tasks a meta-batch.
        seed: of theta's initialisation and of the tasks; the engine reads no global randomness.
        theta: where to start instead of the rule's own initialisation.
        max_grad_norm: the meta-gradient is scaled down to this norm where it is longer.
        scheduler: makes a learning-rate scheduler from the meta-optimizer; stepped once a meta-step.
        validation: held-out tasks; the theta with the lowest value is kept.
        checkpoint: file of the training state. Where it exists, ``run`` goes on from it, bitwise as if it had never
            stopped (same machine and execution).
        checkpoint_every: meta-steps between two checkpoints.
        max_skips_in_a_row: after so many non-finite meta-gradients in a row ``TrainingDiverged`` is raised.
        config: what the tracker is told about the run at its start.
        report: called with the result and the tracker when all meta-steps are done, for figures and artifacts: after
            it the tracker is finished.

    Example:
        >>> trainer = MetaTrainer(loop, Truncated(20, horizon=100), SumOfLosses(), num_tasks=128)
        >>> result = trainer.run(num_meta_steps=1000)
        >>> learnedopt.save("my-optimizer", loop.rule, result.best_theta)
    """

    def __init__(
        self,
        loop: InnerLoop,
        estimator: MetaGradient,
        objective: MetaObjective,
        meta_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda params: torch.optim.Adam(params, 1e-3),
        tracker: Tracker | None = None,
        **options: Any,
    ) -> None:
        self.loop, self.estimator, self.objective = loop, estimator, objective
        self.options = _Options(**options)
        self.tracker = tracker or NullTracker()
        theta = self.options.theta or loop.rule.init_theta(torch.Generator().manual_seed(self.options.seed))
        self.theta: Theta = {
            k: v.detach().clone().to(loop.execution.device or v.device).requires_grad_() for k, v in theta.items()
        }
        self.meta_optimizer = meta_optimizer(list(self.theta.values()))
        self.scheduler = self.options.scheduler(self.meta_optimizer) if self.options.scheduler else None
        self.progress = Progress()
        self._stop_signal: int | None = None

    def run(self, num_meta_steps: int) -> TrainingResult:
        """Train until meta-step ``num_meta_steps`` of the run, counted from its very beginning.

        Ctrl-C and SIGTERM end it after the meta-step in progress, with a checkpoint: KeyboardInterrupt or SystemExit
        (143) is raised then. A second Ctrl-C does not wait.

        Raises:
            TrainingDiverged: too many non-finite meta-gradients in a row.
            ValueError: bad input, before the first inner step; or a checkpoint of another run.
        """
        require_count("num_meta_steps", num_meta_steps)
        self._resume()
        self.tracker.start(self.options.config)
        exit_code = 1
        try:
            with self._signals():
                while self.progress.meta_step < num_meta_steps:
                    self._meta_step()
                    stopping = self._stop_signal is not None
                    if stopping or self.progress.meta_step % self.options.checkpoint_every == 0:
                        self._save()
                    if stopping:
                        exit_code = 128 + int(self._stop_signal or 0)
                        raise KeyboardInterrupt if self._stop_signal == signal.SIGINT else SystemExit(exit_code)
            self._save()
            result = self._result()
            if self.options.report is not None:
                self.options.report(result, self.tracker)
            exit_code = 0
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
        if self.scheduler:
            self.scheduler.step()
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
        generator = torch.Generator().manual_seed((self.options.seed << 32) + self.progress.episode)
        self.progress.episode += 1
        tasks = self.loop.family.sample(self.options.num_tasks, generator)
        return self.estimator.start(self.loop, tasks, generator)

    def _apply(self, estimate: MetaGrad, norm: float) -> None:
        limit = self.options.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / norm
        for k, p in self.theta.items():
            p.grad = estimate.grads[k] * scale
        self.meta_optimizer.step()

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
        if self.options.checkpoint is not None:
            save_progress(self.options.checkpoint, self.progress, self.theta, self.meta_optimizer, self.scheduler)

    def _resume(self) -> None:
        path = self.options.checkpoint
        if path is not None and path.exists():
            self.progress = load_progress(path, self.theta, self.meta_optimizer, self.scheduler, self._example_carry)
        if isinstance(self.tracker, Rewindable):
            # Also at step 0: a run may have been killed before its first checkpoint.
            self.tracker.rewind(self.progress.meta_step)

    def _example_carry(self) -> Carry:
        tasks = self.loop.family.sample(self.options.num_tasks, torch.Generator().manual_seed(0))
        return self.loop.begin(tree.detach(self.theta), self.estimator.start(self.loop, tasks))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note Ctrl-C and SIGTERM instead of being torn out of a meta-step; only the main thread may do so."""

        def note(number: int, frame: Any) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number

        self._stop_signal = None
        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, which keeps its own handlers
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
