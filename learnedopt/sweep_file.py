"""Sweeps as W&B writes them down in YAML: the settings to try, how they are drawn, and what is compared."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from learnedopt.core.counts import require_count
from learnedopt.core.registry import nearest_or_all

_KEYS = (
    "name", "description", "project", "entity", "program", "command", "method", "metric", "parameters",
    "early_terminate", "run_cap",
)  # fmt: skip
_RANGES = ("uniform", "int_uniform", "log_uniform_values")
_INCOMPARABLE = ("validation", "family")
OF_A_STEP = ("meta_loss", "mean_meta_loss", "inner_loss")
"""Metrics of other tasks, or of another window, at each meta-step: no two trials, nor two rows, can be compared by."""


class Trial(NamedTuple):
    """One setting: its name, the same for the same values and command, and the values by field of the recipe."""

    name: str
    values: Mapping[str, Any]

    @property
    def assignments(self) -> list[str]:
        """The values as the command line takes them."""
        return [f"{key}={value}" for key, value in self.values.items()]


@dataclass(frozen=True)
class Halving:
    """Successive halving: after so many values of the metric, 1 of ``eta`` settings goes on.

    Args:
        counts: of values told so far, one for each time that settings are dropped.
        eta: at least 2.
    """

    counts: tuple[int, ...]
    eta: int


@dataclass(frozen=True)
class Sweep:
    """What a file says; see ``read_sweep``."""

    name: str
    command: tuple[str, ...]
    method: str
    metric: str
    maximize: bool
    parameters: Mapping[str, Mapping[str, Any]]
    early_terminate: Mapping[str, Any] | None = None
    run_cap: int | None = None

    def trials(self, number: int | None = None, seed: int = 0) -> list[Trial]:
        """Return the settings to try: of a grid all or the first ``number``, else as many different ones, drawn.

        The first ones are the same for every number.

        Raises:
            ValueError: nothing says how many are to be drawn, or ``number`` is no positive count.
        """
        number = self.run_cap if number is None else number
        if number is not None:
            require_count("trials", number, least=1)
        if self.method == "grid":
            choices = [_values(spec) for spec in self.parameters.values()]
            drawn = (dict(zip(self.parameters, each, strict=True)) for each in itertools.product(*choices))
            return [self._trial(values) for values in itertools.islice(drawn, number)]
        if number is None:
            raise ValueError(
                f"the sweep {self.name} draws settings without end: say how many, or set run_cap in its file"
            )
        found: dict[str, Trial] = {}
        for draw in range(100 * number):  # a few choices have no more than so many different settings
            generator = random.Random(f"{seed} {draw}")
            trial = self._trial({key: _draw(spec, generator) for key, spec in self.parameters.items()})
            if len(found) < number:
                found.setdefault(trial.name, trial)
        return [*found.values()]

    def _trial(self, values: Mapping[str, Any]) -> Trial:
        # The command counts: what a folder holds of another recipe is not taken for this one's.
        told = json.dumps([self.command, values], sort_keys=True)
        return Trial(hashlib.sha256(told.encode()).hexdigest()[:8], values)

    def halving(self, num_settings: int) -> Halving | None:
        """Return when settings are dropped, of so many at the start; None for never."""
        if self.early_terminate is None:
            return None
        said = self.early_terminate
        eta = said.get("eta", 3)
        if "min_iter" in said:
            times = math.ceil(math.log(max(num_settings, 1), eta) - 1e-9)
            return Halving(tuple(said["min_iter"] * eta**k for k in range(times)), eta)
        counts = {said["max_iter"] // eta**k for k in range(1, said.get("s", 1) + 1)}
        return Halving(tuple(sorted(counts - {0})), eta)


def read_sweep(path: Path) -> Sweep:
    """Return the sweep that a file of W&B's format describes.

    Of that format there are here: the methods grid and random; ``value``, ``values``, and ``min`` with ``max`` for a
    uniform number, or a distribution out of uniform, int_uniform and log_uniform_values; hyperband for
    ``early_terminate``, which the local runner takes as successive halving; ``run_cap``.

    Raises:
        ValueError: there is no such file, it is no sweep, has what is not among these, changes what is measured from
            trial to trial, or compares by a metric that is not of the same tasks at each step.
    """
    import yaml

    if not path.is_file():
        raise ValueError(
            f"there is no file {str(path)!r}; name a sweep: YAML with method, metric, parameters and command "
            "(docs/follow_runs.md has one)"
        )
    try:
        said = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no sweep: it needs method, metric, parameters and command")
    for key in said:
        if key not in _KEYS:
            raise ValueError(
                f"{path} has {key!r}, which the local runner does not know{nearest_or_all(str(key), _KEYS)}"
            )
    missing = [key for key in ("method", "metric", "parameters", "command") if not said.get(key)]
    if missing:
        raise ValueError(f"{path} is no sweep: it lacks {' and '.join(missing)}")
    _require_method(path, said["method"])
    _require_shape(path, said)
    for key, spec in said["parameters"].items():
        _require_spec(path, key, spec, said["method"])
    _require_end(path, said.get("early_terminate"))
    if "program" not in said and "${program}" in said["command"]:
        raise ValueError(f"{path}: the command has ${{program}}, and there is no program")
    command = [said["program"] if word == "${program}" else str(word) for word in said["command"]]
    goal = said["metric"].get("goal", "minimize")
    return Sweep(
        said.get("name", path.stem), tuple(command), said["method"], said["metric"]["name"], goal == "maximize",
        said["parameters"], said.get("early_terminate"), said.get("run_cap"),
    )  # fmt: skip


def _require_method(path: Path, method: Any) -> None:
    if method == "bayes":
        raise ValueError(f"{path}: method='bayes' needs W&B's server (wandb sweep); here: grid or random")
    if method not in ("grid", "random"):
        raise ValueError(
            f"{path}: method={method!r} is none of grid, random and bayes (by W&B's server alone); for successive "
            "halving write method: random and early_terminate: {type: hyperband, min_iter: 3, eta: 3}"
        )


def _require_shape(path: Path, said: Mapping[str, Any]) -> None:
    metric, parameters, command = said["metric"], said["parameters"], said["command"]
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        raise ValueError(f"{path}: metric={metric!r} names none: write metric: {{name: best_validation}}")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise ValueError(f"{path}: metric.goal={metric['goal']!r} is neither minimize nor maximize")
    if metric["name"] in OF_A_STEP:
        raise ValueError(
            f"{path}: metric.name={metric['name']!r} is of other tasks, or of another window of the episode, at each "
            "meta-step, so trials could not be compared; write best_validation"
        )
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise ValueError(f"{path}: parameters={parameters!r} are no fields of a recipe by name, with their values")
    if not isinstance(command, list):
        raise ValueError(f"{path}: command={command!r} is no list of words, as [python, ...]")
    if said.get("run_cap") is not None:
        require_count(f"{path}: run_cap", said["run_cap"], least=1)


def _require_spec(path: Path, key: str, spec: Any, method: str) -> None:
    if key.partition(".")[0] in _INCOMPARABLE:
        raise ValueError(f"{path}: {key} changes what is measured, so trials could not be compared; leave it as it is")
    if isinstance(spec, Mapping) and spec.keys() == {"values"}:
        if not isinstance(spec["values"], list) or not spec["values"]:
            raise ValueError(f"{path}: {key}.values={spec['values']!r} is no list of values to try")
    elif not isinstance(spec, Mapping) or spec.keys() != {"value"}:
        ranged = isinstance(spec, Mapping) and {"min", "max"} <= spec.keys() <= {"min", "max", "distribution"}
        if not ranged or spec.get("distribution", "uniform") not in _RANGES:
            raise ValueError(
                f"{path}: {key}: {spec!r} is neither value, values, nor min and max with a distribution out of "
                f"{', '.join(_RANGES)}"
            )
        if method == "grid":
            raise ValueError(f"{path}: {key} is a range, and a grid needs values: list them, or set method: random")
        for bound in ("min", "max"):
            if isinstance(spec[bound], bool) or not isinstance(spec[bound], int | float):
                raise ValueError(f"{path}: {key}.{bound}={spec[bound]!r} is no number (YAML wants 1.0e-3 for 1e-3)")
        logarithmic = spec.get("distribution") == "log_uniform_values"
        if spec["min"] > spec["max"] or (logarithmic and spec["min"] <= 0):
            raise ValueError(
                f"{path}: {key}: {spec!r} is no range: min above max, or a logarithm of what is not above 0"
            )


def _require_end(path: Path, said: Any) -> None:
    if said is None:
        return
    counts = ("min_iter", "max_iter", "s", "eta")
    if not isinstance(said, Mapping) or said.get("type") != "hyperband" or said.keys() - {"type", *counts}:
        raise ValueError(f"{path}: early_terminate={said!r} is not hyperband with {', '.join(counts)}")
    if ("min_iter" in said) == ("max_iter" in said):
        raise ValueError(f"{path}: early_terminate needs either min_iter or max_iter")
    for name in said.keys() & set(counts):
        require_count(f"{path}: early_terminate.{name}", said[name], least=2 if name == "eta" else 1)


def _values(spec: Mapping[str, Any]) -> Sequence[Any]:
    return [spec["value"]] if "value" in spec else spec["values"]


def _draw(spec: Mapping[str, Any], generator: random.Random) -> Any:
    if "min" not in spec:
        return generator.choice(_values(spec))
    low, high = spec["min"], spec["max"]
    whole = isinstance(low, int) and isinstance(high, int)
    kind = spec.get("distribution", "int_uniform" if whole else "uniform")
    if kind == "int_uniform":
        return generator.randint(low, high)
    if kind == "uniform":
        return generator.uniform(low, high)
    return math.exp(generator.uniform(math.log(low), math.log(high)))
