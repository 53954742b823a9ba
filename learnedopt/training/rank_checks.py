"""What must be the same on all ranks before they train together."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from learnedopt.core.containers import is_mapping
from learnedopt.core.fingerprint import words
from learnedopt.training.ranks import Ranks

if TYPE_CHECKING:
    from learnedopt.training.trainer import MetaTrainer

_SHOWN = 80


def require_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Compare what is to be trained, and with which versions, on all ranks.

    Args:
        ranks: all of them.
        facts: by name; numbers, text, dataclasses, and nested mappings of them.

    Raises:
        ValueError: on every rank, naming what differs and where.
    """
    if ranks.alone:
        return
    versions = {"learnedopt": sys.modules["learnedopt"].__version__, "torch": str(torch.__version__)}
    found = ranks.everyones(_flat({**versions, **facts}), "the comparison of what ranks train")
    told: list[str] = []
    for key in dict.fromkeys(k for each in found for k in each):
        others = [r for r, each in enumerate(found) if each.get(key) != found[0].get(key)]
        if others:
            first = others[0]
            more = f" (so do {len(others) - 1} more)" if len(others) > 1 else ""
            told.append(
                f"{key} is {_shown(found[first], key)} on rank {first}{more}, {_shown(found[0], key)} on rank 0"
            )
    if told:
        raise ValueError(
            f"the ranks do not train the same: {'; '.join(told)}; start all of them with one command and one "
            "installation"
        )


def require_ready(trainer: MetaTrainer, num_meta_steps: int) -> None:
    """Check that all ranks are to train the same, that each has something to do, and let theta be rank 0's on all.

    Raises:
        ValueError: on every rank.
    """
    ranks = trainer.ranks
    num_parts, whose = trainer.estimator.num_parts, type(trainer.estimator).__name__
    if ranks.size > trainer.num_tasks * num_parts:
        parts = f", or one of the {num_parts} parts in which {whose} estimates it" if num_parts > 1 else ""
        raise ValueError(
            f"num_tasks={trainer.num_tasks} tasks a meta-batch cannot be shared by {ranks.size} processes: each needs "
            f"one{parts} at least; take more tasks, or start fewer processes"
        )
    theta = {k: f"{x.dtype} {tuple(x.shape)}" for k, x in trainer.theta.items()}
    things = {name: getattr(trainer, name) for name in _THINGS}
    things |= {name: getattr(trainer.loop, name) for name in _OF_LOOP}
    own = {"num_meta_steps": num_meta_steps, "theta": theta, "checkpoint": trainer.checkpoint is not None}
    require_same(ranks, {**things, **own})
    ranks.follow([*trainer.theta.values()], "the theta to start from")


_THINGS = (
    "config", "num_tasks", "seed", "estimator", "objective", "validation", "steadying", "max_grad_norm",
    "micro_batch", "max_failed_share", "checkpoint_every", "max_skips_in_a_row",
)  # fmt: skip
"""What of a trainer must be alike."""
_OF_LOOP = ("family", "rule", "inner_objective", "horizon")
"""What of its loop: options of dataclasses, of others the class."""


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return facts as text, those of nested mappings by dotted names."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        if is_mapping(value):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else " ".join(words(value))
    return found


def _shown(facts: Mapping[str, str], key: str) -> str:
    text = facts.get(key)
    if text is None:
        return "not there"
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
