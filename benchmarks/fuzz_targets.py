"""Every file that the library reads: how a whole one is made, how it is read, and what may be raised of another."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import learnedopt
from benchmarks.fuzz_states import State, plain, trainer, trainer_of_before
from learnedopt import (
    cards,
    checkpoint,
    optimizers,
    recipes,
    run_folder,
)
from learnedopt.core import sealed
from learnedopt.evaluation.suite_table import collect
from learnedopt.optimizers.registry import RULES
from learnedopt.recipes.study import remember
from learnedopt.tasks import image_folder, mini_imagenet
from learnedopt.tasks.data import downloads, image_array, images
from learnedopt.training import json_tracker, progress, training_file

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file.

    Args:
        file: its name in a folder of its own; that of an image cache is found out.
        make: writes a whole one to that path.
        read: reads it and returns what can be compared.
        hashed: whether every change of it must be refused, or change nothing of what is read.
        errors: what reading may raise.
    """

    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    hashed: bool = True
    errors: tuple[type[Exception], ...] = (ValueError,)


def read_theta(path: Path) -> Any:
    """Load a checkpoint and make its card."""
    found = checkpoint.load_checkpoint(path)
    str(cards.card_of(found, "fuzzed"))
    return plain(found.theta), plain(found.metadata), optimizers.describe(found.rule)


def save_theta(path: Path) -> None:
    """Write a small learned optimizer."""
    rule = optimizers.make("lstm", hidden_size=1)
    learnedopt.save(path, rule, rule.init_theta(torch.Generator().manual_seed(0)), {"seed": 3})


def save_theta_of_before(path: Path) -> None:
    """Write one without a SHA-256."""
    rule = optimizers.make("momentum", learn=("lr",))
    config = {"format": checkpoint.FORMATS[1], "rule": optimizers.describe(rule), "metadata": {}}
    save_file(rule.init_theta(torch.Generator()), path, metadata={"learnedopt": json.dumps(config)})


def packed(value: Any) -> bytes:
    """Return what flax writes of nested dicts of arrays."""
    if isinstance(value, dict):
        return bytes([0x80 + len(value)]) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value)) + value.encode()
    shape = b"".join(struct.pack(">BH", 0xCD, n) for n in value.shape)
    inside = bytes([0x93, 0x90 + value.ndim]) + shape + packed(str(value.dtype))
    inside += struct.pack(">BI", 0xC6, value.nbytes) + value.tobytes()
    return struct.pack(">BIb", 0xC9, len(inside), 1) + inside


def save_celo(path: Path) -> None:
    """Write a file that begins like Celo's."""
    one = np.ones((1, 2), np.float32)
    path.write_bytes(packed({"rnn_params": {"linear_1": {"w": one, "b": one}}, "lstm_init_state": {"hidden": one}}))


def save_image(kind: str) -> Callable[[Path], None]:
    """Return what writes an image of that format."""

    def write(path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        path.write_bytes(buffer.getvalue())

    return write


def read_image(path: Path) -> Any:
    """Decode an image."""
    return image_array.decode(path.read_bytes(), path.name, 8, 3).tolist()


_PIXELS = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1)


def read_cache(path: Path) -> Any:
    """Map an image cache, which is made again where it is damaged."""
    found = image_array.cached(["fuzz"], _PIXELS.shape, lambda: iter([_PIXELS]))
    image_array.require_mapped(found)
    return found.tolist()


def save_run(path: Path) -> None:
    """Write a run's configuration."""
    run_folder.begin_run(path.parent, recipes.make("lstm-quadratic"))


def read_run(path: Path) -> Any:
    """Find a run by its configuration."""
    return run_folder.find_run(path.parent, recipes.make("lstm-quadratic"))


def save_metrics(path: Path) -> None:
    """Write the record of a training."""
    tracker = json_tracker.JsonLinesTracker(path)
    tracker.start({"seed": 0})
    for step in range(4):
        tracker.log({"meta_loss": 0.5 / (step + 1), "inner_loss": [1.0, float("nan")]}, step)
    tracker.finish()


def read_metrics(path: Path) -> Any:
    """Read the record, rewind it and go on."""
    json_tracker.read_metrics(path)
    tracker = json_tracker.JsonLinesTracker(path)
    tracker.rewind(2)
    tracker.start({})
    tracker.finish()


def save_result(path: Path) -> None:
    """Write a result of a suite."""
    losses = [[1.0, 0.5], [2.0, 0.25]]
    result = {
        "net": "a",
        "optimizer": "b",
        "kind": "candidate",
        "last_twenty": [0.5, 0.25],
        "final_loss": [0.5, 0.25],
        "losses": losses,
    }
    sealed.write_record(path, {"about": {}, **result})


def read_result(path: Path) -> Any:
    """Read the results in a folder."""
    found = collect(path.parents[2])
    return plain([[result.losses, result.record] for by in found.results.values() for result in by.values()])


def read_lists(path: Path) -> Any:
    """Read the lists of a split."""
    known = {name: [path] for name in ("a", "b", "c/d")}
    return sorted(image_folder._listed(known, path.parent)["train"])


def save_lists(path: Path) -> None:
    """Write the lists of a split."""
    for name, text in (("train", "a\nb\n"), ("val", ""), ("test", "c/d\n")):
        (path.parent / f"{name}.txt").write_text(text)


def read_mini(path: Path) -> Any:
    """Read mini-ImageNet's list; no image may lie outside."""
    found = mini_imagenet._read_list(path, path.parent / "images")
    inside = (path.parent / "images").resolve()
    if not all(image.resolve().is_relative_to(inside) for each in found.values() for image in each):
        raise AssertionError(f"{path} names an image outside of {inside}")


def read_mnist(path: Path) -> Any:
    """Read a file of MNIST."""
    return images._content(str(path.parents[2]), "mnist", path.name)


def targets() -> dict[str, Target]:
    """Return every kind of file by name."""
    registered = dict(RULES.registered)
    from learnedopt.bridges import celo

    RULES.registered.clear()  # it registers its rules, which nobody asked for here
    RULES.registered.update(registered)
    state, of_before = State(), State()
    first = (DATA / "training-1.pt").read_bytes()

    def write_state(path: Path) -> None:
        trainer(path).run(3)

    def write_state_of_before(path: Path) -> None:
        write_state(path)
        content, _ = training_file.read(path)
        torch.save({k: v for k, v in content.items() if k != "config"} | {"format": progress.FORMAT_2}, path)

    found = {
        "theta": Target("theta.safetensors", save_theta, read_theta),
        "theta of before": Target("theta.safetensors", save_theta_of_before, read_theta, hashed=False),
        "training state": Target("checkpoint.pt", write_state, state.read),
        "training state of before": Target("checkpoint.pt", write_state_of_before, of_before.read, hashed=False),
        "training state 1": Target(
            "checkpoint.pt", lambda p: p.write_bytes(first), State(trainer_of_before, torch.float64).read, hashed=False
        ),
        "run": Target("config.json", save_run, read_run),
        "study": Target("part.json", lambda p: remember(p, lambda: [1.0, {"a": "NaN"}]), lambda p: remember(p, dict)),
        "suite": Target("results/a/b.json", save_result, read_result),
        "metrics": Target("metrics.jsonl", save_metrics, read_metrics, hashed=False),
        "image cache": Target("images-*.npy", read_cache, read_cache),
        "celo": Target("theta.state", save_celo, celo.load, hashed=False),
        "lists": Target("train.txt", save_lists, read_lists, hashed=False),
        "mini-imagenet": Target(
            "train.csv", lambda p: p.write_text("filename,label\na.jpg,n1\nb.jpg,n2\n"), read_mini, hashed=False
        ),
        **{kind: Target("0.png", save_image(kind), read_image, hashed=False) for kind in ("PNG", "JPEG", "GIF", "BMP")},
    }
    return found | _published()


def _published() -> dict[str, Target]:
    """Return a file of MNIST, where it is at hand."""
    label = "t10k-labels-idx1-ubyte.gz"
    path = downloads.find(os.environ.get("LEARNEDOPT_DATA"), "MNIST/raw", label)
    if path is None:
        return {}
    content = path.read_bytes()
    return {"mnist": Target(f"MNIST/raw/{label}", lambda p: p.write_bytes(content), read_mnist)}
