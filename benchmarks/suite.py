"""What a workload of the benchmarks is: one meta-gradient, and the competitors that compute it."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

Call: TypeAlias = "Callable[[], list[Tensor]]"
"""One evaluation of the workload; it returns the meta-gradient, in an order that all competitors share."""

BARE = ("learn2learn",)
"""Packages that import data sets and environments, with requirements of their own, when they are imported themselves:
of these only the module that is asked for is run."""


@dataclass(frozen=True)
class Size:
    """How large a workload is.

    Args:
        steps: inner steps.
        tasks: tasks a meta-gradient.
        units: what else can be varied: a hidden width, a number of coordinates; each workload says what, or ignores it.
        dtype: of all floating-point tensors, "float32" or "float64".
    """

    steps: int = 1
    tasks: int = 1
    units: int = 0
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Competitor:
    """One way to compute a workload.

    Args:
        build: makes inputs and models of a size, and returns the call that is measured.
        needs: the module that must be importable beside torch, if any.
        compared: whether its result must agree with the others'; False for what does another job, shown for scale.
        warm_at_size: warm up at the size that is measured before memory is, as what is compiled must be.
    """

    build: Callable[[Size], Call]
    needs: str | None = None
    compared: bool = True
    warm_at_size: bool = False


@dataclass(frozen=True)
class Workload:
    """A meta-gradient, or a step of a frozen optimizer, with its competitors; the first is the one others refer to.

    Args:
        title: of its table.
        text: what is computed, in a sentence or two.
        size: what is measured.
        check: what the gradients are compared at, in float64.
        competitors: by name; those that start with "learnedopt" are this library's.
        reference: the competitor whose gradient the others' are compared with.
        tape: the competitor whose tape of one inner step peaks are also reported in multiples of, if that is wanted.
        per: how many of something a call does, and of what: the CPU time of one is also reported.
    """

    title: str
    text: str
    size: Size
    check: Size
    competitors: Mapping[str, Competitor]
    reference: str
    tape: str | None = None
    per: tuple[int, str] | None = None


def peer(module: str) -> Any:
    """Return a module that is not among the library's dependencies."""
    package = module.split(".", 1)[0]
    if package in BARE:
        _without_inits(module)
    return importlib.import_module(module)


def _without_inits(module: str) -> None:
    """Enter the packages around a module as if they were empty, so that importing it runs nothing else."""
    names = module.split(".")[:-1]
    for package in (".".join(names[: i + 1]) for i in range(len(names))):
        if package not in sys.modules:
            found = importlib.util.find_spec(package)
            if found is None or found.submodule_search_locations is None:
                raise ModuleNotFoundError(f"no package {package}", name=package)
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = list(found.submodule_search_locations)


def absent(competitor: Competitor) -> str | None:
    """Return why a competitor cannot run here, or None."""
    if competitor.needs is not None:
        try:
            peer(competitor.needs)
        except ImportError as error:
            missing = error.name == competitor.needs.split(".", 1)[0]
            return "not installed" if missing else f"does not import: {error}"
    return None


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of two gradients, tensor by tensor, in norm relative to the second's.

    A tensor whose gradient is less than a millionth of the whole's, so that it may be nothing but round-off, is
    measured against that.
    """
    shapes = [[x.shape for x in tensors] for tensors in (found, expected)]
    norms = [float(x.detach().double().norm()) for x in expected]
    whole = math.hypot(*norms)
    if shapes[0] != shapes[1] or not 0 < whole < math.inf:
        raise ValueError(f"gradients of shapes {shapes[0]} and {shapes[1]} and norm {whole:g} cannot be compared")
    distances = [float((a - b).detach().double().norm()) for a, b in zip(found, expected, strict=True)]
    return max(d / max(norm, 1e-6 * whole) for d, norm in zip(distances, norms, strict=True))
