"""Runs: what a recipe or a study makes, in a folder of its own, and found there again.

A run's folder holds theta with its description, the configuration, the metrics as JSON lines, and a figure. Started
again with the same configuration it goes on where it stopped, exactly; one that is finished is left as it is.
"""

from __future__ import annotations

import logging
import math
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from learnedopt.config import placed
from learnedopt.core.carry import Carry
from learnedopt.core.files import require_name
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.parts import loop_of
from learnedopt.core.task import TaskFamily
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.task_by_task import TaskByTask
from learnedopt.execution import compile_times
from learnedopt.execution.memory import predict_peak
from learnedopt.meta_optimizers import registry as meta_optimizers
from learnedopt.recipes.recipe import Recipe
from learnedopt.recipes.study import Study
from learnedopt.run_folder import configuration, enter, is_finished, record_length
from learnedopt.run_results import report, save_theta
from learnedopt.stages import start_theta, taken_over
from learnedopt.training.lengthen import lengthen
from learnedopt.training.rank_checks import require_same
from learnedopt.training.ranks import Ranks, present
from learnedopt.training.tensorboard_tracker import require_tensorboard
from learnedopt.training.tracker import Rewindable, Tracker
from learnedopt.training.tracking import Tracking, trackers
from learnedopt.training.trainer import MetaTrainer, TrainingDiverged, TrainingResult, Validation
from learnedopt.training.wandb_variables import in_sweep, resolve_mode


def build(recipe: Recipe) -> tuple[InnerLoop, Validation]:
    """Return the training loop, and the validation on the families' held-out tasks, once at least."""
    from learnedopt import optimizers, tasks

    require_device(recipe.execution.device, "execution.device=")
    # A rule that reads the horizon is told that of validation as well, which is its own.
    horizons = {"train": recipe.horizon, "valid": recipe.horizon and (recipe.validation.num_steps or recipe.horizon)}
    options: dict[str, dict[str, Any]] = {
        "train": {**recipe.family.options, "meta_split": "train"},
        "valid": {**recipe.family.options, **recipe.validation.family_options, "meta_split": "valid"},
    }
    with placed("family.", options["valid"]):
        families = {split: tasks.make(recipe.family.name, **given) for split, given in options.items()}
    if recipe.compare and len(families["train"].families) > 1:
        raise ValueError(
            f"compare=true sets {recipe.name} beside tuned optimizers on one family, and {recipe.family.name!r} is of "
            "several; leave it out, and evaluate what was learned on each of them"
        )
    template = template_of(families["train"], recipe.seed)
    try:
        with placed("rule.", recipe.rule.options):
            rule = optimizers.make(recipe.rule.name, template=template, **recipe.rule.options)
    except ValueError as error:
        if template is not None or "needs template=" not in str(error):
            raise
        raise ValueError(
            f"the rule {recipe.rule.name!r} has meta-parameters for every tensor or coordinate, and the families of "
            f"{recipe.family.name!r} differ in shape; take a rule that has none, or families of one shape ({error})"
        ) from error
    descended = inner_objective(recipe, template)
    loops = {
        split: InnerLoop(family, rule, recipe.execution, descended, horizons[split])
        for split, family in families.items()
    }
    held_out = recipe.validation
    every = min(held_out.every, recipe.num_meta_steps)
    validation = Validation(
        loops["valid"], held_out.objective, held_out.num_steps, held_out.num_tasks, every, recipe.seed,
        recipe.estimator.inner,
    )  # fmt: skip
    return loops["train"], validation


def template_of(family: TaskFamily, seed: int) -> Params | None:
    """Return one task's parameters; None for a mixture of families whose tasks differ in shape."""
    found: list[Params] = []
    for member in family.families:
        sample = member.sample(1, torch.Generator().manual_seed(seed))
        found.append({name: param[0] for name, param in member.init_params(sample).items()})
    shapes = [{name: param.shape for name, param in template.items()} for template in found]
    return found[0] if all(shape == shapes[0] for shape in shapes) else None


def inner_objective(recipe: Recipe, template: Params | None) -> InnerObjective:
    """Return what the recipe's inner steps descend."""
    from learnedopt import inner_objectives

    if recipe.inner_objective is None:
        return TaskLoss()
    return inner_objectives.make(recipe.inner_objective.name, template=template, **recipe.inner_objective.options)


def device_of(recipe: Recipe | Study) -> torch.device | str | None:
    """Return where a recipe runs; None where that is left open, as by a study."""
    return recipe.execution.device if isinstance(recipe, Recipe) else None


def require_device(device: torch.device | str | None, what: str) -> None:
    """Raise ValueError, beginning with ``what`` a user calls it, where a device is not to be had."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what}{device!r} cannot be used here: {reason}") from error


def train(
    recipe: Recipe | Study,
    folder: Path,
    tracking: Tracking = Tracking(),  # noqa: B008 - it is frozen
    ranks: Ranks | None = None,
    *,
    extend: bool = False,
) -> TrainingResult | None:
    """Meta-train as the recipe says, in ``folder``, from its checkpoint where there is one; a study returns None.

    A run that is finished is said to be, and nothing is written. With ``extend`` the folder's run goes on to the
    recipe's larger ``num_meta_steps``, all else being equal, from its last checkpoint and with the rate that a run of
    the new length has there (see ``lengthen``): where the rate is constant, that is the run of the new length to the
    bit, but for one more validation at the end of the old.

    Of several processes (``ranks``; by default those of the process group that is initialised) rank 0 alone touches
    the folder and holds it.

    Raises:
        ValueError: bad input; the folder holds a run of another configuration; or none that could be extended so.
    """
    require_name(recipe.name, "the recipe's name")
    torch.set_num_threads(recipe.num_threads)
    compile_times.logger.setLevel(logging.INFO)  # who waits is told for what
    ranks = present(device_of(recipe)) if ranks is None else ranks
    with ranks.failing_together(agreed=TrainingDiverged), ExitStack() as held:
        if isinstance(recipe, Study):
            require_plain(recipe, ranks, extend)
        require_same(ranks, {"recipe": configuration(recipe), "extend": extend})
        built = None if isinstance(recipe, Study) else build(recipe)
        resolve_mode(tracking.wandb)  # what cannot be followed so is refused before anything is written
        if tracking.tensorboard:
            require_tensorboard()
        if isinstance(recipe, Recipe) and built is not None:
            require_chain(recipe, built[0])
        if ranks.lead(lambda: is_finished(folder, recipe, extend=extend), "the look at the run's folder"):
            return finished(recipe, folder, built, ranks)
        run_id = ranks.lead(lambda: enter(recipe, folder, held, extend=extend), "the opening of the run's folder")
        if isinstance(recipe, Recipe):
            train_before(recipe, folder, tracking, ranks)
        tracker = trackers(recipe, folder, tracking, run_id) if ranks.leads else None
        if isinstance(recipe, Study):
            assert tracker is not None
            return carry_out(recipe, folder, tracker)
        assert built is not None
        if extend:
            go_on_longer(recipe, folder, built, ranks)
        return meta_train(recipe, folder, built, tracker, ranks)


def require_plain(study: Study, ranks: Ranks, extend: bool) -> None:
    """Raise ValueError where a study is asked for what only a meta-training can do."""
    if not ranks.alone:
        raise ValueError(f"the study {study.name} has no meta-batches to share: start it as one process")
    if extend:
        raise ValueError(f"the study {study.name} has no num_meta_steps of which there could be more: it has its end")


def finished(
    recipe: Recipe | Study, folder: Path, built: tuple[InnerLoop, Validation] | None, ranks: Ranks
) -> TrainingResult | None:
    """Say that a run is finished, and return what it ended with; nothing is written."""
    result, after, more = None, "", ""
    if isinstance(recipe, Recipe) and built is not None:
        result = trainer_of(recipe, folder, built, ranks).restored()
        after = f" after {recipe.num_meta_steps} meta-steps"
        more = ", --extend with more num_meta_steps makes it longer"
    if ranks.leads:
        told = f"{folder} holds this run, finished{after}, and is left as it is"
        print(f"{told}: a --name of its own begins another{more}.", flush=True)
    return result


def go_on_longer(recipe: Recipe, folder: Path, built: tuple[InnerLoop, Validation], ranks: Ranks) -> None:
    """Let the run in ``folder`` be one of the recipe's length, from its checkpoint on."""
    trainer = trainer_of(recipe, folder, built, ranks)
    if trainer.restored() is not None:
        assert isinstance(trainer.scheduler, CosineAnnealingLR)
        lengthen(trainer.scheduler, recipe.num_meta_steps)
        trainer.save()
    # Only now: a kill before it leaves the run of before, which can be extended again.
    ranks.lead(lambda: record_length(folder, recipe), "the record of the run's length")


def require_chain(recipe: Recipe, loop: InnerLoop) -> None:
    """Raise ValueError, before the stage before is trained, where this one could not start from its theta."""
    if recipe.after is not None:
        before = build(recipe.after)[0].init_theta(torch.Generator().manual_seed(0))
        own = loop.init_theta(torch.Generator().manual_seed(0))
        taken_over(before, own, f"{recipe.name} comes after {recipe.after.name}", partly=recipe.start_partly)


def train_before(recipe: Recipe, folder: Path, tracking: Tracking, ranks: Ranks) -> None:
    """Meta-train the stage before, from where it stands; one that is finished is left as it is."""
    stage = recipe.after
    if stage is None:
        return
    own = folder / stage.name
    if not ranks.lead(lambda: is_finished(own, stage), "the look at the stage before"):
        if ranks.leads:
            print(f"{recipe.name} comes after {stage.name}, in {own}.", flush=True)
        # In a sweep W&B has one run for each trial, which is the last stage's.
        train(stage, own, replace(tracking, wandb="disabled") if in_sweep() else tracking, ranks)
    torch.set_num_threads(recipe.num_threads)


def carry_out(study: Study, folder: Path, tracker: Tracker) -> None:
    """Compute a study in ``folder``, and let the tracker know its settings, numbers, figure and end."""
    exit_code = 1
    try:
        if isinstance(tracker, Rewindable):
            tracker.rewind(-1)  # a study that goes on tells all of its numbers again
        tracker.start(configuration(study))
        study.run(folder, tracker)
        figure = folder / f"{study.name}.png"
        if not figure.exists():
            raise RuntimeError(f"the study {study.name} has ended without its figure {figure.name}")
        tracker.figure(study.name, figure)
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 128 + signal.SIGINT
        raise
    finally:
        tracker.finish(exit_code)


def meta_train(
    recipe: Recipe, folder: Path, built: tuple[InnerLoop, Validation], tracker: Tracker | None, ranks: Ranks
) -> TrainingResult:
    """Meta-train what was built of the recipe, and leave theta, its configuration and a figure in ``folder``."""
    loop, _ = built
    theta = ranks.lead(lambda: start_theta(recipe, loop, folder), "the theta to start from")
    trainer = trainer_of(recipe, folder, built, ranks, tracker, theta)
    if ranks.leads:
        say_memory(recipe, loop, trainer.theta, ranks)
    try:
        return trainer.run(recipe.num_meta_steps)
    except TrainingDiverged as error:
        if error.result.best_value == math.inf:  # no theta was seen to be any good
            raise
        best = error.result
        path = ranks.lead(lambda: save_theta(recipe, folder, loop, best), "the saving of the best theta")
        raise error.naming(path) from error


def trainer_of(
    recipe: Recipe,
    folder: Path,
    built: tuple[InnerLoop, Validation],
    ranks: Ranks,
    tracker: Tracker | None = None,
    theta: Theta | None = None,
) -> MetaTrainer:
    """Return the trainer of what was built of the recipe, whose checkpoint is in ``folder``."""
    (loop, validation), meta = built, recipe.meta
    return MetaTrainer(
        loop,
        recipe.estimator,
        recipe.objective,
        meta_optimizers.make(meta.optimizer.name, lr=meta.lr, **meta.optimizer.options),
        tracker,
        num_tasks=recipe.num_tasks,
        seed=recipe.seed,
        theta=theta,
        max_grad_norm=meta.max_grad_norm,
        average=meta.average,
        rollback_above=meta.rollback_above,
        micro_batch=meta.micro_batch,
        max_failed_share=meta.max_failed_share,
        scheduler=lambda optimizer: CosineAnnealingLR(
            optimizer, recipe.num_meta_steps, eta_min=meta.final_lr_fraction * meta.lr
        ),
        validation=validation,
        checkpoint=folder / "checkpoint.pt",
        checkpoint_every=recipe.checkpoint_every,
        config=configuration(recipe),
        report=lambda result, tracker: report(recipe, folder, loop, result, tracker),
        ranks=ranks,
    )


def say_memory(recipe: Recipe, loop: InnerLoop, theta: Theta, ranks: Ranks) -> None:
    """Print how much memory an estimate will take where that grows with the inner steps; of a mixture its largest."""
    start, stop = ranks.share(recipe.num_tasks)
    at_once = 1 if isinstance(recipe.estimator, TaskByTask) else recipe.meta.micro_batch
    num_tasks = min(stop - start, at_once or recipe.num_tasks)
    found: list[tuple[int, InnerLoop, Carry]] = []
    for member, family in enumerate(loop.family.families):
        own = loop_of(loop, member)
        carry = own.start(family.sample(num_tasks, torch.Generator().manual_seed(recipe.seed)))
        found.append((sum(param.numel() for param in carry.params.values()), own, carry))
    _, own, carry = max(found, key=lambda each: each[0])
    peak = predict_peak(own, theta, recipe.estimator, carry, recipe.objective)
    if peak is not None:
        of = f" on a {type(own.family).__name__}, the largest of them," if len(found) > 1 else ""
        print(f"One estimate of the meta-gradient{of} takes about {peak / 1e6:.3g} MB.", flush=True)
