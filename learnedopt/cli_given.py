"""What evaluations are given on the command line: checkpoints, options of a family, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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


def require_own(path: Path, asked: Mapping[str, Any]) -> None:
    """Raise ValueError where ``path`` holds an evaluation with other settings, which this one would take the place of.

    What it does not say of itself does not count.
    """
    from learnedopt.core.files import parse_json, plain_json

    if not path.exists():
        return
    try:
        held = _flat(parse_json(path.read_bytes())["settings"])
        wanted = _flat(plain_json(asked))
        others = [f"{key}={held[key]}" for key, value in wanted.items() if held.get(key, value) != value]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no evaluation ({error!r}); name another --out, or remove it") from error
    if others:
        told = f"{path} is an evaluation with other settings ({'; '.join(others)})"
        raise ValueError(f"{told}: name another --out, or remove it")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    family = settings["family"]
    options = {f"family.{key}": value for key, value in family["options"].items()}
    return {**settings, "family": family["name"], **options}


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
