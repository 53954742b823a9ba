"""Networks on whole data sets of images: against torch's modules, in every mode of differentiation, and their data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tasks import indices, made_characters, made_images, seeded
from torch import Tensor, nn

from learnedopt.core import tree
from learnedopt.core.task import TaskFamily
from learnedopt.tasks import ImageAutoencoder, ImageConv, ImageMLP, make
from learnedopt.tasks.data import characters, images, minibatches

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]

TOLERANCE = 1e-12
META_SPLITS: tuple[Any, ...] = ("train", "valid", "test")
LAYERS: dict[Any, nn.Module] = {"tanh": nn.Tanh(), "gelu": nn.GELU(), "relu": nn.ReLU()}
FAMILIES = ["image-mlp", "image-conv", "image-autoencoder"]


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the data sets by noise."""
    monkeypatch.setattr(images, "load", made_images)
    monkeypatch.setattr(characters, "load", made_characters)


def one_task(family: TaskFamily, split: Any = "train") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a task's parameters, moved off their start, where gains are 1, and a batch."""
    tasks = family.sample(1, seeded())
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, split)))
    generator = seeded(1)
    return {k: p + 0.1 * torch.randn(p.shape, generator=generator) for k, p in params.items()}, batch


# The networks.


class Reference(nn.Module):
    """The convolutional network of torch's layers, read off the description of it."""

    def __init__(self, channels: tuple[int, ...], norm: str, groups: int, act: nn.Module, residual: bool) -> None:
        super().__init__()
        widths = [w for w in channels for _ in range(3 if residual else 1)]
        for i, (a, b) in enumerate(zip([1, *widths], widths, strict=False)):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, 3, padding=1, bias=norm == "none"))
            if norm == "batch":
                self.add_module(f"norm{i}", nn.BatchNorm2d(b, track_running_stats=False))
            elif norm == "group":
                self.add_module(f"norm{i}", nn.GroupNorm(groups, b))
        self.head = nn.Linear(widths[-1], 10)
        self.stages, self.act, self.norm, self.residual = len(channels), act, norm, residual

    def layer(self, i: int, x: Tensor) -> Tensor:
        x = self.get_submodule(f"conv{i}")(x)
        return x if self.norm == "none" else self.get_submodule(f"norm{i}")(x)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(self.stages):
            if self.residual:
                x = self.act(self.layer(3 * stage, x))
                x = self.act(x + self.layer(3 * stage + 2, self.act(self.layer(3 * stage + 1, x))))
            else:
                x = self.act(self.layer(stage, x))
            if stage < self.stages - 1:
                x = nn.functional.avg_pool2d(x, 2)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("norm", "act"), [("none", "relu"), ("batch", "tanh"), ("group", "gelu")])
@pytest.mark.usefixtures("no_files")
def test_the_conv_net_is_that_of_torchs_layers(norm: Any, act: Any, residual: bool) -> None:
    family = ImageConv(
        channels=(4, 6, 2), norm=norm, groups=2, activation=act, residual=residual, size=14, batch_size=7
    )
    params, batch = one_task(family)
    module = Reference((4, 6, 2), norm, 2, LAYERS[act], residual)
    module.load_state_dict(params)  # strict: these parameters and no others
    assert batch["inputs"].shape == (7, 1, 14, 14)
    logits = module(batch["inputs"])
    torch.testing.assert_close(family.outputs(params, batch), logits, rtol=TOLERANCE, atol=TOLERANCE)
    loss = nn.functional.cross_entropy(logits, batch["targets"])
    torch.testing.assert_close(family.loss(params, batch), loss, rtol=TOLERANCE, atol=TOLERANCE)
    names = [name for name, _ in module.named_parameters()]
    leaves = {name: params[name].clone().requires_grad_() for name in names}
    found = torch.autograd.grad(family.loss(leaves, batch), list(leaves.values()))
    expected = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=TOLERANCE)
    right = (logits.argmax(1) == batch["targets"]).double().mean()
    assert float(family.metrics(params, batch)["accuracy"]) == pytest.approx(float(right))


def test_the_conv_net_starts_as_torchs_layers_do() -> None:
    tasks = {"seed": torch.arange(300)}
    plain, normed = ImageConv(channels=(6, 8)), ImageConv(channels=(6, 8), norm="group", groups=2)
    params = plain.init_params(tasks)
    torch.manual_seed(0)
    modules = {"conv0": nn.Conv2d(1, 6, 3), "conv1": nn.Conv2d(6, 8, 3), "head": nn.Linear(8, 10)}
    assert [*params] == [f"{name}.{kind}" for name in modules for kind in ("weight", "bias")]
    for name, module in modules.items():
        bound = nn.init._calculate_fan_in_and_fan_out(module.weight)[0] ** -0.5
        for kind in ("weight", "bias"):
            ours, theirs = params[f"{name}.{kind}"], getattr(module, kind).detach()
            assert ours.shape == (300, *theirs.shape) and float(theirs.abs().max()) <= bound
            assert 0.99 * bound < float(ours.abs().max()) <= bound
            assert float(ours.var()) == pytest.approx(bound**2 / 3, rel=0.1)  # uniform
    gains = normed.init_params(tasks)
    assert [*gains] == ["conv0.weight", "norm0.weight", "norm0.bias", "conv1.weight", "norm1.weight", "norm1.bias",
                        "head.weight", "head.bias"]  # fmt: skip
    assert bool((gains["norm1.weight"] == 1).all()) and bool((gains["norm1.bias"] == 0).all())


@pytest.mark.parametrize("act", ["tanh", "relu"])
@pytest.mark.usefixtures("no_files")
def test_the_autoencoder_is_the_mirrored_sequence_of_layers(act: Any) -> None:
    squared, entropy = (
        ImageAutoencoder(widths=(6, 3), activation=act, error=error, batch_size=5, size=7)
        for error in ("squared", "cross-entropy")
    )
    params, batch = one_task(squared)
    assert {name: tuple(p.shape) for name, p in params.items() if "weight" in name} == {
        "layer0.weight": (6, 49), "layer1.weight": (3, 6), "layer2.weight": (6, 3), "layer3.weight": (49, 6)
    }  # fmt: skip
    assert [*batch] == ["inputs"] and batch["inputs"].shape == (5, 49)
    layers = [nn.Linear(49, 6), nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 49)]
    module = nn.Sequential(*(part for layer in layers for part in (layer, LAYERS[act])))[:-1]
    module.load_state_dict({k: params[f"layer{int(k[0]) // 2}{k[1:]}"] for k in module.state_dict()})
    made, pixels = module(batch["inputs"]).sigmoid().detach(), batch["inputs"]
    torch.testing.assert_close(squared.outputs(params, batch), made, rtol=TOLERANCE, atol=TOLERANCE)
    assert float(squared.loss(params, batch)) == pytest.approx(float(((made - pixels) ** 2).mean()), rel=1e-12)
    expected = -(pixels * made.log() + (1 - pixels) * (1 - made).log()).mean()
    assert float(entropy.loss(params, batch)) == pytest.approx(float(expected), rel=1e-12)
    for family in (squared, entropy):
        assert float(family.metrics(params, batch)["squared_error"]) == float(squared.loss(params, batch))


MODES: dict[str, TaskFamily] = {
    "batch norm": ImageConv(channels=(2, 3), norm="batch", activation="tanh", size=7, batch_size=4),
    "group norm, residual": ImageConv(
        channels=(2, 4), norm="group", groups=2, activation="softplus", residual=True, size=7, batch_size=3
    ),
    "autoencoder": ImageAutoencoder(widths=(3,), activation="tanh", size=7, batch_size=3),
    "autoencoder, cross-entropy": ImageAutoencoder(widths=(3,), activation="gelu", error="cross-entropy", size=7),
}
every_mode = pytest.mark.parametrize("name", [*MODES])


@every_mode
@pytest.mark.usefixtures("no_files")
def test_second_derivatives_are_those_of_differences_in_every_order_of_the_modes(name: str) -> None:
    """Reverse over forward is where torch's own batch norm is wrong and says nothing."""
    family = MODES[name]
    params, batch = one_task(family)
    generator = seeded(2)
    along = {k: torch.randn(p.shape, generator=generator) for k, p in params.items()}

    def loss(at: Any) -> Tensor:
        return family.loss(at, batch)

    grad, h = torch.func.grad(loss), 1e-5
    plus, minus = (grad({k: p + sign * h * along[k] for k, p in params.items()}) for sign in (1, -1))
    expected = {k: (plus[k] - minus[k]) / (2 * h) for k in params}
    forward_over_reverse = torch.func.jvp(grad, (params,), (along,))[1]
    reverse_over_forward = torch.func.grad(lambda at: torch.func.jvp(loss, (at,), (along,))[1])(params)
    reverse_over_reverse = torch.func.grad(lambda at: sum((g * along[k]).sum() for k, g in grad(at).items()))(params)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    torch.testing.assert_close(forward_over_reverse, expected, rtol=1e-5, atol=1e-7)
    for found in (reverse_over_forward, reverse_over_reverse):
        torch.testing.assert_close(found, forward_over_reverse, rtol=1e-10, atol=TOLERANCE)


@every_mode
@pytest.mark.usefixtures("no_files")
def test_particles_of_tasks_at_once_are_those_one_by_one(name: str) -> None:
    """Two vmaps, as evolution strategies over a meta-batch nest them, with and without a gradient inside."""
    family = MODES[name]
    tasks = family.sample(2, seeded())
    batch, generator = family.batch(tasks, 3, "valid"), seeded(4)
    params = {k: p + 0.1 * torch.randn(3, *p.shape, generator=generator) for k, p in family.init_params(tasks).items()}
    both = torch.func.grad_and_value(family.loss)
    grads, losses = torch.func.vmap(torch.func.vmap(both), in_dims=(0, None))(params, batch)
    for particle in range(3):
        for task in range(2):
            one = {k: p[particle, task] for k, p in params.items()}
            grad, loss = both(one, {k: x[task] for k, x in batch.items()})
            torch.testing.assert_close(losses[particle, task], loss, rtol=TOLERANCE, atol=TOLERANCE)
            found = {k: g[particle, task] for k, g in grads.items()}
            torch.testing.assert_close(found, grad, rtol=1e-10, atol=TOLERANCE)


# Where the minibatches come from.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("no_files")
def test_held_out_minibatches_are_of_other_images(name: str) -> None:
    tasks = {"seed": torch.tensor([5, 6])}
    for meta_split in ("train", "valid"):
        options: dict[str, Any] = {"batch_size": 300, "meta_split": meta_split}
        plain, apart = make(name, **options), make(name, **options, held_out=True)
        for x, y in zip(*(tree.leaves(f.batch(tasks, 2, "train")) for f in (plain, apart)), strict=True):
            assert torch.equal(x, y)
        batch = apart.batch(tasks, 2, "valid")
        inputs = batch["inputs"].reshape(2, 300, -1)
        for split, family in (("test", apart), (meta_split, plain)):
            pixels = made_images("mnist", split).pixels.double() / 255
            seen = family.batch(tasks, 2, "valid")["inputs"].reshape(2, 300, -1)
            assert torch.equal(seen, pixels[indices(seen)])
        if "targets" in batch:
            assert torch.equal(batch["targets"], made_images("mnist", "test").labels[indices(inputs)])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("no_files")
def test_held_out_characters_are_other_drawings(name: str) -> None:
    tasks = {"seed": torch.tensor([5])}
    for held_out in (False, True):
        family = make(name, dataset="omniglot-characters", meta_split="test", batch_size=200, held_out=held_out)
        for split, expected in (("train", False), ("valid", held_out)):
            batch = family.batch(tasks, 0, split)  # pyright: ignore[reportArgumentType]
            inputs = batch["inputs"].reshape(200, -1)
            made = made_characters("test", expected)
            assert torch.equal(inputs, made.pixels[indices(inputs)].double() / 255)
            if "targets" in batch:
                assert torch.equal(batch["targets"][0], made.labels[indices(inputs)])


def test_there_is_a_logit_for_every_class() -> None:
    for meta_split, classes in (("train", 99), ("valid", 89), ("test", 98)):
        for name in ("image-mlp", "image-conv"):
            params = make(name, dataset="omniglot-characters", meta_split=meta_split).init_params(
                {"seed": torch.tensor([1])}
            )
            assert [*params.values()][-1].shape == (1, classes)


@pytest.mark.usefixtures("no_files")
def test_labels_of_characters_are_permuted_among_all_of_them() -> None:
    options: dict[str, Any] = {"dataset": "omniglot-characters", "meta_split": "test", "batch_size": 900}
    tasks = {"seed": torch.tensor([5])}
    before, after = (
        ImageMLP(relabel_every=n, **options).batch(tasks, 0, "train")["targets"][0].tolist() for n in (None, 1)
    )
    pairs = {*zip(before, after, strict=True)}
    assert len(pairs) == len({*before}) == len({*after}) and {*after} != {*before} and max(after) < 98


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_images_that_were_scaled_down_before_are_those_scaled_down_now(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_images("mnist", "train")
    monkeypatch.setattr(images, "load", lambda *_: made)
    monkeypatch.setattr(minibatches, "_CHUNK", 70)
    whole = minibatches.Minibatches("mnist", 40, dtype, "train")
    seeds = torch.tensor([3, 4])
    for standardize in (True, False):
        small = minibatches.Minibatches("mnist", 40, dtype, "train", size=14, standardize=standardize)
        found, labels = small.draw(seeds, 1, "train")
        pixels, expected_labels = whole.draw(seeds, 1, "train")
        mean, std = images.MOMENTS["mnist"] if standardize else (0.0, 1.0)
        blocks = ((pixels - mean) / std).reshape(2, 40, 14, 2, 14, 2).mean((3, 5))
        torch.testing.assert_close(found, blocks, rtol=1e-5 if dtype == "float32" else TOLERANCE, atol=1e-6)
        assert torch.equal(labels, expected_labels)
        monkeypatch.setattr(minibatches.Minibatches, "_seen", lambda *_: pytest.fail("they were scaled down again"))
        assert torch.equal(small.draw(seeds, 1, "train")[0], found)
        monkeypatch.undo()
        monkeypatch.setattr(images, "load", lambda *_: made)


@pytest.fixture
def drawings(data_root: Path) -> dict[str, dict[int, bytes]]:
    """Return the files of Omniglot, read in the plainest way: <Alphabet>/characterNN -> drawing -> PNG."""
    folder = data_root / "omniglot-py"
    if not folder.is_dir():
        pytest.skip("needs Omniglot: put its two zip files into $LEARNEDOPT_DATA/omniglot-py")
    found: dict[str, dict[int, bytes]] = {}
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(folder / f"images_{part}.zip") as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    _, alphabet, character, file = name.split("/")
                    key = f"{part}/{alphabet}/{character}"
                    found.setdefault(key, {})[int(file[5:7])] = archive.read(name)
    return found


def test_characters_are_whole_alphabets_in_parts_that_share_no_drawing(drawings: dict[str, dict[int, bytes]]) -> None:
    from PIL import Image

    seen: set[bytes] = set()
    for meta_split, classes in characters.NUM_CLASSES.items():
        names = sorted(
            name for name in drawings for alphabet in characters.ALPHABETS[meta_split] if f"/{alphabet}/" in name
        )
        home = "evaluation" if meta_split == "test" else "background"
        assert len(names) == classes and all(name.startswith(home) for name in names)
        for held_out, numbers in ((False, range(1, 16)), (True, range(16, 21))):
            pixels, labels = characters.load(meta_split, held_out)
            assert labels.tolist() == [c for c in range(classes) for _ in numbers]
            for i in (0, len(labels) // 2, len(labels) - 1):
                file = drawings[names[int(labels[i])]][numbers[i % len(numbers)]]
                with Image.open(io.BytesIO(file)) as image:
                    small = image.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
                assert np.array_equal(255 - np.asarray(small).flatten(), pixels[i].numpy())
            rows = {row.tobytes() for row in pixels.numpy()}
            assert len(rows) == len(labels)
            assert not rows & seen
            seen |= rows


def test_the_moments_are_those_of_all_drawings(drawings: dict[str, dict[int, bytes]], data_root: Path) -> None:
    from learnedopt.tasks import omniglot

    names, pixels = omniglot.read(str(data_root), None)
    assert len(names) == len(drawings) == 1623
    upright = pixels.unflatten(0, (1623, 4, 20))[:, 0].double() / 255
    mean, std = minibatches.MOMENTS["omniglot-characters"]
    assert (mean, std) == (
        pytest.approx(float(upright.mean()), abs=5e-5),
        pytest.approx(float(upright.std()), abs=5e-5),
    )


# What cannot be made.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make("image-conv", channels=()), ValueError, r"channels=\(\) is no convolution"),
        (lambda: make("image-conv", channels=(8, 0)), ValueError, r"channels\[1\]=0"),
        (lambda: make("image-conv", channels=(8,) * 6), ValueError, "images of 28x28 cannot be halved 5 times"),
        (lambda: make("image-conv", channels=(8,) * 4, size=7), ValueError, "images of 7x7 cannot be halved 3 times"),
        (lambda: make("image-conv", norm="layer"), ValueError, "norm='layer' is none of 'none', 'batch', 'group'"),
        (lambda: make("image-conv", norm="group", channels=(8, 6)), ValueError, r"groups=4 does not divide .*\(8, 6\)"),
        (lambda: make("image-conv", groups=0), ValueError, "groups=0"),
        (lambda: make("image-conv", activation="swish"), ValueError, "activation='swish'"),
        (lambda: make("image-conv", size=10), ValueError, "size=10 does not divide crop=28"),
        (lambda: ImageConv(residual=1), TypeError, "residual=1 is neither"),  # pyright: ignore[reportArgumentType]
        (lambda: ImageConv(channels=[8]), ValueError, r"channels=\[8\] is not a tuple"),  # pyright: ignore[reportArgumentType]
        (lambda: make("image-conv", dataset="omniglot-character"), ValueError, "did you mean 'omniglot-characters'"),
        (lambda: make("image-autoencoder", widths=()), ValueError, r"widths=\(\) leaves no code"),
        (lambda: make("image-autoencoder", error="absolute"), ValueError, "error='absolute'"),
        (lambda: make("image-autoencoder", batch_size=0), ValueError, "batch_size=0"),
        (lambda: make("image-autoencoder", standardize=True), ValueError, "no option 'standardize'"),
        (lambda: ImageMLP(held_out=1), TypeError, "held_out=1 is neither"),  # pyright: ignore[reportArgumentType]
        (lambda: ImageMLP(held_out=True, meta_split="test"), ValueError, "of mnist the test images are what is held"),
    ],
)
def test_what_cannot_be_made_is_refused(call: Callable[[], TaskFamily], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
