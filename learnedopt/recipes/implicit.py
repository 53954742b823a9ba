"""Implicit MAML (Rajeswaran et al. 2019): a learned start, and a proximal term that ties solutions to it."""

from __future__ import annotations

import math
from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.hessian_free import HessianFree
from learnedopt.estimators.implicit import Implicit
from learnedopt.estimators.linear_solvers import ConjugateGradient
from learnedopt.recipes.omniglot import maml_omniglot, paper_sized
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def imaml_regression() -> Recipe:
    """Implicit MAML on ill-conditioned linear regressions, solved by gradient descent (Rajeswaran et al. 2019)."""
    return Recipe(
        name="imaml-regression",
        family=Choice("linear-regression"),
        rule=Choice("maml", {"lr": 0.1}),
        inner_objective=Choice("proximal", {"strength": 1.0}),
        estimator=Implicit(100, ConjugateGradient(10)),
        objective=FinalLoss(),
        num_meta_steps=500,
        num_tasks=16,
        meta=MetaLearning(lr=1e-2),
        validation=HeldOut(FinalLoss(), num_steps=100, num_tasks=64, every=50),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def imaml_omniglot() -> Recipe:
    """Implicit MAML on Omniglot, 8 descent steps, 5 CG steps (Rajeswaran et al. 2019), strided net of 32 filters."""
    recipe = maml_omniglot()
    return replace(
        recipe,
        name="imaml-omniglot",
        rule=Choice("maml", {"lr": 0.2}),
        inner_objective=Choice("proximal", {"strength": 0.5}),
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


def imaml_omniglot_paper() -> Recipe:
    """Implicit MAML at the published size: 64 filters, 32 tasks, 20,000 meta-steps, 16 steps, the code's operator."""
    recipe = paper_sized(imaml_omniglot(), 20_000)
    return replace(
        recipe,
        rule=Choice("maml", {"lr": 0.1}),
        inner_objective=Choice("proximal", {"strength": 2.0}),
        estimator=Implicit(16, ConjugateGradient(5), tolerance=math.inf, operator="published"),
        validation=replace(recipe.validation, num_steps=16),
    )


def imaml_hf_omniglot_paper() -> Recipe:
    """The Hessian-free implicit MAML at the published size: as imaml-omniglot-paper, but for the inner solver."""
    recipe = imaml_omniglot_paper()
    solver = Implicit(5, ConjugateGradient(5), inner=HessianFree(5), tolerance=math.inf, operator="published")
    validation = replace(recipe.validation, num_steps=5)
    return replace(recipe, name="imaml-hf-omniglot-paper", estimator=solver, validation=validation)
