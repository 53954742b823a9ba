"""The outer loop: theta follows meta-gradients, with validation, checkpoints and an exact resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.clipping import Norm, require_grads
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import GradientEstimator, as_leaves
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.training import carries
from learnedopt.training.description import describe
from learnedopt.training.failures import Failures, out_of_range
from learnedopt.training.interrupts import Interrupts
from learnedopt.training.isolation import FAILED, estimate_finite, opened, remaining
from learnedopt.training.meta_update import MetaUpdate, undone
from learnedopt.training.metrics import metrics_of
from learnedopt.training.progress import Progress, Training, require_loadable, save_progress
from learnedopt.training.rank_carries import own_share, resume, whole_carry
from learnedopt.training.rank_checks import require_ready
from learnedopt.training.rank_estimates import Share, Summing, Whole
from learnedopt.training.ranks import Ranks, present
from learnedopt.training.result import TrainingDiverged, TrainingResult, diverged
from learnedopt.training.settings import require_settings
from learnedopt.training.start import vet_all
from learnedopt.training.steadying import Steadying
from learnedopt.training.tracker import Tracker, Trackers, progress_line, sinks_of
from learnedopt.training.validation import Validation, task_generator


class MetaTrainer:
    """Trains the meta-parameters of ``loop``.

    Each meta-step estimates a meta-gradient on a batch of tasks and lets ``meta_optimizer`` move theta. Where the
    estimator returns a carry, the next meta-step goes on from it; otherwise fresh tasks are drawn. Tasks whose loss or
    meta-gradient is not finite are left out, counted and named (docs/bad_tasks.md): the meta-step is taken over the
    others, and the meta-batch is smaller until its episode ends. A meta-step for which too few are left, or that leaves
    theta not finite, is skipped and counted, and its episode is dropped.

    Where rule or inner objective say a ``theta_scale``, the meta-optimizer moves ``phi = theta / scale``: gradients,
    ``max_grad_norm`` and the logged ``grad_norm`` are those of phi. Everything else is theta's.

    Args:
        loop: family, rule, execution and inner objective.
        estimator: how the meta-gradient is found. Its carry is its own; a checkpoint keeps it as it is.
        objective: what is minimised.
        meta_optimizer: makes any ``torch.optim.Optimizer`` from a list of tensors with ``names``; default Adam.
        tracker: what is told about the run, or a function that makes it; by default a line of progress on stderr; None
            for nothing. A failure of it is reported by ``logging`` and stops nothing.
        num_tasks: tasks a meta-batch.
        seed: of theta's initialisation and of the tasks; the engine reads no global randomness.
        theta: where to start instead of the loop's own initialisation.
        max_grad_norm: the meta-gradient is scaled down to this norm where it is longer.
        average: keeps ``theta_avg``, moved by this share towards theta after every meta-step. It is what is validated
            and returned then, and what a rollback goes back to; None for none.
        rollback_above: a meta-step that is not finite, or whose meta-loss exceeds the lowest running mean of them by
            more than this, is skipped, theta goes back to its average and the meta-optimizer forgets its momenta;
            counted in the metric ``rollbacks``. None for never.
        scheduler: makes a learning-rate scheduler from the meta-optimizer; stepped after each of its steps.
        validation: held-out tasks; the theta with the lowest value is kept. Measured before the first meta-step, every
            so many, and after the last one of a call of ``run``.
        checkpoint: file of the training state. Where it exists, ``run`` goes on from it, bitwise as if it had never
            stopped (same machine and execution).
        checkpoint_every: meta-steps between two checkpoints.
        micro_batch: how many tasks are estimated at once, where a meta-batch is larger than memory: the result is the
            same up to rounding. None for all.
        max_failed_share: which share of a meta-batch may fail before its meta-step is skipped, below 1; 0 skips it for
            a single task, and names none.
        max_skips_in_a_row: after so many skipped meta-steps in a row ``TrainingDiverged`` is raised.
        config: what the tracker is told about the run at its start, beside the number of meta-steps; a checkpoint holds
            it.
        report: called with the result and the tracker when all meta-steps are done, for figures and artifacts: after
            it the tracker is finished.
        ranks: the processes that share each meta-batch; by default those of the process group of ``torch.distributed``
            that is initialised (docs/many_processes.md). Rank 0 alone has the tracker and the checkpoint, and reports.

    Raises:
        TypeError, ValueError: an option is out of its range; there are no meta-parameters; the meta-optimizer or the
            scheduler needs more at a step than a step, as LBFGS does, or cannot be kept in a checkpoint; a scale is
            not positive, or the meta-optimizer is one of theta itself, as ``FollowTheLeader``, and there are scales.

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
        tracker: Tracker | Callable[[], Tracker] | None = progress_line,
        *,
        num_tasks: int = 1,
        seed: int = 0,
        theta: Theta | None = None,
        max_grad_norm: float | None = None,
        average: float | None = None,
        rollback_above: float | None = None,
        scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        validation: Validation | None = None,
        checkpoint: Path | str | None = None,
        checkpoint_every: int = 100,
        micro_batch: int | None = None,
        max_failed_share: float = 0.5,
        max_skips_in_a_row: int = 10,
        config: dict[str, Any] | None = None,
        report: Callable[[TrainingResult, Tracker], None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.loop: InnerLoop = loop
        self.estimator: GradientEstimator = estimator
        self.objective: MetaObjective = objective
        self.num_tasks: int = num_tasks
        self.seed: int = seed
        self.max_grad_norm: float | None = max_grad_norm
        self.validation: Validation | None = validation
        self.checkpoint: Path | None = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every: int = checkpoint_every
        self.max_skips_in_a_row: int = max_skips_in_a_row
        self.micro_batch: int | None = micro_batch
        self.max_failed_share: float = max_failed_share
        self.config: dict[str, Any] = dict(config or {})
        self.report: Callable[[TrainingResult, Tracker], None] | None = report
        self.steadying: Steadying = Steadying(average, rollback_above)
        require_settings(self)
        self.ranks: Ranks = present(loop.execution.device) if ranks is None else ranks
        self.tracker: Trackers = sinks_of(tracker if self.ranks.leads else None)
        theta = loop.init_theta(torch.Generator().manual_seed(seed)) if theta is None else theta
        device = loop.execution.device
        self.theta: Theta = as_leaves({k: v.detach().clone().to(device or v.device) for k, v in theta.items()})
        self._update = MetaUpdate(self.theta, loop.theta_scale(self.theta), meta_optimizer, scheduler)
        self.meta_optimizer: torch.optim.Optimizer = self._update.meta_optimizer
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = self._update.scheduler
        if self.checkpoint is not None:
            require_loadable(self.meta_optimizer, self.scheduler)
        self._why, self._failures = "", Failures(estimator.renews_tasks, warns=self.ranks.leads)
        self.progress: Progress = Progress(steadied=self.steadying.begin(self.theta))
        self._training: Training | None = None  # what the checkpoint is of, once it is known
        self._sum, self._goes_on = Summing(self.ranks), False

    def run(self, num_meta_steps: int) -> TrainingResult:
        """Train until meta-step ``num_meta_steps`` of the run, counted from its very beginning.

        Ctrl-C, SIGTERM and SIGHUP end it after the meta-step in progress, with a checkpoint: KeyboardInterrupt or
        SystemExit (143, 129) is raised then. A second Ctrl-C does not wait. Of several ranks all stop where one is told
        to, after the same meta-step.

        Raises:
            TrainingDiverged: too many skipped meta-steps in a row.
            TypeError: the estimator's carry holds what no checkpoint could keep.
            ValueError: bad input, before the first inner step; or a checkpoint of another run.
            RankFailed: another rank has failed, or has not come.
        """
        require_count("num_meta_steps", num_meta_steps)
        with self.ranks.failing_together(agreed=TrainingDiverged):
            require_ready(self, num_meta_steps)
            if self.validation is not None:
                self.validation.require_measurable(self.theta)  # before anything is written
            vet_all(self.loop, self.theta, self.estimator, self.num_tasks, self.seed)
            self._resume()
            return self._run(num_meta_steps)

    def _run(self, num_meta_steps: int) -> TrainingResult:
        exit_code, agreed = 1, True
        with Interrupts(patient=not self.ranks.alone) as interrupts:
            try:
                self.tracker.watch(self.theta)
                self.tracker.start({**self.config, "num_meta_steps": num_meta_steps})
                if self.progress.at_start:
                    self._log({}, validate=True)
                stop = self.ranks.agree(interrupts.number, "the start")
                while stop is None and self.progress.meta_step < num_meta_steps:
                    stop = self._meta_step(num_meta_steps, interrupts)
                    if self.progress.meta_step % self.checkpoint_every == 0:
                        self.save()
                self.save()
                interrupts.number = self.ranks.agree(interrupts.number or stop, "the end")
                interrupts.deliver()
                result, agreed = self._result(), False
                if self.report is not None and self.ranks.leads:
                    self.report(result, self.tracker)
                exit_code = 0
            except (KeyboardInterrupt, SystemExit):
                exit_code = 128 + (interrupts.number or signal.SIGINT)
                raise
            except Exception as error:
                agreed = isinstance(error, TrainingDiverged)
                raise
            finally:
                self.tracker.finish(exit_code)
                if exit_code and agreed:  # a launcher ends the first rank where another one ends before it
                    self.ranks.agree(None, "the end of the record")
        return result

    def _meta_step(self, num_meta_steps: int, interrupts: Interrupts) -> int | None:
        """Take one; return the number of a signal that says to stop after it."""
        progress, began = self.progress, time.perf_counter()
        # A rank whose tasks have all failed waits for the end of the others' episode.
        kept = progress.carry if progress.carry is not None or self._goes_on else self._fresh_carry()
        # From here on the episode counts as begun, and its carry comes back only with a finite meta-gradient.
        progress.carry, self._goes_on = None, False
        found = self._estimate(kept, interrupts)
        estimate = found.estimate
        (grads, norm), loss = self._update.gradients(estimate.grads), float(estimate.loss)
        progress.meta_step += 1
        num_failed = self.num_tasks - found.num_tasks + estimate.info.get(FAILED, len(found.failures))
        outside = "" if found.estimate.finite and not num_failed else out_of_range(self.loop, self.theta)
        told = self._failures.told(found.failures, num_failed, progress.episode - 1, outside)
        if self._move(grads, norm, loss, num_failed):
            progress.carry, progress.skips_in_a_row = remaining(estimate.carry, found.places, self.num_tasks), 0
            self._goes_on = found.goes_on
        else:
            self.steadying.go_back(self.theta, self.meta_optimizer, progress.steadied)
            progress.num_skipped, progress.skips_in_a_row = progress.num_skipped + 1, progress.skips_in_a_row + 1
        self.ranks.follow([*self.theta.values()], f"theta after meta-step {progress.meta_step}")
        metrics = metrics_of(estimate, norm, time.perf_counter() - began, progress.num_skipped)
        if self.steadying.rollback_above is not None:
            metrics["rollbacks"] = progress.steadied.num_rollbacks
        metrics |= told
        every = self.validation.every if self.validation is not None else 1
        self._log(metrics, validate=progress.meta_step % every == 0 or progress.meta_step == num_meta_steps)
        self._require_progress()
        return interrupts.number if self.ranks.alone else found.stop

    def _estimate(self, kept: Any, interrupts: Interrupts) -> Whole:
        """Estimate this rank's tasks, and return the estimate of all ranks'."""
        what = f"the sum of meta-gradients of meta-step {self.progress.meta_step + 1}"
        if kept is None:
            return self._sum(Share(None, 0, interrupts.number), self.theta, what)
        carry, places = opened(kept, self.num_tasks)
        theta = as_leaves({k: v.detach().clone() for k, v in self.theta.items()})  # whoever keeps it keeps a copy
        found = estimate_finite(
            self.estimator, self.loop, theta, self.objective, carry, places, micro_batch=self.micro_batch,
            apart=self.max_failed_share > 0,
        )  # fmt: skip
        self._require_carry(found.estimate.carry, len(found.places))
        require_grads(self.estimator, found.estimate.grads, self.theta)
        part = places[0] if self.estimator.is_part(carry) else None
        return self._sum(Share(found, len(places), interrupts.number, part), self.theta, what)

    def _move(self, grads: Theta, norm: Norm, loss: float, num_failed: float) -> bool:
        """Let theta take a meta-step where there is one to take; return whether it has."""
        steadied, self._why = self.progress.steadied, ""
        if not (math.isfinite(norm.mantissa) and math.isfinite(loss)):
            self._why = "the meta-gradient was not finite"
        elif num_failed / self.num_tasks > self.max_failed_share:
            self._why = (
                f"{num_failed:g} of {self.num_tasks} tasks had failed (max_failed_share={self.max_failed_share})"
            )
        elif self.steadying.too_high(loss, steadied):
            self._why = f"the meta-loss was too high, {loss:g}"
        elif not self._update.apply(grads, norm, self.max_grad_norm):
            self._why = undone(self.theta)
        else:
            self.steadying.moved(self.theta, loss, steadied)
        return not self._why

    def _fresh_carry(self) -> Any:
        # Every episode has a generator of its own, so that a resumed run needs no random state but this count.
        generator = task_generator(self.seed, self.progress.episode)
        self.progress.episode += 1
        tasks = self.loop.family.sample(self.num_tasks, generator)
        theta = {k: v.detach().clone() for k, v in self.theta.items()}
        carry = self.estimator.start(self.loop, theta, tasks, generator)
        self._require_carry(carry, self.num_tasks)
        return own_share(self.ranks, self.estimator, carry, self.num_tasks)

    def _require_carry(self, carry: Any, num_tasks: int) -> None:
        training = self._training
        carries.require_plain(carry, type(self.estimator).__name__, None if training is None else training.classes)
        if training is not None:
            training.expected.require_own(carry, num_tasks)

    def _log(self, metrics: dict[str, Any], *, validate: bool) -> None:
        """Tell the tracker of the present meta-step, with a validation where there is one and it is due."""
        if self.validation is not None and validate:
            learned = self.progress.steadied.learned(self.theta)
            found = self.validation.judge(learned, self.ranks)
            self.progress.keep_the_best(learned, found)
            metrics = {**metrics, "validation": found.value, "best_validation": self.progress.best_value}
            metrics |= {"validation_failed": found.num_failed} if found.num_failed else {}
        if metrics:
            self.tracker.log(metrics, self.progress.meta_step)

    def _require_progress(self) -> None:
        if self.progress.skips_in_a_row < self.max_skips_in_a_row:
            return
        self.save()
        why = "not finite" if self.steadying.rollback_above is None else "not finite, or of too high a loss"
        last = f"{self._why}{self._failures.last}"
        raise diverged(self._result(), self.progress.skips_in_a_row, why, last, self._failures.outside)

    def _result(self) -> TrainingResult:
        last, now = self.progress.steadied.learned(self.theta), self.progress
        return TrainingResult(last, now.best_theta or last, now.best_value, now.meta_step, now.num_skipped)

    def save(self) -> None:
        """Write the checkpoint, where there is to be one and a call of ``run`` or ``restored`` has looked for it."""
        if self.checkpoint is None or self._training is None:
            return
        carry = whole_carry(self.ranks, self.estimator, self.progress.carry, self._training, self.num_tasks)
        if self.ranks.leads:
            save_progress(self.checkpoint, replace(self.progress, carry=carry), self._training)

    def restored(self) -> TrainingResult | None:
        """Go back to the checkpoint and return what it holds, None for none; nothing is trained, told or written."""
        if self.checkpoint is None:
            return None
        self._training = self._training or self._describe()
        resumed = resume(self.ranks, self.checkpoint, self._training)
        if resumed is None:
            return None
        self.progress, self._goes_on = resumed, resumed.carry is not None
        self.progress.carry = own_share(self.ranks, self.estimator, resumed.carry, self.num_tasks)
        return self._result()

    def _resume(self) -> None:
        self.restored()
        if self.progress.meta_step == 0 and self.progress.carry is None and not self._goes_on:
            self.progress.carry = self._fresh_carry()  # what is wrong with it is said before the first step
        # Also at the start: a run may have been killed before its first checkpoint.
        self.tracker.rewind(-1 if self.progress.at_start else self.progress.meta_step)

    def _describe(self) -> Training:
        run = {"num_tasks": self.num_tasks, "seed": self.seed, "average": self.steadying.average}
        found = describe(self.loop, self.estimator, self.theta, self._update, run)
        return found._replace(config=self.config)
