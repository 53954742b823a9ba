"""Cards: what a learned optimizer knows of itself, for how long it was trained, where it fails, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from learnedopt.card_needs import Needs, needs_of
from learnedopt.checkpoint import Checkpoint, load_checkpoint, own_theta, packaged
from learnedopt.core import tree
from learnedopt.core.bounded import bounded
from learnedopt.core.containers import is_dict, is_mapping
from learnedopt.core.counts import require_count
from learnedopt.core.fingerprint import fingerprint
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta

FIELDS: Mapping[str, str] = {
    "summary": "",
    "trained_on": "Trained on",
    "training_time": "Training time",
    "horizon": "Horizon",
    "evaluated": "Measured",
    "fails": "Where it fails",
    "cost": "Cost of a step",
    "use": "Use",
}
"""What a card says, in one or more sentences each, and how it is headed; the first is one line without a heading."""
HOLDS_UP_TO = "holds_up_to"
"""The one number on a card: the longest run that it was measured on without falling behind."""
ADAM_FLOATS = 2
_MOST = 1 << 22
"""Numbers of a model that a rule was made for; the memory for a larger one is not measured."""
_SIDE = 64  # of the matrix that memory is measured on: a scalar beside it is a thousandth of a byte a parameter


@final
@dataclass(frozen=True)
class Card:
    """What is known of a learned optimizer; ``str`` returns it as Markdown.

    Attributes:
        name: of the packaged optimizer, or the path that was given.
        rule: the registered name of its rule.
        num_numbers: numbers in the rule's theta.
        fingerprint: of the rule and its theta; state dicts carry it.
        state_bytes: bytes of memory that a float32 parameter needs, as the rule's ``init`` allocates them for a matrix,
            or for the parameters that the rule was made for; None where the rule takes neither.
        reads_horizon: whether it must be told how many steps there will be.
        trained_steps: steps of the longest run of its meta-training; None where that is not on record.
        holds_up_to: the longest run that it was measured on without falling behind; None where that is not on record.
        sentences: text by ``FIELDS``: all for the packaged ones; of others, what their files say.
        needs: what must be at hand before it can be loaded, beside the library; None for nothing.
    """

    name: str
    rule: str
    num_numbers: int
    fingerprint: str
    state_bytes: float | None
    reads_horizon: bool
    trained_steps: int | None
    holds_up_to: int | None
    sentences: Mapping[str, str]
    needs: Needs | None = None

    def __str__(self) -> str:
        """Return the card as Markdown."""
        kind = f"**Rule.** `{self.rule}`, {_count(self.num_numbers, 'number')}; fingerprint {self.fingerprint}."
        kinds = [kind, *([f"**Needs.** {self.needs}"] if self.needs else [])]
        headed = [f"**{head}.** {self.sentences[k]}" for k, head in FIELDS.items() if head and k in self.sentences]
        summary = [self.sentences["summary"]] if "summary" in self.sentences else []
        return "\n\n".join([f"## {self.name}", *summary, *kinds, *headed, f"**Memory.** {_memory(self)}"]) + "\n"


def card(name_or_path: str | Path) -> Card:
    """Return the card of a packaged optimizer, a checkpoint file, or a run's folder.

    Raises:
        FileNotFoundError: there is no such file and no such packaged name.
        ValueError: the file is no checkpoint of this library, or its metadata are no card.

    Example:
        >>> learnedopt.card("lstm-mnist").state_bytes  # Adam's is 8
        320.0
    """
    return card_of(load_checkpoint(name_or_path), str(name_or_path))


def card_of(learned: Checkpoint, name: str) -> Card:
    """Return the card of a checkpoint that is loaded, under a name."""
    from learnedopt import optimizers

    theta, written = own_theta(learned.rule, learned.theta), learned.metadata.get("card")
    try:
        trained_steps = _trained_steps(learned.metadata.get("estimator") or {})
        if written is None:
            sentences, holds_up_to = _from_configuration(learned.metadata, learned.rule), None
        else:
            sentences = {k: v for k, v in check_card(written).items() if k in FIELDS}
            holds_up_to = written[HOLDS_UP_TO]
    except (KeyError, TypeError, AttributeError, OverflowError) as error:  # metadata are whatever save was given
        raise ValueError(
            f"the metadata of {name} are neither a card nor a configuration of a meta-training ({error!r})"
        ) from error
    return Card(
        name=name,
        rule=optimizers.describe(learned.rule)["name"],
        num_numbers=sum(value.numel() for value in theta.values()),
        fingerprint=fingerprint(learned.rule, theta),
        state_bytes=state_bytes(learned.rule, theta),
        reads_horizon=learned.rule.reads_horizon,
        trained_steps=trained_steps,
        holds_up_to=holds_up_to,
        sentences=sentences,
        needs=needs_of(learned),
    )


def trained_horizon(card: Card) -> int | None:
    """Return the steps of the longest run that it was trained on or holds in; None where neither is on record."""
    return max((steps for steps in (card.trained_steps, card.holds_up_to) if steps is not None), default=None)


def past_horizon(card: Card, num_steps: int) -> str | None:
    """Return what to warn of in a run of ``num_steps`` steps; None where it is known to hold in them, or nothing is.

    A rule that reads the horizon is told ``num_steps`` before the first step; another one is in its last.
    """
    limit = trained_horizon(card)
    if limit is None or num_steps <= limit:
        return None
    known = f"{card.name} was trained on, or holds in, runs of at most {limit:,} steps"
    if card.reads_horizon:
        return f"{known}, and is told num_steps={num_steps:,}: it may fall behind there. Watch the loss"
    return f"{known}, and this is step {num_steps:,}: it may fall behind or climb from here. Watch the loss"


def check_card(written: Any) -> dict[str, Any]:
    """Return what a file says in its card if it has all of ``FIELDS``, each with text, ``HOLDS_UP_TO``, and no more.

    Raises:
        ValueError: it does not, or its summary is longer than a line.
    """
    needed = (*FIELDS, HOLDS_UP_TO)
    texts = [written.get(k) for k in FIELDS] if is_dict(written) else []
    if not is_dict(written) or {*written} != {*needed} or not all(isinstance(v, str) and v for v in texts):
        missing = [name for name in needed if not (is_dict(written) and written.get(name))]
        foreign = sorted(map(str, {*written} - {*needed})) if is_dict(written) else []
        raise ValueError(
            f"this is no card: without {missing}, and with {foreign} that cards do not have; a card has text for each "
            f"of {', '.join(FIELDS)}, and a number of steps for {HOLDS_UP_TO}"
        )
    if "\n" in written["summary"] or len(written["summary"]) > 160:
        raise ValueError(f"the summary {written['summary']!r} is no line of at most 160 characters")
    require_count(HOLDS_UP_TO, written[HOLDS_UP_TO], least=1)
    return written


def document() -> str:
    """Return docs/packaged.md."""
    intro = (
        "# Packaged optimizers\n\n`LearnedOptimizer(model.named_parameters(), NAME)` takes each of these by name; "
        "`learnedopt list` shows them, `learnedopt card NAME` a card, of a checkpoint of your own as well; "
        "`learnedopt.card(NAME)` returns it. Recipes train each anew from nothing. This page is written by "
        "`benchmarks/package_theta.py` from the cards in the files; the memory is what the rules' `init` allocates.\n"
    )
    cards = [card(name) for name in packaged()]
    rows = [
        f"| `{c.name}` | {c.num_numbers:,} | {_floats(c.state_bytes)} | {'yes' if c.reads_horizon else 'no'} | "
        f"{_steps(c.trained_steps)} | {_steps(c.holds_up_to)} |"
        for c in cards
    ]
    table = [
        "| | numbers | floats of memory a parameter (Adam: 2) | reads the horizon | trained on steps, up to | "
        "holds up to |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join([intro, "\n".join(table) + "\n", *map(str, cards)])


def state_bytes(rule: UpdateRule, theta: Theta) -> float | None:
    """Return the bytes of memory a float32 parameter, to hundredths, or None where the rule takes no such parameters.

    They are those of the leaves of the state that ``init`` returns for a matrix of 64 x 64, or for the parameters
    that the rule was made for: what a rule keeps for a row, a tensor or a whole model is shared out among them.
    """
    from learnedopt import optimizers

    try:
        with bounded(_MOST, len(theta)):
            params = _template(optimizers.describe(rule)) or {"weight": torch.zeros(_SIDE, _SIDE)}
            _, state = rule.within(100).init(theta, params)  # memory does not depend on the horizon
    except (KeyError, ValueError):  # a rule for parameters of certain names, which are not on record, or of many
        return None
    size = sum(p.numel() for p in params.values())
    return round(sum(x.numel() * x.element_size() for x in tree.leaves(state)) / size, 2)


def _template(described: Any) -> Params:
    """Return the parameters of all templates in a rule's description, as zeros."""
    if not is_mapping(described):
        return {}
    found: Params = {}
    for key, value in described.items():
        if key == "template":
            found |= {k: torch.zeros(like["shape"]) for k, like in value.items()}
        else:
            found |= _template(value)
    return found


def _trained_steps(estimator: Mapping[str, Any]) -> int | None:
    """Return the steps of the longest run that an estimator, as it is on record, learns from."""
    if estimator.get("horizons"):
        return max(int(steps) for steps, _ in estimator["horizons"])
    for inner in ("estimator", "back_propagated"):  # of TaskByTask and Combined
        if inner in estimator:
            return _trained_steps(estimator[inner])
    if estimator.get("horizon") is not None:
        return int(estimator["horizon"])
    # Without a horizon the windows of truncation go on for ever; of the others, a run is one window.
    return None if estimator.get("type") == "Truncated" else estimator.get("num_steps")


def _from_configuration(metadata: Mapping[str, Any], rule: UpdateRule) -> dict[str, str]:
    """Say what the configuration of a meta-training says, for a file without a card."""
    family, steps = metadata.get("family"), _trained_steps(metadata.get("estimator") or {})
    reads = f"{'Reads' if rule.reads_horizon else 'Does not read'} it."
    found = {
        "trained_on": "Not on record: the file has no configuration of a meta-training.",
        "horizon": f"{reads} Trained on runs of up to {steps:,} steps." if steps else f"{reads} Not on record.",
        "evaluated": "Not on record; `learnedopt evaluate` measures it beside tuned baselines.",
        "fails": "Not on record.",
    }
    if is_mapping(family):
        given: Mapping[str, Any] = family.get("options") or {}
        options = ", ".join(f"{k}={_short(v)}" for k, v in given.items())
        num_tasks = _count(metadata["num_tasks"], "task")
        last = f"{_count(metadata['num_meta_steps'], 'meta-step')} of {num_tasks} each"
        after = metadata.get("after") or metadata.get("start")
        found["trained_on"] = (
            f"`{family['name']}`{f' ({options})' if options else ''}, {last}, as the recipe `{metadata.get('name')}` "
            f"has it{', after a first training' if after else ''}."
        )
    if metadata.get("best_validation") is not None:
        found["evaluated"] = (
            f"Best in validation: {metadata['best_validation']:.4g}{_validated(metadata.get('validation'))}. Nothing "
            "else is on record; `learnedopt evaluate` measures it beside tuned baselines."
        )
    return found


def _validated(held_out: Any) -> str:
    """Say what a validation measured, behind its value; nothing where that is not on record."""
    if not is_mapping(held_out):
        return ""
    steps, tasks = _count(held_out["num_steps"], "inner step"), _count(held_out["num_tasks"], "held-out task")
    return f" (`{held_out['objective']['type']}` in runs of {steps}, a mean over {tasks})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(value: Any) -> str:
    """Return a value as text, or of a long one how many parts it has."""
    return str(value) if len(str(value)) <= 60 else f"{len(value)} of them"


def _steps(count: int | None) -> str:
    return "not on record" if count is None else f"{count:,}"


def _floats(size: float | None) -> str:
    return "not known" if size is None else f"{size / 4:.3g}"


def _memory(card: Card) -> str:
    if card.state_bytes is None:
        return "Not known: the rule takes parameters of certain names only, which are not on record."
    return (
        f"{_floats(card.state_bytes)} floats a parameter, {card.state_bytes:.3g} bytes in float32; Adam keeps "
        f"{ADAM_FLOATS}, {4 * ADAM_FLOATS} bytes."
    )
