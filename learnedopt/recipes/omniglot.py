"""Few-shot classification of characters by unrolled meta-gradients, sized for a CPU and as published."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.objectives.error_rate import ErrorRate
from learnedopt.objectives.target_matching import BootstrappedTarget
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


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
