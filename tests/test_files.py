"""Files that are read again: every turned bit is told, what is hostile is refused in bounds, and nothing touched."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import learnedopt
from learnedopt import (
    Combined,
    EvolutionStrategies,
    FinalLoss,
    InnerLoop,
    MetaTrainer,
    SumOfLosses,
    Truncated,
    Unrolled,
    checkpoint,
    cli,
    inner_objectives,
    optimizers,
    recipes,
    run_folder,
    tasks,
)
from learnedopt.core import sealed
from learnedopt.core.files import parse_json
from learnedopt.evaluation.training_plot import plot_training
from learnedopt.optimizers import SGD, describe
from learnedopt.recipes.study import remember
from learnedopt.tasks.data import image_array
from learnedopt.training import progress, training_file
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics

ROOT = Path(__file__).resolve().parent.parent
STRIDE = 7
"""Every seventh bit, so that each place in a byte has its turn; ``benchmarks/fuzz.py`` turns all of them."""


def turned(data: bytes, bit: int) -> bytes:
    """Return the bytes with one bit turned."""
    at = bit // 8
    return data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]


def bounded(call: Callable[[], Any]) -> float:
    """Return how much processor time a call took, which must not have taken half a gigabyte."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    call()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    return time.process_time() - began


def trainer(path: Path, **options: Any) -> MetaTrainer:
    loop = InnerLoop(tasks.make("quadratic", dim=2), optimizers.make("momentum", learn=("lr",)))
    settings = {"meta_optimizer": lambda params: torch.optim.Adam(params, 1e-2), **options}
    return MetaTrainer(loop, Unrolled(2), FinalLoss(), tracker=None, num_tasks=2, checkpoint=path, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a checkpoint of a training after two meta-steps."""
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pt"
    trainer(path, config={"meta": {"lr": 0.01}}).run(2)
    assert progress.saved_config(path) == {"meta": {"lr": 0.01}}
    return path.read_bytes()


# Every turned bit is told


def test_bits_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"run_id": "abc", "recipe": {"x": [1, 2.5, None]}}
    sealed.write_record(path, value)
    assert sealed.read_record(path) == value
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), STRIDE):
        path.write_bytes(turned(data, bit))
        with pytest.raises(ValueError, match=r"a\.json is damaged, or not what this library wrote"):
            sealed.read_record(path)
    path.write_text(json.dumps(value))  # of before
    assert sealed.read_record(path) == value


@pytest.mark.parametrize("value", [{"a": 1}, [1.5, "NaN"], 3.0])
def test_what_a_study_remembers_is_under_its_hash(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert remember(path, lambda: value) == value == remember(path, lambda: pytest.fail("computed again"))
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), STRIDE):
        path.write_bytes(turned(data, bit))
        with pytest.raises(ValueError, match="is damaged"):
            remember(path, lambda: None)
    if not isinstance(value, float):
        path.write_text(json.dumps(value))  # of before
        assert remember(path, lambda: None) == value


def test_bits_of_theta(tmp_path: Path) -> None:
    path = learnedopt.save(tmp_path / "a", SGD(lr=0.1, learn=("lr",)), {"lr": torch.tensor(0.5)}, {"sha256": "0" * 64})
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), STRIDE):
        path.write_bytes(turned(data, bit))
        with pytest.raises(ValueError, match=r"a\.safetensors "):
            learnedopt.load(path)
    for lost in (b'\\"sha256\\"', b"sha256"):
        path.write_bytes(data.replace(lost, lost.replace(b"256", b"255"), 1))
        with pytest.raises(ValueError, match="is damaged"):
            learnedopt.load(path)


def test_bits_of_a_training_checkpoint(trained: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    ends = [*range(8 * (len(trained) - 200), 8 * len(trained), 3)]  # the directory's end and the hash
    for bit in [*range(0, 8 * len(trained), 331), *ends]:
        path.write_bytes(turned(trained, bit))
        with pytest.raises(ValueError, match=r"checkpoint\.pt (is corrupt|cannot be read)"):
            progress.saved_config(path)
    path.write_bytes(trained.replace(sealed.END[:12], b"\n" * 12))
    with pytest.raises(ValueError, match="its SHA-256 is not at its end"):
        progress.saved_config(path)


def test_bits_of_an_image_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path))
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1)

    def read() -> torch.Tensor:
        return image_array.cached(["a"], images.shape, lambda: iter([images[:2], images[2:]]))

    assert np.array_equal(read(), images)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 17):
        path.unlink()
        path.write_bytes(turned(data, bit))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert np.array_equal(read(), images)
        assert path.read_bytes() == data
        # Of a file that lost its statement nobody can say that it was not of an earlier version, which wrote none.
        assert ["is damaged" in str(each.message) for each in said] == [True] or bit // 8 > len(data) - len(sealed.END)


def test_a_cache_that_shrinks_while_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path))
    pixels = image_array.cached(["b"], (64, 64, 64, 1), lambda: iter([np.zeros((64, 64, 64, 1), np.uint8)]))
    image_array.require_mapped(pixels)
    (path,) = tmp_path.iterdir()
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(OSError, match=r"npy was cut from \d+ to 5000 bytes while it was in use; delete it"):
        image_array.require_mapped(pixels)
    image_array.require_mapped(torch.zeros(3))  # no file's


# Hostile files


def big_theta(path: Path) -> None:
    """300 bytes that ask for 3 GB of theta."""
    config = {"format": checkpoint.FORMATS[1], "rule": {"name": "lstm", "options": {"hidden_size": 9000}}}
    save_file({"a": torch.ones(1)}, path, metadata={"learnedopt": json.dumps(config)})


def many_layers(path: Path) -> None:
    rule = {"name": "small-mlp", "options": {"hidden_sizes": [1] * 30_000}}
    config = {"format": checkpoint.FORMATS[1], "rule": rule}
    save_file({"a": torch.ones(1)}, path, metadata={"learnedopt": json.dumps(config)})


def nested_description(path: Path) -> None:
    text = '{"format": "learnedopt-rule-2", "rule": ' + '{"a":' * 200_000 + "1" + "}" * 200_001
    save_file({"a": torch.ones(1)}, path, metadata={"learnedopt": text})


def nested_header(path: Path) -> None:
    header = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def sparse(path: Path) -> None:
    """4 GB of nothing after a header that says so."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + (1 << 32))


def sparse_rule(path: Path) -> None:
    """4 GB of nothing as the theta of another rule."""
    text = json.dumps({"format": checkpoint.FORMAT, "rule": describe(SGD(lr=0.1))})
    header = {"__metadata__": {"learnedopt": text}, "a": {"dtype": "F32", "shape": [1 << 30]}}
    header["a"]["data_offsets"] = [0, 1 << 32]
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed)
    os.truncate(path, 8 + len(packed) + (1 << 32))


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")


@pytest.mark.parametrize(
    "make", [big_theta, many_layers, nested_description, nested_header, sparse, sparse_rule, endless_header]
)
def test_a_hostile_theta_is_refused_within_bounds(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make(path)

    def load() -> None:
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            learnedopt.load(path)

    assert bounded(load) < 2


@pytest.mark.parametrize("per", ["scalar", "tensor"])
def test_a_few_numbers_for_a_large_model_are_loaded(per: Any, tmp_path: Path) -> None:
    template = {"w": torch.zeros(()).expand(5000, 1000), "b": torch.zeros(()).expand(5000)}
    inner_objective = inner_objectives.make("l2", template=template, strength=0.5, per=per)
    rule = SGD(lr=0.1)
    theta = {"lr": torch.tensor(0.1), **inner_objective.init_theta(torch.Generator())}
    path = learnedopt.save(tmp_path / "a", rule, theta, inner_objective=inner_objective)
    assert checkpoint.load_checkpoint(path).theta.keys() == theta.keys() and path.stat().st_size < 2000


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float64, torch.bfloat16])
def test_theta_of_another_type_than_the_rules_is_refused_unless_it_differs_in_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    config = {"format": checkpoint.FORMATS[1], "rule": describe(SGD(lr=0.1, learn=("lr",)))}
    path = tmp_path / "a.safetensors"
    save_file({"lr": torch.ones((), dtype=dtype)}, path, metadata={"learnedopt": json.dumps(config)})
    if dtype.is_floating_point:
        assert learnedopt.load(path)[1]["lr"].dtype == dtype
        return
    with pytest.raises(
        ValueError, match=rf"a\.safetensors: theta's 'lr' is of {dtype}, the rule's own of torch.float32"
    ):
        learnedopt.load(path)
    with pytest.raises(ValueError, match="theta's 'lr' is of"):
        learnedopt.save(tmp_path / "b", SGD(lr=0.1, learn=("lr",)), {"lr": torch.ones((), dtype=dtype)})


def archive(pickled: bytes, stored: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", content)
        for name, content in stored.items():
            file.writestr(f"archive/data/{name}", content)
    return buffer.getvalue()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(count: int, size: int, stride: int, stored: int = 16) -> bytes:
    key = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    shape = number(0) + number(size) + b"\x85" + number(stride) + b"\x85"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + key + shape + b"\x89ccollections\nOrderedDict\n)RtR"
    return archive(b"\x80\x02" + made + b".", {"0": b"\0" * stored})


def laughs() -> bytes:
    """A list of ten of a list of ten of ..., 10^30 in all."""
    return b"\x80\x02" + b"]q\x00" + b"".join(b"](" + b"h\x00" * 10 + b"eq\x00" for _ in range(30)) + b"."


def far(data: bytes) -> bytes:
    """Let the directory's end say that the directory is of 4 GB."""
    return data[:-10] + struct.pack("<I", 0xFFFFFFF0) + data[-6:]


def two_directories() -> bytes:
    """Two archives of one length: ``zipfile`` reads the second, torch the first."""
    first, second = tensor(4, 10**9, 0), tensor(4, 4, 1)
    return first[: first.rindex(b"PK\x05\x06")] + second


CALL = b"\x80\x02c%s\n" + number(2**29) + b"\x85R."
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a tensor by its class": lambda: archive(CALL % b"torch\nFloatTensor", {}),
    "a storage by its class": lambda: archive(CALL % b"torch\nFloatStorage", {}),
    "bytes": lambda: archive(CALL % b"__builtin__\nbytearray", {}),
    "more than is stored": lambda: tensor(2**29, 2**29, 1),
    "a tensor of one number, 10^9 times": lambda: tensor(4, 10**9, 0),
    "a program": lambda: archive(b"\x80\x02cos\nsystem\n" + text("touch sprung") + b"\x85R.", {}),
    "compressed zeros": lambda: archive(b"\x80\x02N.", {"0": bytes(1 << 28)}, zipfile.ZIP_DEFLATED),
    "laughs": lambda: archive(laughs(), {}),
    "nested lists": lambda: archive(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", {}),
    "two directories": two_directories,
    "names that differ in their case": lambda: archive(b"\x80\x02N.", {"0": b"", "A": b"", "a": b""}),
    "a long directory": lambda: far(archive(b"\x80\x02N.", {})),
    "protocol 5": lambda: archive(b"\x80\x05\x95" + bytes(7) + b"\x7fN.", {}),
    "an empty stack": lambda: archive(b"\x80\x02R.", {}),
    "nothing": lambda: archive(b"", {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_training_state_is_refused_within_bounds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(HOSTILE[kind]())

    def load() -> None:
        with pytest.raises(ValueError, match=r"checkpoint\.pt (is corrupt or foreign|cannot be read|is no training)"):
            trainer(path).run(3)

    assert bounded(load) < 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_sparse_archive_is_refused_by_its_sizes(trained: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(trained)
    os.truncate(path, 1 << 32)

    def load() -> None:
        with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
            progress.saved_config(path)

    assert bounded(load) < 2


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_not_waited_for(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[what]()
    tracker = JsonLinesTracker(path)
    for read in (sealed.read_record, read_metrics, progress.saved_config, lambda _: tracker.rewind(0)):
        with pytest.raises(ValueError, match="a folder, a pipe or a device"):
            read(path)
    with pytest.raises(ValueError, match="a folder, a pipe or a device"):
        tracker.start({})


def test_a_line_that_does_not_end_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2}\n')
    os.truncate(path, 1 << 28)

    def read() -> None:
        with pytest.raises(ValueError, match=r"line 2 of .* is longer"):
            read_metrics(path)

    assert bounded(read) < 5
    JsonLinesTracker(path).rewind(1)  # what was never ended is cut off
    assert read_metrics(path) == [{"step": 1, "a": 2}]


@pytest.mark.parametrize(
    "row",
    [
        '{"step": -1, "meta_loss": 1.0}', '{"step": 1%s, "meta_loss": 1.0}' % ("0" * 400), '{"step": "2"}',
        '{"step": 2, "meta_loss": 1%s}' % ("0" * 400), '{"step": 2, "meta_loss": {"a": 1}}', '{"step": 2, "a": [[1]]}',
        '{"step": 2, "a": ["x"]}', '{"step": 2, "a": [1%s]}' % ("0" * 400), '{"step": 2, "meta_loss": null}',
    ],
    ids=["negative", "huge step", "text step", "huge", "nested", "curves", "text in a list", "huge in a list", "null"],
)  # fmt: skip
def test_a_line_that_holds_no_metrics_is_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "start"}}\n{{"step": 1, "meta_loss": "NaN", "a": ["Infinity", 2], "b": "c"}}\n{row}\n')
    with pytest.raises(ValueError, match=r"line 3 of .*metrics\.jsonl"):
        read_metrics(path)


@pytest.mark.parametrize("value", ['"x"', "[1.0]"])
def test_a_metric_that_cannot_be_drawn_is_named(value: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "meta_loss": 0.5}}\n{{"step": 2, "meta_loss": {value}}}\n')
    with pytest.raises(ValueError, match=r"at the step 2 the metric meta_loss is ['\[].*, which is no number; mend"):
        plot_training(tmp_path / "a.png", read_metrics(path))


@pytest.mark.parametrize("config", [5, "[1]", "3", "{", None], ids=["5", "list", "3", "cut", "none"])
def test_a_configuration_in_a_checkpoint_is_one(config: Any, trained: bytes, tmp_path: Path) -> None:
    changed(trained, tmp_path / "checkpoint.pt", lambda content: content.update(config=config))
    with pytest.raises(ValueError, match=r"checkpoint"):
        run_folder.find_run(tmp_path, recipes.make("lstm-quadratic"))


def test_json_that_is_nested_too_deeply() -> None:
    for levels in (101, 900, 200_000):
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            parse_json("[" * levels + "]" * levels)
    parse_json("[" * 100 + "]" * 100)


# All or nothing


def changed(data: bytes, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a whole checkpoint of other content."""
    path.write_bytes(data)
    content, _ = training_file.read(path)
    change(content)
    training_file.write(path, content)


def state(made: MetaTrainer) -> Any:
    theta = {k: v.detach().clone() for k, v in made.theta.items()}
    return theta, json.dumps(made.meta_optimizer.state_dict(), default=lambda x: x.tolist())


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "meta_step": lambda c: c.update(meta_step=-5),
    "meta_step of another type": lambda c: c.update(meta_step=2.0),
    "episode": lambda c: c.update(episode=True),
    "num_skipped": lambda c: c.update(num_skipped=7),
    "best_value": lambda c: c.update(best_value=float("nan")),
    "best_value of another type": lambda c: c.update(best_value="0.5"),
    "best_theta": lambda c: c.update(best_theta={"lr": torch.ones(2)}),
    "best_theta of another type": lambda c: c.update(best_theta=[1]),
    "theta": lambda c: c.update(theta={"lr": 0.5}),
    "run": lambda c: c.update(run=None),
    "carry": lambda c: c.update(carry=["dict", ["a"], []]),
    "carry of a class": lambda c: c.update(carry=["os:PathLike", [], []]),
    "carry elsewhere": lambda c: c.update(carry=("on", "cuda:77", torch.ones(1))),
    "steadied": lambda c: c.update(steadied={"os": 1}),
    "average": lambda c: c.update(steadied={"average": {"lr": torch.ones(3)}}),
    "optimizer": lambda c: c.update(optimizer={}),
    "group": lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"),
    "betas": lambda c: c["optimizer"]["param_groups"][0].update(betas=0.9),
    "one of the betas": lambda c: c["optimizer"]["param_groups"][0].update(betas=(0.9, "x")),
    "more groups": lambda c: c["optimizer"]["param_groups"].append({"params": [1]}),
    "other parameters": lambda c: c["optimizer"]["param_groups"][0].update(params=[3]),
    "state of nothing": lambda c: c["optimizer"]["state"].update({9: {}}),
    "state of another type": lambda c: c["optimizer"]["state"].update({0: 1.0}),
    "scheduler": lambda c: c.update(scheduler={}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_nothing_is_restored_of_a_state_that_does_not_fit(kind: str, trained: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    changed(trained, path, WRONG[kind])
    other = trainer(path)
    before, data = state(other), path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        other.run(4)
    assert state(other) == before and path.read_bytes() == data
    changed(trained, path, lambda content: None)
    assert trainer(path).run(4).meta_step == 4


def loops(content: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Change the leaves of the inner loop in a checkpoint's carry."""

    def changed_in(packed: Any) -> Any:
        if isinstance(packed, list) and len(packed) == 3:
            return [packed[0], packed[1], [changed_in(child) for child in packed[2]]]
        return change(packed)

    content["carry"] = changed_in(content["carry"])


CARRIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a number": lambda c: c.update(carry=5),
    "no loop": lambda c: c.update(carry=["dict", [], []]),
    "shapes": lambda c: loops(c, lambda x: torch.zeros(2, 3) if isinstance(x, torch.Tensor) else x),
    "types": lambda c: loops(c, lambda x: x.double() if isinstance(x, torch.Tensor) else x),
    "no tensors": lambda c: loops(c, lambda x: 3),
    "step": lambda c: loops(c, lambda x: -7 if isinstance(x, int) else x),
    "step of another type": lambda c: loops(c, lambda x: 2.5 if isinstance(x, int) else x),
}


@pytest.mark.parametrize("kind", CARRIES)
def test_an_inner_loop_that_does_not_fit_is_not_restored(kind: str, tmp_path: Path) -> None:
    def truncated() -> MetaTrainer:
        loop = InnerLoop(tasks.make("quadratic", dim=2), optimizers.make("momentum", learn=("lr",)))
        estimator = Truncated(2, horizon=8)
        return MetaTrainer(loop, estimator, SumOfLosses(), tracker=None, num_tasks=2, checkpoint=tmp_path / "a.pt")

    truncated().run(2)
    data = (tmp_path / "a.pt").read_bytes()
    changed(data, tmp_path / "a.pt", CARRIES[kind])
    other = truncated()
    before = state(other)
    with pytest.raises(ValueError, match=r"a\.pt was written for another estimator or rule"):
        other.run(4)
    assert state(other) == before
    changed(data, tmp_path / "a.pt", lambda content: None)
    assert truncated().run(4).meta_step == 4


def test_a_carry_between_episodes_holds_no_loop_and_is_restored(tmp_path: Path) -> None:
    def combined(path: Path) -> MetaTrainer:
        loop = InnerLoop(tasks.make("quadratic", dim=2), optimizers.make("momentum", learn=("lr",)))
        estimator = Combined(Unrolled(2), EvolutionStrategies(2, num_pairs=2, sigma=0.1))
        return MetaTrainer(loop, estimator, FinalLoss(), tracker=None, num_tasks=2, checkpoint=path)

    expected = combined(tmp_path / "at once.pt").run(3)
    combined(tmp_path / "a.pt").run(1)
    torch.testing.assert_close(combined(tmp_path / "a.pt").run(3).theta, expected.theta, rtol=0, atol=0)


class Refusing(torch.optim.Adam):
    """Refuses a state, after it has taken a part of it: ``refusals`` says which of those that any of these is given."""

    refusals: ClassVar[list[bool]] = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.refusals.pop(0):
            raise KeyError("a part that is missing")


def test_what_fails_last_is_taken_back(trained: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    changed(trained, path, lambda content: content["run"].update(meta_optimizer="Refusing"))
    other = trainer(path, meta_optimizer=lambda params: Refusing(params, 5e-3))
    # The one on which it is tried takes it; the training's own does not, and is given what it had.
    monkeypatch.setattr(Refusing, "refusals", [False, True, False])
    before = other.theta["lr"].item()
    with pytest.raises(ValueError, match=r"the meta-optimizer or scheduler .* does not fit them \(KeyError"):
        other.run(4)
    assert other.theta["lr"].item() == before
    assert other.meta_optimizer.param_groups[0]["lr"] == 5e-3 and not other.meta_optimizer.state
    assert not Refusing.refusals


# Paths, and what is written to


NAMES = {
    "empty": "", "here": ".", "above": "..", "beside": "../x", "further": "../../x", "absolute": "/tmp/x",
    "below": "a/b", "backslash": "a\\b", "zero": "a\0b", "long": "x" * 201, "no text": "\udcff",
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_that_leads_elsewhere(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, runs = NAMES[kind], tmp_path / "a" / "runs"
    assert cli.main(["train", "lstm-quadratic", "--runs", str(runs), "--wandb", "disabled", "--name", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("is not the name of a folder" in said or "is no text" in said)
    assert [*tmp_path.rglob("*")] == []
    if name not in ("", "\udcff"):
        assert cli.main(["train", "lstm-quadratic", "--runs", str(runs), "--set", f"name={name}"]) == 2
        assert [*tmp_path.rglob("*")] == []


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ({"name": "image-folder", "options": {"root": "secret", "ways": 2}}, "root='secret'"),
        ({"name": "mini-imagenet", "options": {"root": "/etc"}}, "root='/etc'"),
        ({"name": "image-folder", "options": {"root": "a", "lists": "../b"}}, "root='a' and lists='../b'"),
        ({"name": "rescaled", "options": {"family": {"name": "mini-imagenet", "options": {"root": "b"}}}}, "family="),
    ],
)
def test_a_record_does_not_choose_the_folder_that_is_read(
    family: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = learnedopt.save(tmp_path / "a", SGD(lr=0.1), {"lr": torch.tensor(0.1)}, {"family": family})
    assert cli.main(["evaluate", str(path), "--few-shot", "--wandb", "disabled"]) == 2
    said = capsys.readouterr().err
    assert f"names what is to be read: {told}" in said and said.count("\n") == 1
    if "root" in family["options"]:  # what the user says is the user's own
        words = ["--set", f"root={tmp_path}", "--set", f"lists={tmp_path}"][: 2 * len(family["options"])]
        assert cli.main(["evaluate", str(path), "--few-shot", "--wandb", "disabled", *words[:4]]) == 2
        assert "names what is to be read" not in capsys.readouterr().err


TINY = ["family.dim=2", "num_tasks=2", "validation.num_tasks=2", "validation.num_steps=2", "estimator.num_steps=2"]
TINY += ["estimator.horizon=4", "rule.hidden_size=2", "checkpoint_every=2"]


def in_bash(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which ``learnedopt`` is the command."""
    command = f"{sys.executable} -c 'import sys; from learnedopt import cli; sys.exit(cli.main())' \"$@\""
    return subprocess.run(
        ["bash", "-c", f"learnedopt() {{ {command}; }}\n{script}"], cwd=ROOT, capture_output=True, text=True
    )


def test_a_closed_standard_output_is_no_traceback() -> None:
    done = in_bash("learnedopt list | head -c 0; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
    done = in_bash("learnedopt list >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_called_so_and_the_checkpoint_stays_whole(tmp_path: Path) -> None:
    sets = " ".join(f"--set {word}" for word in TINY)
    train = f"learnedopt train lstm-quadratic --runs {tmp_path} --wandb disabled {sets} --set num_meta_steps="
    assert in_bash(f"{train}4").returncode == 0
    state = tmp_path / "lstm-quadratic" / "checkpoint.pt"
    before = state.read_bytes()
    # A limit on the size of files is as good as a full disk: a longer run fails where it saves.
    done = in_bash(f"ulimit -f {len(before) // 2048}; {train}6 --extend")
    assert done.returncode == 74, done.stderr
    assert "the disk is full, or a quota of it: " in done.stderr and "Traceback" not in done.stderr
    assert state.read_bytes() == before and not [*state.parent.glob(".*.partial")]
