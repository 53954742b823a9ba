"""What evaluations are given on the command line: checkpoints, options of a family, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnedopt.checkpoint import Checkpoint


def use_threads(threads: int) -> None:
    """Let torch use so many threads."""
    import torch

    from learnedopt.core.counts import require_count

    require_count("--threads", threads, least=1)
    torch.set_num_threads(threads)


def load_all(checkpoints: Sequence[str]) -> dict[str, Checkpoint]:
    """Return what the checkpoints hold, by what each is called in tables."""
    from learnedopt.checkpoint import load_checkpoint
    from learnedopt.evaluation.runs import labelled

    return {label: load_checkpoint(name) for label, name in labelled(checkpoints).items()}


def options_of(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the options of a family as ``KEY=VALUE`` say."""
    from learnedopt.typed_values import read_value

    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {assignment!r} is not of the form KEY=VALUE, such as --set batch_size=64")
        settings[key] = read_value(text)
    return settings


def baselines_of(text: str) -> Mapping[str, Any]:
    """Return the baselines of a name, or of labels as ``A;B``."""
    from learnedopt.evaluation.evaluate import BASELINES
    from learnedopt.evaluation.grids import named

    return BASELINES if text == "plain" else named(text)
