"""The commands ``learnedopt list`` and ``card``: what there is, and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence


def list_all() -> int:
    """List the update rules, objectives, estimators, task families, recipes and packaged optimizers."""
    from learnedopt import cards, checkpoint, estimators, inner_objectives, objectives, optimizers, recipes, tasks

    print("Update rules:", ", ".join(optimizers.names()))
    print("Inner objectives:", ", ".join(inner_objectives.names()))
    print("Gradient estimators:", ", ".join(estimators.names()))
    print("Meta-objectives:", ", ".join(objectives.names()))
    print("Task families:", ", ".join(tasks.names()))
    print("Recipes:", ", ".join(recipes.names()))
    print("Packaged optimizers (learnedopt card NAME says more):")
    for name in checkpoint.packaged():
        print(f"  {name:22} {cards.card(name).sentences['summary']}")
    return 0


def print_cards(name: Sequence[str]) -> int:
    """Say what a learned optimizer was trained and measured on, where it fails, and what it costs.

    Args:
        name: packaged names, checkpoints, or folders of runs
    """
    from learnedopt import cards

    print(*map(cards.card, name), sep="\n", end="")
    return 0
