"""The command ``learnedopt check``: a recipe's loop is vetted alone, in words, before hours are spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnedopt.cli_recipe import Chosen

FOUND = 1


def check(chosen: Chosen) -> int:
    """Say whether a recipe's loss is differentiated right.

    Vets a recipe as training does before its first meta-gradient, and prints what was tried and found: whether the loss
    is a function of what it is given, and whether its derivatives are right. Exit code 1 where something would make
    meta-gradients silently wrong.

    Args:
        chosen: the recipe
    """
    import torch

    from learnedopt.core.parts import loop_of
    from learnedopt.core.vetting import examine, report
    from learnedopt.recipes import Study
    from learnedopt.run import build

    recipe = chosen.recipe
    if isinstance(recipe, Study):
        raise ValueError(
            f"{recipe.name} sets several methods side by side, and each is vetted when it is trained; check a "
            "recipe of one meta-training"
        )
    torch.set_num_threads(recipe.num_threads)
    loop, _ = build(recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    theta, found = loop.init_theta(generator), 0
    for member, family in enumerate(loop.family.families):
        own = loop_of(loop, member)
        begun = own.begin(theta, own.start(family.sample(2, generator)))
        second = recipe.estimator.takes_second_derivatives
        faults = family.faults(*_one_task(own, begun), second_derivatives=second)
        findings = examine(own, theta, begun, second_derivatives=second)
        print(f"{recipe.name}: {type(loop.rule).__name__} on {type(family).__name__}, two tasks.\n{report(findings)}")
        for fault in faults:
            print(f"The family says: {fault}")
        found = FOUND if faults or any(not finding.passed for finding in findings) else found
    return found


def _one_task(loop: Any, begun: Any) -> tuple[Any, Any]:
    from learnedopt.core import tree

    batch = loop.batch(begun.tasks, begun.step, "train")
    params, batch = tree.squeeze(tree.narrow((tree.detach(begun.params), batch), 0, 1))
    return params, batch
