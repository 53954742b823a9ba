"""Where the theta of a recipe starts: anew, from another run, or from the stage before."""

from __future__ import annotations

from pathlib import Path

import torch

from learnedopt import checkpoint
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
from learnedopt.recipes.recipe import Recipe


def start_theta(recipe: Recipe, loop: InnerLoop, folder: Path) -> Theta | None:
    """Return where theta starts: at another run's, or None for the loop's own initialisation.

    Raises:
        ValueError: it is of another rule, and the recipe does not say ``start_partly``, or shares nothing with it.
    """
    where = recipe.start if recipe.after is None else folder / recipe.after.name
    if where is None:
        return None
    found = checkpoint.load_checkpoint(where).theta
    own = loop.init_theta(torch.Generator().manual_seed(recipe.seed))
    theta = taken_over(found, own, f"{recipe.name} starts from {where}", partly=recipe.start_partly)
    if recipe.start_partly:
        kept = sorted(found.keys() & own.keys())
        print(f"Of theta {kept} start from {where}, {sorted(own.keys() - found.keys())} anew.", flush=True)
    return theta


def taken_over(found: Theta, own: Theta, told: str, *, partly: bool) -> Theta:
    """Return ``own`` with what is found under the same names; all of them unless ``partly``."""
    shared = found.keys() & own.keys()
    unlike = {k: (tuple(found[k].shape), tuple(own[k].shape)) for k in sorted(shared) if found[k].shape != own[k].shape}
    if unlike:
        raise ValueError(f"{told}, where shapes differ (there, here): {unlike}; start from a rule of the same sizes")
    if not partly and found.keys() != own.keys():
        raise ValueError(
            f"{told}, whose theta is another rule's: {sorted(found.keys() - own.keys())} are not of this one, "
            f"{sorted(own.keys() - found.keys())} are missing; start_partly=true takes what both have"
        )
    if not shared:
        raise ValueError(f"{told}, whose theta {sorted(found)} has no name in common with this rule's {sorted(own)}")
    return {k: found[k] if k in shared else x for k, x in own.items()}
