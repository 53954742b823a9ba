"""Learned optimizers as files: a safetensors file that describes itself, and the same description beside it to read."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from learnedopt.config import split_imaml
from learnedopt.core.checks import joined_theta
from learnedopt.core.files import write_atomically, write_json
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta

FORMAT = "learnedopt-rule-2"
FORMATS = ("learnedopt-rule-1", FORMAT)
"""What is read: the first knew no inner objectives, and had the rule ``imaml``."""


class Checkpoint(NamedTuple):
    """What a file holds: ``theta`` is the rule's and the inner objective's, as ``InnerLoop`` takes it."""

    rule: UpdateRule
    inner_objective: InnerObjective
    theta: Theta
    metadata: dict[str, Any]


def save(
    path: str | Path,
    rule: UpdateRule,
    theta: Theta,
    metadata: dict[str, Any] | None = None,
    inner_objective: InnerObjective | None = None,
) -> Path:
    """Write ``theta`` and the description of its rule to ``path``, and the description to a .json beside.

    Args:
        path: where to; the suffix ``.safetensors`` is added where there is none.
        rule: a registered rule, so that it can be built again by name.
        theta: the meta-parameters of the rule, and of the inner objective where there are some.
        metadata: anything JSON can hold that is worth knowing, such as how theta was trained.
        inner_objective: what the inner steps descended, a registered one; by default the task's loss.

    Returns:
        The path written.

    Example:
        >>> learnedopt.save("my-optimizer", rule, theta)
        >>> rule, theta = learnedopt.load("my-optimizer.safetensors")
    """
    from learnedopt import optimizers

    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    check_theta(rule, theta, str(path), inner_objective)
    config = {"format": FORMAT, "rule": optimizers.describe(rule), "metadata": metadata or {}}
    if inner_objective is not None and not isinstance(inner_objective, TaskLoss):
        from learnedopt import inner_objectives

        config["inner_objective"] = inner_objectives.describe(inner_objective)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in theta.items()}
    # The description inside the file is what load reads: one file cannot disagree with itself.
    header = {"learnedopt": json.dumps(config)}
    write_atomically(path, lambda partial: save_file(tensors, str(partial), metadata=header))
    write_json(path.with_suffix(".json"), config)
    return path


def load(path_or_name: str | Path) -> tuple[UpdateRule, Theta]:
    """Return ``(rule, theta)`` from a checkpoint file, a run's folder, or the name of a packaged optimizer.

    ``theta`` is the rule's own, without an inner objective's, which ``load_checkpoint`` returns as well. Nothing in a
    file is ever executed: tensors come from safetensors, the rule is built by its registered name.

    Raises:
        FileNotFoundError: there is no such file and no such packaged name.
        ValueError: the file is corrupt, truncated, no checkpoint of this library, or its theta does not fit its rule.

    Example:
        >>> rule, theta = learnedopt.load("lstm-mnist")
    """
    return load_with_metadata(path_or_name)[:2]


def load_with_metadata(path_or_name: str | Path) -> tuple[UpdateRule, Theta, dict[str, Any]]:
    """Return what ``load`` returns, and the metadata that ``save`` was given."""
    rule, _, theta, metadata = load_checkpoint(path_or_name)
    return rule, own_theta(rule, theta), metadata


def load_checkpoint(path_or_name: str | Path) -> Checkpoint:
    """Return everything that ``save`` was given; see ``load``.

    Example:
        >>> rule, inner_objective, theta, _ = load_checkpoint("runs/imaml-omniglot")
        >>> loop = InnerLoop(family, rule, inner_objective=inner_objective)
    """
    from learnedopt import optimizers

    path = _find(path_or_name)
    config, theta = _read(path)
    described, inner = config["rule"], config.get("inner_objective")
    if config["format"] == FORMATS[0]:
        described, inner = split_imaml(described)
    try:
        rule, inner_objective = optimizers.build(described), TaskLoss()
        if inner is not None:
            from learnedopt import inner_objectives

            inner_objective = inner_objectives.build(inner)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a rule or inner objective that cannot be built: {error}") from error
    check_theta(rule, theta, str(path), inner_objective)
    return Checkpoint(
        rule, inner_objective, {k: theta[k] for k in _expected(rule, inner_objective)}, config.get("metadata", {})
    )


def own_theta(rule: UpdateRule, theta: Theta) -> Theta:
    """Return the meta-parameters of the rule alone, out of those of a loop."""
    return {k: theta[k] for k in _expected(rule)}


def _read(path: Path) -> tuple[dict[str, Any], Theta]:
    """Return the description and the tensors of a file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            theta = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no readable safetensors file ({error}); it is corrupt or cut short: write it again"
        ) from error
    try:
        config = json.loads(header["learnedopt"])
        if config["format"] not in FORMATS or "rule" not in config:
            raise KeyError(config["format"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is a safetensors file, but learnedopt.save did not write it (its header has none of "
            f"{', '.join(FORMATS)})"
        ) from error
    return config, theta


def packaged() -> list[str]:
    """Return the names of the optimizers that come with the library; ``learnedopt card NAME`` prints one's card.

    Example:
        >>> "lstm-mnist" in learnedopt.packaged()
        True
    """
    folder = resources.files("learnedopt") / "pretrained"
    return sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir() if p.name.endswith(".safetensors"))


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_dir() and (path / "theta.safetensors").is_file():
        return path / "theta.safetensors"
    if path.is_file():
        return path
    known = packaged()
    if str(path_or_name) in known:
        return Path(str(resources.files("learnedopt") / "pretrained" / f"{path_or_name}.safetensors"))
    near = difflib.get_close_matches(str(path_or_name), known, n=1)
    raise FileNotFoundError(
        f"{str(path_or_name)!r} is neither a checkpoint file, nor a run's folder with a theta.safetensors, nor one of "
        f"the packaged optimizers {known}" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _expected(rule: UpdateRule, inner_objective: InnerObjective | None = None) -> dict[str, torch.Size]:
    theta = joined_theta(rule, inner_objective or TaskLoss(), torch.Generator().manual_seed(0))
    return {k: v.shape for k, v in theta.items()}


def check_theta(rule: UpdateRule, theta: Theta, where: str, inner_objective: InnerObjective | None = None) -> None:
    """Raise ValueError, beginning with ``where``, unless ``theta`` has the names and shapes of the owners' own."""
    expected = {k: tuple(v) for k, v in _expected(rule, inner_objective).items()}
    got = {k: tuple(v.shape) for k, v in theta.items() if isinstance(v, Tensor)} if isinstance(theta, dict) else None
    if expected != got or len(theta) != len(expected):
        plain = inner_objective is None or isinstance(inner_objective, TaskLoss)
        descends = "" if plain else f" with the inner objective {type(inner_objective).__name__}"
        raise ValueError(
            f"{where}: theta does not fit the rule {type(rule).__name__}{descends}: expected tensors of shapes "
            f"{expected}, got {type(theta).__name__ if got is None else got}; theta of a loop with an inner objective "
            "of its own is saved with inner_objective=loop.inner_objective"
        )


def resolve_rule(rule: Any) -> tuple[UpdateRule, Theta]:
    """Return the rule and theta that a packaged name, a checkpoint's path or ``(rule, theta)`` stands for."""
    if isinstance(rule, str | Path):
        return load(rule)
    if isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], UpdateRule):
        found, theta = rule
        check_theta(found, theta, "LearnedOptimizer")
        return found, {k: v.detach().clone() for k, v in theta.items()}
    raise TypeError(
        f"a {type(rule).__name__} is no learned optimizer; pass the name of a packaged one, the path of a checkpoint, "
        "or (rule, theta), where theta is the rule's own, from init_theta or a MetaTrainer"
    )
