"""Cards of the packaged optimizers: what each was trained on, what it was measured on, and where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learnedopt.checkpoint import load_checkpoint, packaged

FIELDS: Mapping[str, str] = {
    "summary": "",
    "trained_on": "Trained on",
    "training_time": "Training time",
    "horizon": "Horizon",
    "evaluated": "Measured",
    "fails": "Where it fails",
    "use": "Use",
}
"""What a card holds, in one or more sentences each, and how it is headed; the first is one line without a heading."""


def check_card(card: Any) -> dict[str, str]:
    """Return the card if it has all of ``FIELDS``, each with text, and nothing else.

    Raises:
        ValueError: it does not, or its summary is longer than a line.
    """
    if not isinstance(card, dict) or {*card} != {*FIELDS} or not all(isinstance(v, str) and v for v in card.values()):
        missing = [name for name in FIELDS if not (isinstance(card, dict) and card.get(name))]
        foreign = sorted(map(str, {*card} - {*FIELDS})) if isinstance(card, dict) else []
        raise ValueError(
            f"this is no card: without {missing}, and with {foreign} that cards do not have; a card has text for each "
            f"of {', '.join(FIELDS)}"
        )
    if "\n" in card["summary"] or len(card["summary"]) > 160:
        raise ValueError(f"the summary {card['summary']!r} is no line of at most 160 characters")
    return card


def card(name: str) -> dict[str, str]:
    """Return the card of a packaged optimizer, text by ``FIELDS``.

    Raises:
        FileNotFoundError: there is no packaged optimizer of that name.
    """
    if name not in packaged():
        load_checkpoint(name)  # says what there is, for what is neither packaged nor a file
        raise FileNotFoundError(f"{name!r} is not packaged, so it has no card; there are {packaged()}")
    return check_card(load_checkpoint(name).metadata.get("card"))


def text(name: str) -> str:
    """Return the card as Markdown, with the rule and the number of its meta-parameters."""
    found, learned = card(name), load_checkpoint(name)
    size = sum(value.numel() for value in learned.theta.values())
    kind = f"`{learned.metadata['rule']['name']}`, {size:,} numbers."
    headed = [f"**{head}.** {found[field]}" for field, head in FIELDS.items() if head]
    return "\n\n".join([f"## {name}", found["summary"], f"**Rule.** {kind}", *headed]) + "\n"


def document() -> str:
    """Return docs/packaged.md."""
    intro = (
        "# Packaged optimizers\n\n`LearnedOptimizer(model.named_parameters(), NAME)` takes each of these by name; "
        "`learnedopt list` shows them, `learnedopt list NAME` a card. Recipes train each anew from nothing. This page "
        "is written by `benchmarks/package_theta.py` from the cards in the files.\n"
    )
    return "\n".join([intro, *map(text, packaged())])
