"""Few-shot families: Omniglot as published, episodes, networks against torch's modules, sine waves, and bad folders."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from learnedopt import Execution, InnerLoop, Tape
from learnedopt.core import tree
from learnedopt.core.task import Split
from learnedopt.optimizers import SGD
from learnedopt.tasks import (
    ImageFolder,
    MiniImageNet,
    ModuleOnImages,
    Omniglot,
    Sine,
    image_folder,
    make,
    mini_imagenet,
    omniglot,
)
from learnedopt.tasks.data import conv_net, image_array

pytestmark = pytest.mark.usefixtures("float64")

META_SPLITS: tuple[Any, ...] = ("train", "valid", "test")
SPLITS: tuple[Split, Split] = ("train", "valid")
CHARACTERS: tuple[Any, ...] = ("vinyals", "seeded")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep decoded images in a folder of the test's own, and forget which were read."""
    readers = (omniglot._load, omniglot._read, image_folder._load, mini_imagenet._load)
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    for read in readers:
        read.cache_clear()
    yield tmp_path / "cache"
    for read in readers:
        read.cache_clear()


@pytest.fixture
def omniglot_root(data_root: Path) -> Path:
    """Return the folder of Omniglot's zip files; skip without it."""
    folder = data_root / "omniglot-py"
    if not folder.is_dir():
        pytest.skip("needs Omniglot: put its two zip files into $LEARNEDOPT_DATA/omniglot-py")
    return folder


# Omniglot.


@pytest.mark.parametrize(
    ("split", "sizes"), [("vinyals", (1028, 172, 423)), ("seeded", (1100, 100, 423))], ids=["vinyals", "seeded"]
)
def test_no_character_of_one_part_is_in_another_rotated_or_not(
    omniglot_root: Path, split: Any, sizes: tuple[int, ...]
) -> None:
    seen: dict[int, str] = {}
    for part, size in zip(META_SPLITS, sizes, strict=True):
        found = omniglot.load(split, part)
        assert found.pixels.shape == (1623 * 4 * 20, 28, 28, 1)
        assert len(found.first) == 4 * size and set(found.counts.tolist()) == {20}
        characters, position = found.first // 80, found.first % 80
        assert position.tolist() == [0, 20, 40, 60] * size  # all rotations of a character stay together
        for character in characters.unique().tolist():
            assert seen.setdefault(character, part) == part
    assert len(seen) == 1623


def test_no_image_of_a_test_character_is_met_in_training_in_any_rotation(omniglot_root: Path) -> None:
    """By pixels: whatever the index says, no test drawing, turned or not, is among the training drawings."""

    def drawings(part: Any) -> set[bytes]:
        found = omniglot.load("vinyals", part)
        index = (found.first.unsqueeze(1) + torch.arange(20)).flatten()
        return {row.tobytes() for row in found.pixels.index_select(0, index).flatten(1).numpy()}

    train, test = drawings("train"), drawings("test")
    assert len(train) > 82_000 and len(test) > 33_700  # two of all drawings are the same, and some when turned
    assert not train & test and not train & drawings("valid")


def test_the_vinyals_split_is_the_published_lists(data_root: Path) -> None:
    folder = data_root / "omniglot-splits" / "vinyals"
    if not folder.is_dir():
        pytest.skip("needs the lists of the split: put train.txt, val.txt, test.txt into omniglot-splits/vinyals")
    files = dict(zip(META_SPLITS, ("train", "val", "test"), strict=True))
    lists = {part: (folder / f"{name}.txt").read_text().split() for part, name in files.items()}
    everything = [name for names in lists.values() for name in names]
    assert omniglot.split_characters(everything, "vinyals") == {part: sorted(names) for part, names in lists.items()}
    drawn = omniglot.split_characters(everything[::-1], "seeded")
    assert [len(names) for names in drawn.values()] == [1100, 100, 423]
    assert sorted(name for names in drawn.values() for name in names) == sorted(everything)
    for split in CHARACTERS:
        parts = omniglot.split_characters(everything, split)
        text = "\n".join(f"{part} {name}" for part in META_SPLITS for name in parts[part])
        assert hashlib.sha256(text.encode()).hexdigest() == omniglot.SPLIT_SHA256[split]
        with pytest.raises(ValueError, match=f"split '{split}' of 1622 characters has SHA-256"):
            omniglot.split_characters(everything[1:], split)


def test_overlapping_characters_are_refused() -> None:
    parts = {"train": ["Greek/character01"], "valid": [], "test": ["Greek/character01"]}
    with pytest.raises(ValueError, match="Greek/character01 is in 'train' and in 'test'"):
        omniglot.check_split(parts, "", "own")


def test_a_batch_is_the_files_pictures_inverted_resized_and_turned(omniglot_root: Path) -> None:
    family = Omniglot(ways=6, shots=2, queries=3, meta_split="test")
    tasks = family.sample(2, seeded(3))
    names: dict[str, tuple[zipfile.ZipFile, str]] = {}
    for path in sorted(omniglot_root.glob("*.zip")):
        archive = zipfile.ZipFile(path)
        names |= {n.split("/", 1)[1]: (archive, n) for n in archive.namelist() if n.endswith(".png")}
    order, turned = sorted(names), set()
    for split, images in zip(SPLITS, (2, 3), strict=True):
        batch = family.batch(tasks, 0, split)
        assert batch["inputs"].shape == (2, 6 * images, 1, 28, 28) and batch["inputs"].dtype == torch.float64
        assert batch["targets"].tolist() == [[c for c in range(6) for _ in range(images)]] * 2
        for task in range(2):
            for i, index in enumerate(tasks[split][task].tolist()):
                character, rest = divmod(index, 80)
                turns, drawing = divmod(rest, 20)
                turned.add(turns)
                archive, name = names[order[20 * character + drawing]]
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    small = image.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
                expected = np.rot90(1 - np.asarray(small) / 255, turns)
                np.testing.assert_allclose(batch["inputs"][task, i, 0].numpy(), expected, atol=1e-12)
                assert 0.02 < expected.mean() < 0.4  # ink on paper
    assert turned == {0, 1, 2, 3}


def test_omniglot_is_decoded_once(omniglot_root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later process maps the first one's file; one grey stands for all images, to be quick."""
    monkeypatch.setattr(image_array, "decode", lambda content, name, size, _: np.full((size, size, 1), 200, np.uint8))
    first = omniglot.load("vinyals", "train")
    assert int(first.pixels.max()) == int(first.pixels.min()) == 55
    assert len(list(cache.iterdir())) == 1 and next(cache.iterdir()).suffix == ".npy"
    omniglot._load.cache_clear()
    omniglot._read.cache_clear()
    monkeypatch.setattr(image_array, "decode", lambda *_: pytest.fail("decoded twice"))
    assert torch.equal(omniglot.load("vinyals", "train").pixels[::5000], first.pixels[::5000])


def test_other_zip_files_are_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNEDOPT_DATA", str(tmp_path))
    (tmp_path / "omniglot-py").mkdir()
    for name in ("images_background.zip", "images_evaluation.zip"):
        (tmp_path / "omniglot-py" / name).write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"images_background\.zip is corrupt.*expected 68d2efa1.*delete it"):
        Omniglot().sample(1, seeded())


def test_missing_zip_files_are_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, *_: Any, **__: Any) -> str:
        assert url == "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_background.zip"
        raise OSError("no route to host")

    monkeypatch.setattr("pooch.retrieve", offline)
    monkeypatch.setenv("LEARNEDOPT_DATA", str(tmp_path))
    said = r"no images_background\.zip in .*cache/omniglot-py .*no route.*Set LEARNEDOPT_DATA"
    with pytest.raises(FileNotFoundError, match=said):
        Omniglot().sample(1, seeded())


# Episodes.


@dataclasses.dataclass
class Ragged:
    """Classes of 5, 9 and 7, then twenty of 6 images, of 16 pixels a side; image i is filled with i."""

    counts: tuple[int, ...] = (5, 9, 7) + (6,) * 20

    def __call__(self, *_: Any) -> image_array.ClassImages:
        counts = torch.tensor(self.counts)
        pixels = torch.arange(int(counts.sum()), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 16, 16, 1)
        return image_array.ClassImages(pixels.contiguous(), counts.cumsum(0) - counts, counts)


def folder_family(monkeypatch: pytest.MonkeyPatch, **options: Any) -> ImageFolder:
    monkeypatch.setattr(image_folder, "_load", Ragged())
    return ImageFolder(root="made", size=16, channels=1, **options)


def test_episodes_hold_different_classes_and_different_images(monkeypatch: pytest.MonkeyPatch) -> None:
    family = folder_family(monkeypatch, ways=4, shots=2, queries=3)
    tasks = family.sample(3000, seeded())
    counts = torch.tensor(Ragged().counts)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    support, query = (owner[tasks[split]].unflatten(1, (4, -1)) for split in SPLITS)
    classes = support[..., 0]
    assert bool((support == classes.unsqueeze(-1)).all() and (query == classes.unsqueeze(-1)).all())
    assert all(len(set(row)) == 4 for row in classes.tolist())
    images = torch.cat([tasks[split].unflatten(1, (4, -1)) for split in SPLITS], dim=-1)
    assert all(len(set(row)) == 5 for row in images.flatten(0, 1).tolist())
    # Every class takes every label as often, and every image of a class is drawn as often: chi-squared.
    for label in range(4):
        drawn = classes[:, label].bincount(minlength=23)
        assert float((drawn - 3000 / 23).square().sum() / (3000 / 23)) < 22 + 6 * 44**0.5
    for part in (images[..., :2], images[..., 2:]):
        of_second = part[owner[part] == 1].bincount(minlength=14)[5:14].double()
        assert float(((of_second - of_second.mean()).square() / of_second.mean()).sum()) < 8 + 6 * 16**0.5


def test_pixels_are_scaled_and_labelled_and_queries_bring_their_support(monkeypatch: pytest.MonkeyPatch) -> None:
    family = folder_family(monkeypatch, ways=3, shots=2, queries=1, batch_norm="support", dtype="float32")
    tasks = family.sample(2, seeded())
    train, valid = (family.batch(tasks, 4, split) for split in SPLITS)
    assert "support" not in train and torch.equal(valid["support"], train["inputs"])
    assert train["inputs"].shape == (2, 6, 1, 16, 16) and train["inputs"].dtype == torch.float32
    torch.testing.assert_close(train["inputs"][:, :, 0, 3, 5] * 255, tasks["train"].float())
    assert train["targets"].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 and valid["targets"].tolist() == [[0, 1, 2]] * 2


def test_steps_go_round_the_support_set(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"ways": 3, "shots": 4, "queries": 1, "batch_norm": "support"}
    whole, parts = (folder_family(monkeypatch, **options, batch_shots=n) for n in (None, 3))
    tasks = whole.sample(2, seeded())
    all_images = whole.batch(tasks, 5, "train")["inputs"].unflatten(1, (3, 4))
    for step, chosen in enumerate([(0, 1, 2), (3, 0, 1), (2, 3, 0), (1, 2, 3), (0, 1, 2)]):
        batch = parts.batch(tasks, step, "train")
        assert torch.equal(batch["inputs"].unflatten(1, (3, 3)), all_images[:, :, chosen])
        assert batch["targets"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2
        torch.testing.assert_close(parts.batch(tasks, step, "valid"), whole.batch(tasks, step, "valid"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 24}, "ways=24: .* has only 23 classes in meta_split='train'; pass fewer ways"),
        ({"shots": 3, "queries": 3}, "shots=3 and queries=3 need 6 images a class.*classes of only 5"),
    ],
)
def test_tasks_that_no_class_can_fill_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        folder_family(monkeypatch, **options).sample(1, seeded())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("omniglot", {"ways": 1}, "ways=1 leaves nothing to tell apart"),
        ("omniglot", {"shots": 0}, "shots=0"),
        ("omniglot", {"width": -3}, "width=-3"),
        ("omniglot", {"model": "convnet"}, "model='convnet'.*did you mean 'conv'"),
        ("omniglot", {"split": "vinyal"}, "split='vinyal'.*did you mean 'vinyals'"),
        ("omniglot", {"batch_norm": "running"}, "batch_norm='running' is none of 'transductive', 'support'"),
        ("omniglot", {"init_seed": -1}, "init_seed=-1"),
        ("omniglot", {"batch_shots": 0}, "batch_shots=0 is not a count"),
        (
            "omniglot",
            {"shots": 2, "batch_shots": 3},
            "batch_shots=3 are taken from shots=2 images a class; pass at most",
        ),
        ("image-folder", {}, "needs root="),
        ("image-folder", {"root": "x", "channels": 4}, "channels=4 is neither 1"),
        ("image-folder", {"root": "x", "fractions": (0.5, 0.1)}, "are not three numbers"),
        ("image-folder", {"root": "x", "size": 0}, "size=0"),
        ("mini-imagenet", {"meta_split": "val"}, "meta_split='val'"),
        ("sine", {"protocol": "mamls"}, "protocol='mamls'.*did you mean 'maml'"),
        ("sine", {"hidden": (40, 0)}, r"hidden\[1\]=0"),
        ("sine", {"queries": 0}, "queries=0"),
        ("sine", {"init_std": 0.0}, "init_std=0.0 is a standard deviation and must be positive"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)


# Networks.


def reference(model: str, width: int, channels: int, side: int, ways: int) -> nn.Sequential:
    """Return the network as published, with torch's own layers."""
    layers: list[nn.Module] = [nn.Flatten()] if model == "mlp" else []
    widths = [4 * width, 2 * width, width, width] if model == "mlp" else [width] * 4
    fan = channels * side**2 if model == "mlp" else channels
    for units in widths:
        if model == "mlp":
            layers += [nn.Linear(fan, units), nn.BatchNorm1d(units, track_running_stats=False), nn.ReLU()]
        else:
            layers.append(nn.Conv2d(fan, units, 3, padding=1, stride=2 if model == "conv" else 1))
            layers += [nn.BatchNorm2d(units, track_running_stats=False), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if model == "conv-pool" else []
        fan = units
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(ways))


def load(module: nn.Sequential, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy ``params`` into the module; return its tensors that need a gradient, under the same names."""
    tensors: dict[str, Any] = {}
    blocks = [m for m in module if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in module if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for i, (block, norm) in enumerate(zip(blocks[:4], norms, strict=True)):
            if block.bias is not None:
                block.bias.normal_()  # changes nothing: the normalisation takes it away
            tensors |= {f"block{i}.weight": block.weight, f"norm{i}.weight": norm.weight, f"norm{i}.bias": norm.bias}
        tensors |= {"head.weight": blocks[-1].weight, "head.bias": blocks[-1].bias}
        for name, tensor in tensors.items():
            tensor.copy_(params[name])
    assert tensors.keys() == params.keys()
    return tensors


@pytest.mark.parametrize("model", ["conv", "conv-pool", "mlp"])
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (33, 3)])
def test_networks_are_torchs_modules(model: Any, side: int, channels: int) -> None:
    layout = conv_net.layout(model, 5, channels, side, 4)
    params = {e.name: torch.randn(e.shape, generator=seeded(i)) for i, e in enumerate(layout)}
    inputs, targets = torch.rand(12, channels, side, side, generator=seeded(7)), torch.arange(4).repeat(3)
    module = reference(model, 5, channels, side, 4)
    module(inputs)
    tensors = load(module, params)
    loss = nn.functional.cross_entropy(module(inputs), targets)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    found = nn.functional.cross_entropy(conv_net.logits(model, leaves, inputs), targets)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(found, list(leaves.values()))
    expected = torch.autograd.grad(loss, [tensors[name] for name in leaves])
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("model", ["conv", "conv-pool", "mlp"])
def test_support_statistics_normalise_queries_one_by_one(model: Any) -> None:
    layout = conv_net.layout(model, 5, 1, 28, 4)
    params = {e.name: torch.randn(e.shape, generator=seeded(i)) for i, e in enumerate(layout)}
    support, query = torch.rand(8, 1, 28, 28, generator=seeded(7)), torch.rand(6, 1, 28, 28, generator=seeded(8))
    together = conv_net.logits(model, params, query, support)
    alone = torch.cat([conv_net.logits(model, params, image.unsqueeze(0), support) for image in query])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    own = conv_net.logits(model, params, support)  # on the support set itself both are the same
    torch.testing.assert_close(conv_net.logits(model, params, support, support), own, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together, conv_net.logits(model, params, query), rtol=0.1)


def test_images_too_small_to_pool_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = dataclasses.replace(folder_family(monkeypatch, ways=2, shots=1, queries=1, model="conv-pool"), size=15)
    with pytest.raises(ValueError, match="model='conv-pool' pools images four times, which takes 16 pixels"):
        family.init_params(family.sample(1, seeded()))


def test_networks_start_as_torchs_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    family = folder_family(monkeypatch, ways=3, shots=1, queries=1, width=64)
    params = tree.squeeze(family.init_params(family.sample(1, seeded())))
    for name, fan_in in (("block1.weight", 64 * 9), ("block0.weight", 9), ("head.weight", 64), ("head.bias", 64)):
        values = params[name].flatten() * fan_in**0.5
        assert float(values.abs().max()) <= 1 and abs(float(values.mean())) < 5 / (3 * len(values)) ** 0.5
        assert float(values.square().mean()) == pytest.approx(1 / 3, abs=5 * 0.3 / len(values) ** 0.5)
    assert params["head.weight"].shape == (3, 64)
    for i in range(4):
        assert bool((params[f"norm{i}.weight"] == 1).all()) and bool((params[f"norm{i}.bias"] == 0).all())
    other = tree.squeeze(dataclasses.replace(family, init_seed=1).init_params(family.sample(1, seeded())))
    assert not torch.equal(other["head.weight"], params["head.weight"])


def test_a_module_of_ones_own_learns_from_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = folder_family(monkeypatch, ways=3, shots=2, queries=2)

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 6), nn.Tanh(), nn.Linear(6, 3))

    family = ModuleOnImages(episodes, build)
    tasks = family.sample(2, seeded())
    params, batch = family.init_params(tasks), family.batch(tasks, 0, "train")
    assert torch.equal(params["1.weight"][0], params["1.weight"][1])
    own = ModuleOnImages(dataclasses.replace(episodes, init_seed=None), build).init_params(tasks)
    assert not torch.equal(own["1.weight"][0], own["1.weight"][1])
    module = build()
    module.load_state_dict({name: p[1] for name, p in params.items()})
    logits = module(batch["inputs"][1])
    one = tree.tree_map(lambda x: x[1], (params, batch))
    torch.testing.assert_close(family.outputs(*one), logits, rtol=1e-12, atol=1e-12)
    expected = nn.functional.cross_entropy(logits, batch["targets"][1])
    torch.testing.assert_close(family.loss(*one), expected, rtol=1e-12, atol=1e-12)
    right = (logits.argmax(1) == batch["targets"][1]).double().mean()
    assert float(family.metrics(*one)["accuracy"]) == float(right)
    loop = InnerLoop(family, SGD(lr=0.5), Execution(chunk_size=2))
    rollout = loop.run(loop.rule.init_theta(seeded()), loop.start(tasks), 20, Tape.NONE)
    assert bool((rollout.losses[-1] < 0.9 * rollout.losses[0]).all())


# Sine waves.


@pytest.mark.parametrize("protocol", ["meta-sgd", "maml"])
def test_sines_have_the_published_distribution(protocol: Any) -> None:
    tasks = Sine(protocol=protocol, shots=60, queries=40).sample(1500, seeded())
    assert tasks["train"]["inputs"].shape == (1500, 60, 1) and tasks["valid"]["targets"].shape == (1500, 40, 1)
    assert float(tasks["train"]["inputs"].abs().max()) <= 5
    assert float(tasks["train"]["inputs"].var()) == pytest.approx(100 / 12, rel=0.02)
    # Each wave solves y'' = -ω² y: with ω known, y is a linear combination of sin(ωx) and cos(ωx) on both sets.
    inputs, targets = (torch.cat([tasks[s][k] for s in SPLITS], dim=1) for k in ("inputs", "targets"))
    grid = torch.linspace(0.8, 1.2, 41) if protocol == "meta-sgd" else torch.ones(1)
    residuals = []
    for omega in grid:
        features = torch.cat([(omega * inputs).sin(), (omega * inputs).cos()], dim=-1)
        solution = torch.linalg.lstsq(features, targets).solution
        residuals.append(((features @ solution - targets).square().sum((1, 2)), solution.squeeze(-1)))
    errors = torch.stack([error for error, _ in residuals])
    best = errors.argmin(0)
    a, b = torch.stack([solution for _, solution in residuals])[best, torch.arange(1500)].unbind(-1)
    amplitude, phase = torch.hypot(a, b), torch.atan2(b, a)
    if protocol == "maml":
        assert float(errors.max()) < 1e-20
        phase = -phase
    assert float(amplitude.min()) > 0.05 and float(amplitude.max()) < 5.1
    assert float(amplitude.mean()) == pytest.approx(2.55, abs=0.2)
    assert float(phase.min()) > -0.1 and float(phase.max()) < math.pi + 0.1
    assert float(phase.mean()) == pytest.approx(math.pi / 2, abs=0.12)
    if protocol == "meta-sgd":
        assert bool((errors.min(0).values / 100 < 1e-3 * amplitude**2).all())
        assert float(grid[best].mean()) == pytest.approx(1.0, abs=0.02) and float(grid[best].std()) > 0.1


def test_small_starts_are_normal_within_two_deviations() -> None:
    family = Sine(hidden=(300, 200), init_std=0.01)
    params = family.init_params(family.sample(1, seeded()))
    weights = params["layer1.weight"].flatten() / 0.01
    assert float(weights.abs().max()) < 2 and float(weights.abs().max()) > 1.99
    # Of a standard normal cut off at two: variance 1 - 4 phi(2) / (2 Phi(2) - 1), and this share within one half.
    assert float(weights.var()) == pytest.approx(0.7737, rel=0.01) and abs(float(weights.mean())) < 0.01
    assert float((weights.abs() < 0.5).double().mean()) == pytest.approx(0.3829 / 0.9545, abs=0.005)
    assert all(not p.any() for name, p in params.items() if name.endswith("bias"))
    assert not torch.equal(weights[:100], params["layer0.weight"].flatten()[:100] / 0.01)


def test_the_sine_network_is_the_sequence_of_layers() -> None:
    family = Sine(shots=7)
    tasks = family.sample(1, seeded())
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))
    module = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    module.load_state_dict({k: params[f"layer{int(k[0]) // 2}{k[1:]}"] for k in module.state_dict()})
    torch.testing.assert_close(family.outputs(params, batch), module(batch["inputs"]), rtol=1e-12, atol=1e-12)
    expected = nn.functional.mse_loss(module(batch["inputs"]), batch["targets"])
    torch.testing.assert_close(family.loss(params, batch), expected, rtol=1e-12, atol=1e-12)


# Folders.


def paint(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_folder(root: Path, names: tuple[str, ...] = ("a/x", "a/y", "b", "c", "d"), mode: str = "RGB") -> Path:
    for i, name in enumerate(names):
        for k in range(3):
            paint(root / name / f"{k}.png", 10 * i + k, mode)
    return root


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (3, "L"), (3, "P"), (1, "L"), (1, "1")])
def test_a_folder_of_class_folders_is_read(tmp_path: Path, cache: Path, channels: int, mode: str) -> None:
    root = make_folder(tmp_path / "root", mode=mode)
    (root / "readme.txt").write_text("no image")
    paint(root / ".hidden" / "0.png", 7, mode)
    (root / "b").rename(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    options: dict[str, Any] = {"ways": 2, "shots": 2, "queries": 1, "size": 16, "channels": channels}
    seen: list[str] = []
    for part in META_SPLITS:
        family = ImageFolder(root=str(root), fractions=(0.4, 0.2, 0.4), meta_split=part, **options)
        pixels, first, counts = family.images()
        assert pixels.shape == (3 * len(counts), 16, 16, channels) and set(counts.tolist()) == {3}
        for k, start in enumerate(first.tolist()):
            images = {n: plain(root / n / "0.png", 16, channels) for n in ("a/x", "a/y", "b", "c", "d")}
            seen += [n for n, image in images.items() if np.array_equal(image, pixels[start].numpy())]
            assert len(seen) and np.array_equal(
                plain(root / seen[-1] / "2.png", 16, channels), pixels[start + 2].numpy()
            ), k
        if len(counts) > 1:
            inputs = family.batch(family.sample(2, seeded()), 0, "train")["inputs"]
            assert inputs.shape == (2, 4, channels, 16, 16) and 0 <= float(inputs.min()) < float(inputs.max()) <= 1
    assert sorted(seen) == ["a/x", "a/y", "b", "c", "d"]


def plain(path: Path, size: int, channels: int) -> np.ndarray:
    with Image.open(path) as image:
        small = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small).reshape(size, size, channels)


def test_the_split_of_a_folder_may_be_lists_or_folders(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "root")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, text in (("train", "\ufeffb/\na/y\n"), ("val", "c\n"), ("test", "\nd\na/x\n")):
        (lists / f"{name}.txt").write_text(text)
    by_lists = ImageFolder(root=str(root), size=8, lists=str(lists), meta_split="test").images()
    for name in ("train/b", "train/a", "val/c", "test/d", "test/x"):
        source = {"train/a": "a/y", "test/x": "a/x"}.get(name, name[-1])
        for k in range(3):
            target = tmp_path / "split" / name / f"{k}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / source / f"{k}.png").read_bytes())
    by_folders = ImageFolder(root=str(tmp_path / "split"), size=8, meta_split="test").images()
    assert torch.equal(by_lists.pixels, by_folders.pixels) and by_folders.counts.tolist() == [3, 3]
    assert np.array_equal(by_folders.pixels[0].numpy(), plain(root / "d" / "0.png", 8, 3))


def test_a_changed_folder_is_read_again(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "root")
    options: dict[str, Any] = {"root": str(root), "size": 8, "fractions": (1.0, 0.0, 0.0)}
    before = ImageFolder(**options).images().pixels.clone()
    paint(root / "b" / "1.png", 99, size=(11, 9))
    image_folder._load.cache_clear()
    after = ImageFolder(**options).images().pixels
    assert [i for i in range(15) if not torch.equal(before[i], after[i])] == [7]
    assert len(list(cache.iterdir())) == 2
    (stored,) = [path for path in cache.iterdir() if np.array_equal(np.load(path), after.numpy())]
    whole = stored.read_bytes()
    for content in (whole[:300], b"", whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        stored.unlink()  # what is mapped stays as it is
        stored.write_bytes(content)
        image_folder._load.cache_clear()
        if len(content) == len(whole):  # without a SHA-256 it may be of an earlier version, and no word is said
            with pytest.warns(UserWarning, match=r"images-\w+\.npy is damaged .*decoded again"):
                again = ImageFolder(**options).images().pixels
        else:
            again = ImageFolder(**options).images().pixels
        assert torch.equal(again, after) and stored.read_bytes() == whole


def see_through(root: Path) -> None:
    paint(root / "b" / "9.png", 1, "P")
    with Image.open(root / "b" / "9.png") as image:
        image.load()
    image.save(root / "b" / "9.png", transparency=0)


def huge(root: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(root / "b" / "9.png")


def large(root: Path) -> None:
    Image.new("1", (10_000, 6_000)).save(root / "b" / "9.png")


def program(root: Path) -> None:
    """Put a program in PostScript there, for which Pillow would start another."""
    Image.new("RGB", (4, 4)).save(root / "b" / "9.png", "EPS")


def broken(root: Path) -> None:
    (root / "b" / "1.png").write_bytes((root / "b" / "1.png").read_bytes()[:60])


def listed(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        (root.parent / f"{name}.txt").write_text(text)


@pytest.mark.parametrize(
    ("harm", "options", "error", "message"),
    [
        (broken, {}, ValueError, r"b/1\.png cannot be read as an image .*put a whole file"),
        (lambda r: (r / "c" / "0.png").write_text("text"), {}, ValueError, r"c/0\.png cannot be read as an image"),
        (lambda r: paint(r / "d" / "9.png", 1, "RGBA"), {}, ValueError, r"d/9\.png is an image of mode RGBA, but chan"),
        (lambda r: None, {"channels": 1}, ValueError, r"a/x/0\.png is .* RGB, but channels=1 reads.*pass channels=3"),
        (lambda r: None, {"root": "{root}/nowhere"}, FileNotFoundError, "nowhere' is not a folder"),
        (lambda r: (r / "e").mkdir(), {"root": "{root}/e"}, ValueError, "e has no folders with images"),
        (lambda r: None, {"lists": "{root}/.."}, FileNotFoundError, r"there is no .*train\.txt"),
        (
            lambda r: listed(r, train="b\nz\n", val="c\n", test="d\n"), {"lists": "{root}/.."},
            ValueError, r"train\.txt names the class 'z' \(1 such\), but there is no folder",
        ),
        (
            lambda r: listed(r, train="b\nc\n", val="a/x\n", test="d\nb\n"), {"lists": "{root}/.."},
            ValueError, "class 'b' is in both 'train' and 'test'.*remove it",
        ),
        (lambda r: None, {"fractions": (0.0, 0.5, 0.5)}, ValueError, r"root \(train\) has no classes"),
        (lambda r: None, {"fractions": [1.0, 0.0, 0.0]}, ValueError, r"fractions=\[1.0, 0.0, 0.0\] is not a tuple"),
        (see_through, {}, ValueError, r"b/9\.png is an image of mode P with transparency, but channels=3 reads"),
        (huge, {}, ValueError, r"b/9\.png cannot be read as an image \(Image size \(400000000 pixels\) exceeds"),
        (large, {}, ValueError, r"b/9\.png cannot be read as an image \(it has 10000 x 6000 pixels, and at most 50,"),
        (program, {}, ValueError, r"b/9\.png cannot be read as an image"),
        (lambda r: (r / "e").symlink_to(r / "b"), {}, ValueError, r"root/e and .*root/b are the same folder"),
        (lambda r: (r / "a" / "up").symlink_to(r), {}, ValueError, r"a/up and .*root are the same folder"),
        (
            lambda r: [(r / n).mkdir() for n in ("train", "test")], {},
            ValueError, "root holds test, train, but also lacks 'val' and has 'a' .*lists=",
        ),
        (
            lambda r: [(r / n).mkdir() for n in ("train", "val", "test")], {},
            ValueError, "root holds test, train, val, but also has 'a' and has 'b'",
        ),
        (
            lambda r: (r.parent / "train.txt").write_bytes(b"caf\xe9\n"), {"lists": "{root}/.."},
            ValueError, r"train\.txt is not in UTF-8",
        ),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_read_are_refused(
    tmp_path: Path,
    cache: Path,
    harm: Callable[[Path], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    root = make_folder(tmp_path / "root")
    harm(root)
    given = {key: v.format(root=root) if isinstance(v, str) else v for key, v in options.items()}
    defaults: dict[str, Any] = {"root": str(root), "size": 8, "fractions": (1.0, 0.0, 0.0)}
    with pytest.raises(error, match=message):
        ImageFolder(**{**defaults, **given}).sample(1, seeded())
    assert not cache.exists() or not any(cache.iterdir())  # nothing half-written stays behind


def test_the_same_class_in_two_part_folders_is_refused(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "root", ("train/a", "train/b", "val/c", "test/a"))
    with pytest.raises(ValueError, match="class 'a' is in both 'train' and 'test'"):
        ImageFolder(root=str(tmp_path / "root"), size=8, meta_split="valid").sample(1, seeded())


def test_a_link_from_one_part_into_another_is_refused(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "root", ("train/a", "train/b", "val/c", "test/d"))
    (root / "test" / "renamed").symlink_to(root / "train" / "a")
    with pytest.raises(ValueError, match=r"folder '.*train/a' is in both 'train' and 'test'"):
        ImageFolder(root=str(root), size=8).sample(1, seeded())


def test_a_class_may_have_a_parts_name(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "root", ("bus", "car", "train"))
    family = ImageFolder(root=str(root), size=8, fractions=(1.0, 0.0, 0.0))
    assert len(family.images().counts) == 3


def make_mini(root: Path) -> Path:
    """Two classes a part, three images each."""
    for i, part in enumerate(("train", "val", "test")):
        lines = ["filename,label"]
        for c in range(2):
            for k in range(3):
                paint(root / "images" / f"n{i}{c}{k}.jpg", 100 * i + 10 * c + k, "L" if k == 2 else "RGB", (90, 100))
                lines.append(f"n{i}{c}{k}.jpg,n{i}{c}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


def test_mini_imagenet_is_read_in_its_standard_layout(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_mini(tmp_path / "mini-imagenet")
    monkeypatch.setenv("LEARNEDOPT_DATA", str(tmp_path))
    for i, part in enumerate(META_SPLITS):
        family = MiniImageNet(ways=2, shots=1, queries=2, width=4, model="conv-pool", meta_split=part)
        tasks = family.sample(3, seeded())
        assert family.batch(tasks, 0, "valid")["inputs"].shape == (3, 4, 3, 84, 84)
        order = [f"n{i}{c}{k}.jpg" for c in range(2) for k in range(3)]
        batch = family.batch(tasks, 0, "train")
        for found, index in zip(batch["inputs"].flatten(0, 1), tasks["train"].flatten().tolist(), strict=True):
            expected = plain(root / "images" / order[index], 84, 3).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    pixels = {part: MiniImageNet(root=str(root), meta_split=part).images().pixels for part in META_SPLITS}
    assert torch.equal(pixels["train"], MiniImageNet().images().pixels) and len(pixels["test"]) == 6


def test_the_published_lists_are_used_where_the_folder_has_none(tmp_path: Path, cache: Path, data_root: Path) -> None:
    if not (data_root / "mini-imagenet-splits" / "ravi").is_dir():
        pytest.skip("needs the lists of the split: put train.csv and others into mini-imagenet-splits/ravi")
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class 'n01532829', but .*images lacks 600 of its 600"):
        MiniImageNet(root=str(tmp_path)).sample(1, seeded())
    sizes = {
        part: len(mini_imagenet._read_list(data_root / "mini-imagenet-splits" / "ravi" / f"{name}.csv", tmp_path))
        for part, name in image_folder.FILES.items()
    }
    assert sizes == {"train": 64, "valid": 16, "test": 20}


def special(path: Path) -> None:
    """Put a pipe there, whose reader would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 32)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda r: (r / "images" / "n010.jpg").unlink(), None, ""),  # of a part that is not asked for
        (lambda r: (r / "images" / "n001.jpg").unlink(), FileNotFoundError, r"'n00'.*lacks 1 of its 3.*n001\.jpg"),
        (lambda r: (r / "train.csv").write_text("n001.jpg,n00\n"), ValueError, r"train\.csv is no list of images"),
        (lambda r: (r / "val.csv").write_text(""), ValueError, r"val\.csv is no list of images"),
        (
            lambda r: (r / "train.csv").write_text("filename,label\n" + "n001.jpg,n00\n" * 2),
            ValueError, r"train\.csv names an image twice",
        ),
        (
            lambda r: (r / "test.csv").write_text((r / "train.csv").read_text()),
            ValueError, "class 'n00' is in both 'train' and 'test'",
        ),
        (
            lambda r: (r / "test.csv").write_text((r / "train.csv").read_text().replace(",n0", ",n2")),
            ValueError, "image 'n000.jpg' is in both 'train' and 'test'",
        ),
        (lambda r: (r / "val.csv").unlink(), FileNotFoundError, r"there is no .*val\.csv.*put the lists"),
        *(
            (
                lambda r, name=name: (r / "train.csv").write_text(f"filename,label\n{name},n00\n"),
                ValueError, "train.csv: the image .* is not the name of a file",
            )
            for name in ("../images/n000.jpg", "../../secret/n000.jpg", "/tmp/n000.jpg", "..", "n000.jpg/")
        ),
        (lambda r: special(r / "images" / "n000.jpg"), ValueError, r"n000\.jpg is no file"),
        (lambda r: sparse(r / "images" / "n000.jpg"), ValueError, r"n000\.jpg is no file, or one of more than"),
        (lambda r: (r / "images").rename(r / "pictures"), FileNotFoundError, "no folder .*images; it must hold"),
        (lambda r: (r / "images" / "n000.jpg").write_bytes(b""), ValueError, r"n000\.jpg cannot be read as an image"),
    ],
)  # fmt: skip
def test_a_mini_imagenet_that_is_incomplete_is_refused(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], Any],
    error: type[Exception] | None,
    message: str,
) -> None:
    monkeypatch.delenv("LEARNEDOPT_DATA", raising=False)
    root = make_mini(tmp_path / "root")
    harm(root)
    if error is None:
        MiniImageNet(root=str(root), meta_split="test", ways=2, shots=1, queries=1).sample(1, seeded())
        return
    with pytest.raises(error, match=message):
        MiniImageNet(root=str(root), ways=2, shots=1, queries=1).sample(1, seeded())
