"""Meta-train an optimizer: ``python train_meta.py RECIPE [--set key=value ...]``; ``--list`` shows the recipes.

A recipe is a function that returns a full configuration; a variant calls another and changes a line or two. A run
writes ``runs/<name>/``: theta with its description, the configuration, the metrics as JSON lines, and a figure. Started
again with the same configuration it goes on where it stopped, exactly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

import learnedopt
from learnedopt import (
    GMRES,
    BootstrappedTarget,
    ConjugateGradient,
    Execution,
    FinalLoss,
    GradientEstimator,
    HessianFree,
    Implicit,
    InnerLoop,
    KLDivergence,
    MeanLogLoss,
    Neumann,
    SquaredDistance,
    SumOfLosses,
    Tape,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
)
from learnedopt.config import Choice, nearest, override
from learnedopt.core.checks import require_count
from learnedopt.core.files import exclusive, plain_json, remove_partials, write_json
from learnedopt.evaluation.few_shot import ErrorRate
from learnedopt.execution.memory import predict_peak
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import ConsoleTracker, Tracker, Trackers
from learnedopt.training.trainer import MetaTrainer, TrainingDiverged, TrainingResult, Validation
from learnedopt.training.wandb_tracker import Mode, WandbTracker, resolve_mode

ALL_TASKS = 2**31  # a chunk size that no number of tasks exceeds: all at once
INTERCHANGEABLE = (
    (Unrolled, Truncated, TruncatedBackprop, Implicit),
    (FinalLoss, SumOfLosses, MeanLogLoss, BootstrappedTarget, ErrorRate),
    (SquaredDistance, KLDivergence),
    (ConjugateGradient, Neumann, GMRES),
)
"""What ``--set`` takes by name, as in ``--set estimator=Unrolled``: each may replace the others of its line."""


@dataclass(frozen=True)
class MetaLearning:
    """How theta moves: Adam, with the rate annealed by a half cosine to ``final_lr_fraction`` of ``lr``."""

    lr: float = 1e-3
    final_lr_fraction: float = 1.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r} is a learning rate and must be positive")
        if not self.final_lr_fraction >= 0:
            raise ValueError(f"final_lr_fraction={self.final_lr_fraction!r} must not be negative; 1 keeps the rate")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r} must be positive, or null for no clipping")


@dataclass(frozen=True)
class HeldOut:
    """What validation measures: ``objective`` after ``num_steps`` steps on ``num_tasks`` tasks, the best theta kept.

    Steps are those of the estimator's own inner solver where it has one.
    """

    objective: Any = field(default_factory=FinalLoss)
    num_steps: int = 100
    num_tasks: int = 16
    every: int = 100
    family_options: dict[str, Any] = field(default_factory=dict)  # those in which its tasks differ from training's


@dataclass(frozen=True)
class Recipe:
    """A full configuration of one meta-training."""

    name: str
    family: Choice
    rule: Choice
    estimator: GradientEstimator
    objective: Any
    num_meta_steps: int
    num_tasks: int = 1
    meta: MetaLearning = field(default_factory=MetaLearning)
    validation: HeldOut = field(default_factory=HeldOut)
    execution: Execution = field(default_factory=Execution)
    checkpoint_every: int = 100
    seed: int = 0
    start: str | None = None  # a run's folder, a checkpoint or a packaged name: where theta starts
    num_threads: int = 1  # inner problems are small: more threads mostly wait for one another
    compare: bool = False

    def __post_init__(self) -> None:
        for count in ("num_meta_steps", "num_tasks", "checkpoint_every"):
            require_count(count, getattr(self, count), least=1)


def lstm_quadratic() -> Recipe:
    """LSTM on random 10-d quadratics, the first experiment of Andrychowicz et al. (2016)."""
    return Recipe(
        name="lstm-quadratic",
        family=Choice("quadratic", {"dim": 10}),
        rule=Choice("lstm", {"preprocess_factor": None}),
        estimator=Truncated(20, horizon=100, tape=Tape.FULL),
        objective=SumOfLosses(),
        num_meta_steps=6000,
        num_tasks=128,
        meta=MetaLearning(lr=5e-3, final_lr_fraction=0.01, max_grad_norm=10.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=2000, every=250),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def demo() -> Recipe:
    """LSTM on quadratics in two minutes, then compared with tuned SGD, Adam and others."""
    recipe = lstm_quadratic()
    return replace(recipe, name="demo", num_meta_steps=700, compare=True)


def lstm_mnist() -> Recipe:
    """LSTM on an MLP with 20 sigmoid units on MNIST (Andrychowicz et al. 2016)."""
    return Recipe(
        name="lstm-mnist",
        family=Choice("image-mlp", {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}),
        rule=Choice("lstm", {"preprocess_factor": 10.0, "output_scale": 0.1}),
        estimator=Truncated(20, horizon=100, tape=Tape.FULL),
        objective=SumOfLosses(),
        num_meta_steps=5000,
        meta=MetaLearning(lr=5e-3, final_lr_fraction=0.01, max_grad_norm=1.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=4, every=200),
    )


def meta_sgd_mnist() -> Recipe:
    """Meta-SGD: a learned start and a learned rate per coordinate for the MNIST MLP, 10 steps (Li et al. 2017)."""
    return Recipe(
        name="meta-sgd-mnist",
        family=Choice("image-mlp", {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}),
        rule=Choice("meta-sgd", {"lr": 0.1}),
        estimator=Unrolled(10),
        objective=FinalLoss(),
        num_meta_steps=600,
        num_tasks=4,
        meta=MetaLearning(lr=3e-3, final_lr_fraction=0.1, max_grad_norm=10.0),
        validation=HeldOut(FinalLoss(), num_steps=10, num_tasks=32, every=50),
    )


def lstm_mnist_long() -> Recipe:
    """The LSTM of lstm-mnist, refined with four tasks a meta-step on the images' central 20x20 pixels."""
    recipe = lstm_mnist()
    return replace(
        recipe,
        name="lstm-mnist-long",
        family=Choice("image-mlp", {**recipe.family.options, "crop": 20}),
        start="runs/lstm-mnist",
        num_meta_steps=900,
        num_tasks=4,
        meta=MetaLearning(lr=1e-3, final_lr_fraction=0.01, max_grad_norm=10.0),
        validation=replace(recipe.validation, num_tasks=8, every=100),
    )


def bootstrapped_mnist() -> Recipe:
    """Learned rates for the MNIST MLP, meta-trained towards a bootstrapped target (Flennerhag et al. 2022)."""
    return replace(
        meta_sgd_mnist(),
        name="bootstrapped-mnist",
        rule=Choice("learned-rates", {"rates": "coordinate", "lr": 3.0}),
        estimator=Truncated(5, horizon=100, tape=Tape.FULL),
        objective=BootstrappedTarget(num_target_steps=6, step_size=1.0),
        validation=HeldOut(FinalLoss(), num_steps=100, num_tasks=32, every=50),
    )


def imaml_regression() -> Recipe:
    """Implicit MAML on ill-conditioned linear regressions, solved by gradient descent (Rajeswaran et al. 2019)."""
    return Recipe(
        name="imaml-regression",
        family=Choice("linear-regression"),
        rule=Choice("imaml", {"lr": 0.1, "strength": 1.0}),
        estimator=Implicit(100, ConjugateGradient(10)),
        objective=FinalLoss(),
        num_meta_steps=500,
        num_tasks=16,
        meta=MetaLearning(lr=1e-2),
        validation=HeldOut(FinalLoss(), num_steps=100, num_tasks=64, every=50),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def maml_sine() -> Recipe:
    """MAML on sine regression, 10 shots, one step (Finn et al. 2017), the distribution of Li et al. (2017)."""
    return Recipe(
        name="maml-sine",
        family=Choice("sine", {"protocol": "meta-sgd", "shots": 10, "init_std": 0.01}),
        rule=Choice("maml", {"lr": 0.01}),
        estimator=Unrolled(1),
        objective=FinalLoss(),
        num_meta_steps=60_000,
        num_tasks=4,
        meta=MetaLearning(lr=1e-3),
        validation=HeldOut(FinalLoss(), num_steps=1, num_tasks=1000, every=1000),
        execution=Execution(chunk_size=ALL_TASKS, compile=True),
        checkpoint_every=1000,
    )


def meta_sgd_sine() -> Recipe:
    """Meta-SGD on sine regression, 10 shots, one step (Li et al. 2017)."""
    return replace(maml_sine(), name="meta-sgd-sine", rule=Choice("meta-sgd"))  # rates start from U[0.005, 0.1]


def maml_omniglot() -> Recipe:
    """MAML on Omniglot, 5-way 1-shot, one step at rate 0.4 (Finn et al. 2017), strided net of 32 filters."""
    return Recipe(
        name="maml-omniglot",
        family=Choice("omniglot", {"ways": 5, "shots": 1, "queries": 5, "model": "conv", "width": 32}),
        rule=Choice("maml", {"lr": 0.4}),
        estimator=Unrolled(1),
        objective=FinalLoss(),
        num_meta_steps=12_000,
        num_tasks=8,
        meta=MetaLearning(lr=3e-3, final_lr_fraction=0.01),
        validation=HeldOut(ErrorRate(), num_steps=3, num_tasks=200, every=500, family_options={"queries": 15}),
        execution=Execution(compile=True),
    )


def meta_sgd_omniglot() -> Recipe:
    """Meta-SGD on Omniglot, 5-way 1-shot, one step (Li et al. 2017), strided net of 32 filters."""
    recipe = maml_omniglot()
    validation = replace(recipe.validation, num_steps=1)
    return replace(
        recipe, name="meta-sgd-omniglot", rule=Choice("meta-sgd", {"lr": 0.1}), num_meta_steps=8000,
        validation=validation,
    )  # fmt: skip


def reptile_omniglot() -> Recipe:
    """Reptile on Omniglot, 10 shots in batches of 2, validated with 1 (Nichol et al. 2018), net of 32 filters."""
    recipe = maml_omniglot()
    return replace(
        recipe,
        name="reptile-omniglot",
        # Its meta-gradient is the distance travelled over batches of the support set: no query images, and no second
        # derivative.
        family=Choice("omniglot", {**recipe.family.options, "shots": 10, "batch_shots": 2}),
        execution=Execution(chunk_size=ALL_TASKS),
        rule=Choice("maml", {"lr": 0.2}),
        estimator=Unrolled(0),
        objective=BootstrappedTarget(num_target_steps=5, step_size=0.2, split="train"),
        num_meta_steps=10_000,
        validation=replace(
            recipe.validation, num_steps=10, family_options={"shots": 1, "batch_shots": None, "queries": 15}
        ),
    )


def imaml_omniglot() -> Recipe:
    """Implicit MAML on Omniglot, 8 descent steps, 5 CG steps (Rajeswaran et al. 2019), strided net of 32 filters."""
    recipe = maml_omniglot()
    return replace(
        recipe,
        name="imaml-omniglot",
        rule=Choice("imaml", {"lr": 0.2, "strength": 0.5}),
        # As published, the inner problem is not solved to the end: no warning below that. Damped, as of this
        # network's Hessians some have eigenvalues below -strength, which are poles.
        estimator=Implicit(8, ConjugateGradient(5, damping=1.0), tolerance=math.inf),
        num_meta_steps=8000,
        meta=MetaLearning(lr=3e-3, final_lr_fraction=0.01, max_grad_norm=1.0),
        validation=replace(recipe.validation, num_steps=8, every=500),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def imaml_hf_omniglot() -> Recipe:
    """Implicit MAML on Omniglot, solved by 5 Hessian-free Newton steps (Rajeswaran et al. 2019), net of 32 filters."""
    recipe = imaml_omniglot()
    # Two CG iterations a Newton step: more of them bring these tasks' accuracy no further, more steps do.
    solver = Implicit(5, ConjugateGradient(5, damping=1.0), inner=HessianFree(2), tolerance=math.inf)
    return replace(
        recipe,
        name="imaml-hf-omniglot",
        estimator=solver,
        num_meta_steps=6000,
        validation=replace(recipe.validation, num_steps=5),
    )


def paper_sized(recipe: Recipe, num_meta_steps: int) -> Recipe:
    """Return an Omniglot recipe with the published sizes: 64 filters, 32 tasks a meta-step, Adam at 1e-3."""
    family = Choice(recipe.family.name, {**recipe.family.options, "width": 64})
    return replace(
        recipe, name=f"{recipe.name}-paper", family=family, num_meta_steps=num_meta_steps, num_tasks=32,
        meta=MetaLearning(lr=1e-3), validation=replace(recipe.validation, num_tasks=600, every=1000),
    )  # fmt: skip


def maml_omniglot_paper() -> Recipe:
    """The MAML of maml-omniglot at the published size: 64 filters, 32 tasks, 60,000 meta-steps (a GPU's work)."""
    return paper_sized(maml_omniglot(), 60_000)


def meta_sgd_omniglot_paper() -> Recipe:
    """The Meta-SGD of meta-sgd-omniglot at the published size: 64 filters, 32 tasks, 60,000 meta-steps."""
    return paper_sized(meta_sgd_omniglot(), 60_000)


def reptile_omniglot_paper() -> Recipe:
    """The Reptile of reptile-omniglot with 64 filters, 32 tasks, 60,000 meta-steps."""
    return paper_sized(reptile_omniglot(), 60_000)


def imaml_omniglot_paper() -> Recipe:
    """Implicit MAML at the published size: 64 filters, 32 tasks, 20,000 meta-steps, 16 steps, the code's operator."""
    recipe = paper_sized(imaml_omniglot(), 20_000)
    return replace(
        recipe,
        rule=Choice("imaml", {"lr": 0.1, "strength": 2.0}),
        estimator=Implicit(16, ConjugateGradient(5), tolerance=math.inf, operator="published"),
        validation=replace(recipe.validation, num_steps=16),
    )


def imaml_hf_omniglot_paper() -> Recipe:
    """The Hessian-free implicit MAML at the published size: as imaml-omniglot-paper, but for the inner solver."""
    recipe = imaml_omniglot_paper()
    solver = Implicit(5, ConjugateGradient(5), inner=HessianFree(5), tolerance=math.inf, operator="published")
    validation = replace(recipe.validation, num_steps=5)
    return replace(recipe, name="imaml-hf-omniglot-paper", estimator=solver, validation=validation)


RECIPES: dict[str, Callable[[], Recipe]] = {
    function().name: function
    for function in (
        demo,
        lstm_quadratic,
        lstm_mnist,
        lstm_mnist_long,
        meta_sgd_mnist,
        bootstrapped_mnist,
        imaml_regression,
        maml_sine,
        meta_sgd_sine,
        maml_omniglot,
        maml_omniglot_paper,
        meta_sgd_omniglot,
        meta_sgd_omniglot_paper,
        reptile_omniglot,
        reptile_omniglot_paper,
        imaml_omniglot,
        imaml_omniglot_paper,
        imaml_hf_omniglot,
        imaml_hf_omniglot_paper,
    )
}


def build(recipe: Recipe) -> tuple[InnerLoop, Validation]:
    """Return the training loop, and the validation on the families' held-out tasks, once at least."""
    require_device(recipe.execution)
    options = {"train": recipe.family.options, "valid": {**recipe.family.options, **recipe.validation.family_options}}
    families = {
        split: learnedopt.tasks.make(recipe.family.name, **{**given, "meta_split": split})
        for split, given in options.items()
    }
    sample = families["train"].sample(1, torch.Generator().manual_seed(recipe.seed))
    template = {k: p[0] for k, p in families["train"].init_params(sample).items()}
    rule = learnedopt.optimizers.make(recipe.rule.name, template=template, **recipe.rule.options)
    loops = {split: InnerLoop(family, rule, recipe.execution) for split, family in families.items()}
    held_out = recipe.validation
    every = min(held_out.every, recipe.num_meta_steps)
    validation = Validation(
        loops["valid"], held_out.objective, held_out.num_steps, held_out.num_tasks, every, recipe.seed,
        getattr(recipe.estimator, "inner", None),
    )  # fmt: skip
    return loops["train"], validation


def require_device(execution: Execution) -> None:
    """Raise ValueError where the execution's device is not to be had."""
    try:
        torch.empty(0, device=execution.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"execution.device={execution.device!r} cannot be used here: {reason}") from error


def train(recipe: Recipe, folder: Path, wandb_mode: str | None = None) -> TrainingResult:
    """Meta-train as the recipe says, in ``folder``, from its checkpoint where there is one."""
    torch.set_num_threads(recipe.num_threads)
    config = as_config(recipe)
    loop, validation = build(recipe)
    mode = resolve_mode(wandb_mode)
    find_run(folder, config)  # refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        run_id = find_run(folder, config) or begin_run(folder, config)
        remove_partials(folder)  # left by a kill in the middle of a write
        tracker = trackers(recipe, folder, mode, run_id)
        return meta_train(recipe, folder, (loop, validation), tracker)


def trackers(recipe: Recipe, folder: Path, mode: Mode, run_id: str) -> Trackers:
    """Return where a run's metrics go: the console, a file of JSON lines, Weights & Biases."""
    return Trackers(
        [
            ConsoleTracker(total=recipe.num_meta_steps),
            JsonLinesTracker(folder / "metrics.jsonl"),
            WandbTracker(
                mode, group=recipe.name, job_type="meta-train", name=folder.name, dir=folder, run_id=run_id
            ),
        ]
    )  # fmt: skip


def meta_train(recipe: Recipe, folder: Path, built: tuple[InnerLoop, Validation], tracker: Tracker) -> TrainingResult:
    """Meta-train what was built of the recipe, and leave theta, its configuration and a figure in ``folder``."""
    loop, validation = built
    config = as_config(recipe)

    def report(result: TrainingResult, tracker: Tracker) -> None:
        from learnedopt.evaluation import plots

        metadata = plain_json({**config, "meta_step": result.meta_step, "best_validation": result.best_value})
        theta = learnedopt.save(folder / "theta.safetensors", loop.rule, result.best_theta, metadata)
        figure = folder / "training.png"
        plots.plot_training(figure, read_metrics(folder / "metrics.jsonl"))
        tracker.figure("training", figure)
        tracker.artifact(recipe.name, [theta, theta.with_suffix(".json")], metadata)
        if recipe.compare:
            compare(recipe, folder, (loop.rule, result.best_theta), tracker)

    meta = recipe.meta
    trainer = MetaTrainer(
        loop,
        recipe.estimator,
        recipe.objective,
        lambda params: torch.optim.Adam(params, meta.lr),
        tracker,
        num_tasks=recipe.num_tasks,
        seed=recipe.seed,
        theta=learnedopt.load(recipe.start)[1] if recipe.start else None,
        max_grad_norm=meta.max_grad_norm,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, recipe.num_meta_steps, eta_min=meta.final_lr_fraction * meta.lr
        ),
        validation=validation,
        checkpoint=folder / "checkpoint.pt",
        checkpoint_every=recipe.checkpoint_every,
        config=config,
        report=report,
    )
    tasks = loop.family.sample(recipe.num_tasks, torch.Generator().manual_seed(recipe.seed))
    carry = recipe.estimator.start(loop, trainer.theta, tasks, torch.Generator().manual_seed(recipe.seed))
    peak = predict_peak(loop, trainer.theta, recipe.estimator, carry, recipe.objective)
    if peak is not None:
        print(f"One estimate of the meta-gradient takes about {peak / 1e6:.3g} MB.", flush=True)
    return trainer.run(recipe.num_meta_steps)


def compare(recipe: Recipe, folder: Path, learned: tuple[UpdateRule, Theta], tracker: Tracker) -> None:
    """Print the learned optimizer beside tuned hand-designed ones on fresh tasks, and draw their loss curves."""
    from learnedopt import evaluate

    options = recipe.family.options
    fresh, others = (
        learnedopt.tasks.make(recipe.family.name, **{**options, "meta_split": split}) for split in ("test", "train")
    )
    comparison = evaluate.compare(
        {recipe.name: learned}, fresh, tuning_family=others, num_steps=recipe.validation.num_steps, num_tasks=500,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    paths = comparison.save(folder)
    print(f"\n{comparison.markdown()}\nLoss curves: {paths['png']}")
    tracker.figure("evaluation", paths["png"])


def as_config(value: Any) -> Any:
    """Return a configuration as nested dicts of plain values that name the types they were."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_config(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if isinstance(value, (Recipe, Choice)) else {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {k: as_config(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_config(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def find_run(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the id of the run of this configuration that ``folder`` holds, None where it holds none.

    A run of another configuration does not count where not one meta-step was taken; otherwise it is refused.
    """
    path, record = folder / "config.json", folder / "metrics.jsonl"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        run_id, saved = str(found["run_id"]), dict(found["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no run's configuration ({error!r}); remove {folder}, or give this run a --name of its own"
        ) from error
    if saved == config:
        return run_id
    rows = read_metrics(record) if record.exists() else []  # row 0 is the validation of the start
    if (folder / "checkpoint.pt").exists() or any(row["step"] > 0 for row in rows):
        changed = sorted(k for k in saved.keys() | config.keys() if saved.get(k, ...) != config.get(k, ...))
        raise ValueError(
            f"{folder} holds a run with another configuration (different: {', '.join(changed)}); give this run a "
            "--name of its own, or remove that folder"
        )
    return None


def begin_run(folder: Path, config: dict[str, Any]) -> str:
    """Write the configuration of a new run into its folder; return the run's id."""
    run_id = uuid.uuid4().hex[:8]
    write_json(folder / "config.json", {"run_id": run_id, "recipe": config})
    return run_id


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 1 when training diverged, 2 for bad input, 130 or 143 after a signal."""
    parser = _Parser(prog="train_meta.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", help="one of --list")
    parser.add_argument("--list", action="store_true", help="print the recipes, one line each")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field, such as meta.lr=1e-3"
    )
    parser.add_argument("--name", help="the run's folder under --runs; default: the recipe's name")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    parser.add_argument("--wandb", choices=("online", "offline", "disabled"), help="default: WANDB_MODE, then offline")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.list:
        for name, function in RECIPES.items():
            print(f"{name:24} {(function.__doc__ or '').partition(chr(10))[0]}")
        return 0
    if args.recipe is None:
        parser.error("name a recipe; --list shows all")
    if args.recipe not in RECIPES:
        parser.error(f"there is no recipe {args.recipe!r}{nearest(args.recipe, RECIPES)} (--list shows all)")
    folder = args.runs / (args.name or args.recipe)
    try:
        result = train(override(RECIPES[args.recipe](), args.set, INTERCHANGEABLE), folder, args.wandb)
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"Stopped. The same command goes on from {folder}.", file=sys.stderr)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except (TrainingDiverged, ValueError, TypeError, OSError) as error:
        print(f"train_meta.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, TrainingDiverged) else 2
    print(f"Best validation {result.best_value:.4g}; theta, configuration, metrics and figure are in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
