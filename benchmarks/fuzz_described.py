"""Files whose form is whole and whose SHA-256 is right, but that say anything: what hypothesis thinks of."""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.fuzz_targets import Target
from learnedopt import cards, checkpoint, optimizers, tasks
from learnedopt.core import sealed
from learnedopt.evaluation import runs
from learnedopt.optimizers.registry import RULES
from learnedopt.training import training_file

_WORDS = [
    "name", "options", "lr", "learn", "rule", "template", "shape", "dtype", "float32", "hidden_size", "format", "type",
    "root", "lists", "../../secret", "/etc", "family", "meta_split", "num_steps", "card", "estimator", "inner", "NaN",
    *optimizers.names(), *tasks.names(),
]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-5, 5), st.sampled_from([10**3, 10**6, 10**9, 2**31, 2**63, 10**20]), st.floats(), st.booleans()
)
LEAVES = st.one_of(st.none(), NUMBERS, st.sampled_from(_WORDS), st.text(max_size=5))
JSON = st.recursive(
    LEAVES,
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.dictionaries(st.sampled_from(_WORDS), inside, max_size=4),
        st.builds(lambda name, options: {"name": name, "options": options}, st.sampled_from(_WORDS), st.dictionaries(
            st.sampled_from(_WORDS), inside, max_size=3)),
    ),
    max_leaves=12,
)  # fmt: skip
TENSORS = st.builds(
    lambda shape, value: torch.full(shape, value, dtype=torch.float32),
    st.sampled_from([(), (1,), (2,), (0,), (2, 2)]), st.floats(width=32),
)  # fmt: skip
PLAIN = st.one_of(JSON, TENSORS, st.tuples(LEAVES, LEAVES), st.dictionaries(st.integers(0, 3), LEAVES, max_size=2))
Read = Callable[[Target, Path, Any, Any, str], None]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each place in nested dicts and lists, but the outermost."""
    found = [] if not path else [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, child in children for place in places(child, (*path, key))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with something else in a place."""
    value = copy.deepcopy(value)
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = new
    return value


def described(num_inputs: int, kinds: dict[str, Target], result: dict[str, Any], read: Read) -> None:
    """Read so many files that say anything, and count."""
    writers = {
        "theta": _theta, "training state": _state, "training state of before": _state, "run": _record, "suite": _record,
        "study": _record,
    }  # fmt: skip
    each = -(-num_inputs // (len(writers) + 1))
    for name, write in writers.items():
        target = kinds[name]
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LEARNEDOPT_CACHE"] = folder
            path = Path(folder) / target.file
            path.parent.mkdir(parents=True, exist_ok=True)
            target.make(path)
            strategy, fill = write(path)

            _run(strategy, _reader(target, path, fill, result[name], read), each)
    record = Target("record", lambda path: None, _read_record, False, (ValueError, TypeError, FileNotFoundError))
    found = result["evaluate's record"] = type(result["theta"])()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record"

        one = _reader(record, path, lambda path, value: path.write_text(json.dumps(value)), found, read)
        options = st.dictionaries(st.sampled_from(_WORDS), JSON, max_size=3)
        family = st.builds(
            lambda name, options: {"name": name, "options": options}, st.sampled_from(tasks.names()), options
        )
        valid = st.builds(lambda options: {"family_options": options}, options)
        _run(st.fixed_dictionaries({"family": st.one_of(family, JSON)}, optional={"validation": valid}), one, each)


def _reader(target: Target, path: Path, fill: Any, found: Any, read: Read) -> Callable[[Any], None]:
    def one(value: Any) -> None:
        try:
            fill(path, value)
        except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
            return  # no file can hold it
        read(target, path, None, found, f"described {_shown(value)}")

    return one


def _shown(value: Any) -> str:
    try:
        return str(value)[:300]
    except RuntimeError:  # a Counter sorts its values, and tensors have no order
        return f"a {type(value).__name__}"


def _run(strategy: st.SearchStrategy[Any], one: Callable[[Any], None], num_inputs: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    given(strategy)(
        settings(
            max_examples=num_inputs, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=checks,
        )(one)
    )()  # fmt: skip


def _theta(path: Path) -> tuple[Any, Any]:
    rule = optimizers.make("lstm", hidden_size=1)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    config = {"format": checkpoint.FORMATS[1], "rule": optimizers.describe(rule), "metadata": {"seed": 3}}
    strategy = st.one_of(
        st.builds(lambda place, new: put(config, place, new), st.sampled_from(places(config)), JSON),
        st.builds(lambda rule, metadata: {**config, "rule": rule, "metadata": metadata}, JSON, JSON),
        st.builds(lambda rule: {**config, "rule": rule}, _rules()),
        st.builds(lambda card: {**config, "metadata": {"card": card}}, _cards()),
        st.builds(lambda estimator: {**config, "metadata": {"estimator": estimator}}, JSON),
        st.builds(lambda inner: {**config, "inner_objective": inner}, JSON),
    )
    return strategy, lambda path, value: save_file(theta, path, metadata={"learnedopt": json.dumps(value)})


@st.composite
def _rules(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a rule that there is, with options that it has."""
    name = draw(st.sampled_from(list(RULES.table)))
    known = list(inspect.signature(RULES.factory(name)).parameters)
    template = {"w": {"shape": draw(st.lists(st.integers(0, 10**6), max_size=3)), "dtype": "float32"}}
    options = draw(st.dictionaries(st.sampled_from([*known, "lr"]), st.one_of(NUMBERS, JSON), max_size=3))
    return {"name": name, "options": options | ({"template": template} if draw(st.booleans()) else {})}


def _cards() -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({k: st.one_of(st.text(max_size=5), JSON) for k in (*cards.FIELDS, cards.HOLDS_UP_TO)})


def _state(path: Path) -> tuple[Any, Any]:
    content, _ = training_file.read(path)
    strategy = st.builds(lambda place, new: put(content, place, new), st.sampled_from(places(content)), PLAIN)
    return strategy, training_file.write


def _record(path: Path) -> tuple[Any, Any]:
    content = sealed.read_record(path)
    strategy = st.builds(lambda place, new: put(content, place, new), st.sampled_from(places(content)), JSON)
    return strategy, sealed.write_record


def _read_record(path: Path) -> Any:
    learned: Any = SimpleNamespace(metadata=json.loads(path.read_text()))
    return repr(runs.families({"a": learned})[0])
