"""Learned optimizers as files: a safetensors file that describes itself, and the same description beside it to read."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from learnedopt.config import split_imaml
from learnedopt.core import theta_file
from learnedopt.core.bounded import bounded
from learnedopt.core.checks import joined_theta
from learnedopt.core.containers import is_dict, is_tuple
from learnedopt.core.files import parse_json, write_json
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.plugged import needed
from learnedopt.core.rule import UpdateRule
from learnedopt.core.theta_file import Described
from learnedopt.core.tree import Theta

FORMAT = "learnedopt-rule-3"
FORMATS = ("learnedopt-rule-1", "learnedopt-rule-2", FORMAT)
"""What is read: the first knew no inner objectives, and had the rule ``imaml``; the first two had no SHA-256."""

_THETA = "theta.safetensors"
_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Kind(NamedTuple):
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
    theta_file.write(path, theta, config)
    write_json(path.with_suffix(".json"), config)
    return path


def load(path_or_name: str | Path) -> tuple[UpdateRule, Theta]:
    """Return ``(rule, theta)`` from a checkpoint file, a run's folder, or the name of a packaged optimizer.

    ``theta`` is the rule's own, without an inner objective's, which ``load_checkpoint`` returns as well. Nothing in a
    file is ever executed: tensors come from safetensors, the rule is built by its registered name. The file's SHA-256
    is in it and compared; what it asks for is refused before it takes memory where the file holds no such theta.

    Raises:
        FileNotFoundError: there is no such file and no such packaged name.
        ValueError: the file is corrupt, truncated, changed since it was written, no checkpoint of this library, or its
            theta does not fit its rule.

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
    found = theta_file.describe(file_of(path_or_name))
    config = _description(found)
    rule, inner_objective, expected = _built(found, config)
    _require_fit(rule, inner_objective, _shapes(expected), found.shapes, str(found.path))
    theta = theta_file.read(found, due=config["format"] == FORMAT)
    _require_dtypes(expected, theta, str(found.path))
    return Checkpoint(rule, inner_objective, {k: theta[k] for k in expected}, config["metadata"])


def own_theta(rule: UpdateRule, theta: Theta) -> Theta:
    """Return the meta-parameters of the rule alone, out of those of a loop."""
    return {k: theta[k] for k in _expected(rule)}


def _description(found: Described) -> dict[str, Any]:
    """Return the description, with metadata, if without any."""
    try:
        config = json.loads("null") if found.text is None else parse_json(found.text)
        if config["format"] not in FORMATS or "rule" not in config:
            raise KeyError(config["format"])
        if not isinstance(config.setdefault("metadata", {}), dict):
            raise TypeError("its metadata are no object")
        config.pop("sha256", None)  # of the file, which theta_file compares
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{found.path} is a safetensors file, but learnedopt.save did not write it (its header has none of "
            f"{', '.join(FORMATS)})"
        ) from error
    return config


def _built(found: Described, config: dict[str, Any]) -> tuple[UpdateRule, InnerObjective, dict[str, Kind]]:
    """Return rule and inner objective as described, and the shapes and types of their theta."""
    from learnedopt import inner_objectives, optimizers

    described, inner = config["rule"], config.get("inner_objective")
    if config["format"] == FORMATS[0]:
        described, inner = split_imaml(described)
    try:
        with bounded(theta_file.num_numbers(found), len(found.shapes)):
            rule = optimizers.build(described)
            inner_objective = TaskLoss() if inner is None else inner_objectives.build(inner)
            return rule, inner_objective, _expected(rule, inner_objective)
    except Exception as error:  # whatever a rule makes of options that nobody would choose
        raise ValueError(
            f"{found.path} describes a rule or inner objective that cannot be built: {error}"
            f"{needed(config['metadata'])}"
        ) from error


def packaged() -> list[str]:
    """Return the names of the optimizers that come with the library; ``learnedopt card NAME`` prints one's card.

    Example:
        >>> "lstm-mnist" in learnedopt.packaged()
        True
    """
    folder = resources.files("learnedopt") / "pretrained"
    return sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir() if p.name.endswith(".safetensors"))


def file_of(path_or_name: str | Path) -> Path:
    """Return the file that ``load`` reads for a checkpoint's path, a run's folder or a packaged name."""
    path = Path(path_or_name)
    if path.is_dir() and (path / _THETA).is_file():
        return path / _THETA
    if path.is_file():
        return path
    known = packaged()
    if str(path_or_name) in known:
        return Path(str(resources.files("learnedopt") / "pretrained" / f"{path_or_name}.safetensors"))
    if (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is the folder of a run without a theta.safetensors: a study leaves none, a meta-training "
            "its best one at its end; name another"
        )
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    there = {each.name: str(each) for each in beside if (each / _THETA).is_file() or each.suffix == ".safetensors"}
    names = {**{name: name for name in known}, **there}
    near = difflib.get_close_matches(path.name, names, n=1)
    raise FileNotFoundError(
        f"{str(path_or_name)!r} is neither a checkpoint file, nor a run's folder with a theta.safetensors, nor one of "
        f"the packaged optimizers {', '.join(known)}" + (f"; did you mean {names[near[0]]!r}?" if near else "")
    )


def _expected(rule: UpdateRule, inner_objective: InnerObjective | None = None) -> dict[str, Kind]:
    theta = joined_theta(rule, inner_objective or TaskLoss(), torch.Generator().manual_seed(0))
    return {k: Kind(tuple(v.shape), v.dtype) for k, v in theta.items()}


def _shapes(expected: dict[str, Kind]) -> dict[str, tuple[int, ...]]:
    return {k: kind.shape for k, kind in expected.items()}


def check_theta(rule: UpdateRule, theta: Theta, where: str, inner_objective: InnerObjective | None = None) -> None:
    """Raise ValueError, beginning with ``where``, unless ``theta`` has the names and shapes of the owners' own.

    Types may differ in precision alone: a theta is trained, and kept, in float64 or bfloat16 as well.
    """
    given = cast("object", theta)  # a user's
    got = {k: tuple(v.shape) for k, v in given.items() if isinstance(v, Tensor)} if is_dict(given) else None
    expected = _expected(rule, inner_objective)
    if got is None or len(theta) != len(got):
        got = {k: type(v).__name__ for k, v in given.items()} if is_dict(given) else type(given).__name__
    _require_fit(rule, inner_objective or TaskLoss(), _shapes(expected), got, where)
    _require_dtypes(expected, theta, where)


def _require_fit(
    rule: UpdateRule, inner_objective: InnerObjective, shapes: dict[str, tuple[int, ...]], got: Any, where: str
) -> None:
    if shapes != got:
        plain = isinstance(inner_objective, TaskLoss)
        descends = "" if plain else f" with the inner objective {type(inner_objective).__name__}"
        raise ValueError(
            f"{where}: theta does not fit the rule {type(rule).__name__}{descends}: expected tensors of shapes "
            f"{shapes}, got {got}; theta of a loop with an inner objective of its own is saved with "
            "inner_objective=loop.inner_objective"
        )


def _require_dtypes(expected: dict[str, Kind], theta: Theta, where: str) -> None:
    for k, kind in expected.items():
        dtype, due = theta[k].dtype, kind.dtype
        if dtype != due and not (dtype in _PRECISIONS and due in _PRECISIONS):
            others = ", or another floating-point type of 16 to 64 bits" if due in _PRECISIONS else ""
            raise ValueError(f"{where}: theta's {k!r} is of {dtype}, the rule's own of {due}: pass that{others}")


def resolve_rule(rule: Any) -> tuple[UpdateRule, Theta]:
    """Return the rule and theta that a packaged name, a checkpoint's path or ``(rule, theta)`` stands for."""
    if isinstance(rule, str | Path):
        return load(rule)
    if is_tuple(rule) and len(rule) == 2 and isinstance(rule[0], UpdateRule):
        found, theta = rule
        check_theta(found, theta, "LearnedOptimizer")
        return found, {k: v.detach().clone() for k, v in theta.items()}
    raise TypeError(
        f"a {type(rule).__name__} is no learned optimizer; pass the name of a packaged one, the path of a checkpoint, "
        "or (rule, theta), where theta is the rule's own, from init_theta or a MetaTrainer"
    )
