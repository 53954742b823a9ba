"""The commands ``learnedopt list`` and ``card``: what there is, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def list_all() -> int:
    """List the update rules, objectives, estimators, task families, recipes and packaged optimizers, one line each."""
    from learnedopt import cards, checkpoint, recipes
    from learnedopt.estimators.registry import ESTIMATORS
    from learnedopt.inner_objectives.registry import INNER_OBJECTIVES
    from learnedopt.objectives.registry import OBJECTIVES
    from learnedopt.optimizers.registry import RULES
    from learnedopt.tasks.registry import FAMILIES

    for title, registry in (("Update rules", RULES), ("Inner objectives", INNER_OBJECTIVES)):
        _print(title, {name: registry.factory(name).__doc__ for name in registry.names()})
    for title, group in (("Gradient estimators", ESTIMATORS), ("Meta-objectives", OBJECTIVES)):
        _print(title, {kind.__name__: kind.__doc__ for kind in group})
    _print("Task families", {name: FAMILIES.factory(name).__doc__ for name in FAMILIES.names()})
    _print("Recipes (learnedopt train NAME --help)", {name: recipes.summary(name) for name in recipes.names()})
    summaries = {name: cards.card(name).sentences["summary"] for name in checkpoint.packaged()}
    _print("Packaged optimizers (learnedopt card NAME)", summaries)
    return 0


def _print(title: str, about: Mapping[str, str | None]) -> None:
    """Print names with the first line that is said of each."""
    print(f"{title}:")
    for name, text in about.items():
        first, *_ = (text or "").strip().splitlines() or [""]
        print(f"  {name:25} {first.replace('``', '')}".rstrip())


def print_cards(name: Sequence[str]) -> int:
    """Say what a learned optimizer was trained and measured on, where it fails, and what it costs.

    Args:
        name: packaged names, checkpoints, or folders of runs
    """
    from learnedopt import cards

    print(*map(cards.card, name), sep="\n", end="")
    return 0
