"""Learned optimizers as files: a safetensors file that describes itself, and the same description beside it to read."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from learnedopt.core.files import write_atomically, write_json
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta

FORMAT = "learnedopt-rule-1"


def save(path: str | Path, rule: UpdateRule, theta: Theta, metadata: dict[str, Any] | None = None) -> Path:
    """Write ``theta`` and the description of its rule to ``path``, and the description to a .json beside.

    Args:
        path: where to; the suffix ``.safetensors`` is added where there is none.
        rule: a registered rule, so that it can be built again by name.
        theta: the rule's meta-parameters.
        metadata: anything JSON can hold that is worth knowing, such as how theta was trained.

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
    check_theta(rule, theta, str(path))
    config = {"format": FORMAT, "rule": optimizers.describe(rule), "metadata": metadata or {}}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in theta.items()}
    # The description inside the file is what load reads: one file cannot disagree with itself.
    header = {"learnedopt": json.dumps(config)}
    write_atomically(path, lambda partial: save_file(tensors, str(partial), metadata=header))
    write_json(path.with_suffix(".json"), config)
    return path


def load(path_or_name: str | Path) -> tuple[UpdateRule, Theta]:
    """Return ``(rule, theta)`` from a checkpoint file, a run's folder, or the name of a packaged optimizer.

    Nothing in a file is ever executed: tensors come from safetensors, the rule is built by its registered name.

    Raises:
        FileNotFoundError: there is no such file and no such packaged name.
        ValueError: the file is corrupt, truncated, no checkpoint of this library, or its theta does not fit its rule.

    Example:
        >>> rule, theta = learnedopt.load("lstm-mnist")
    """
    return load_with_metadata(path_or_name)[:2]


def load_with_metadata(path_or_name: str | Path) -> tuple[UpdateRule, Theta, dict[str, Any]]:
    """Return what ``load`` returns, and the metadata that ``save`` was given."""
    from learnedopt import optimizers

    path = _find(path_or_name)
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
        described = config["rule"]
        if config["format"] != FORMAT:
            raise KeyError(config["format"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is a safetensors file, but learnedopt.save did not write it (its header has no {FORMAT!r})"
        ) from error
    try:
        rule = optimizers.build(described)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a rule that cannot be built: {error}") from error
    check_theta(rule, theta, str(path))
    return rule, {k: theta[k] for k in _expected(rule)}, config.get("metadata", {})


def packaged() -> list[str]:
    """Return the names of the optimizers that come with the library."""
    folder = resources.files("learnedopt") / "pretrained"
    return sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir() if p.name.endswith(".safetensors"))


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_dir() and (path / "theta.safetensors").is_file():
        return path / "theta.safetensors"
    if path.is_file():
        return path
    if str(path_or_name) in packaged():
        return Path(str(resources.files("learnedopt") / "pretrained" / f"{path_or_name}.safetensors"))
    raise FileNotFoundError(
        f"{str(path_or_name)!r} is neither a checkpoint file, nor a run's folder with a theta.safetensors, nor one of "
        f"the packaged optimizers {packaged()}"
    )


def _expected(rule: UpdateRule) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}


def check_theta(rule: UpdateRule, theta: Theta, where: str) -> None:
    """Raise ValueError, beginning with ``where``, unless ``theta`` has the names and shapes of the rule's own."""
    expected = {k: tuple(v) for k, v in _expected(rule).items()}
    got = {k: tuple(v.shape) for k, v in theta.items() if isinstance(v, Tensor)} if isinstance(theta, dict) else None
    if expected != got or len(theta) != len(expected):
        raise ValueError(
            f"{where}: theta does not fit the rule {type(rule).__name__}: expected tensors of shapes {expected}, got "
            f"{type(theta).__name__ if got is None else got}"
        )
