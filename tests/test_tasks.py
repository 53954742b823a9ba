"""Every registered task family against its contract; known values, and the data sets."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learnedopt import tasks as families
from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks import (
    Clusters,
    Experts,
    ImageMLP,
    Lasso,
    LinearRegression,
    LogisticRegression,
    NoisyImages,
    Quadratic,
    Rastrigin,
    Superclasses,
    build,
    describe,
    image_folder,
    make,
    mini_imagenet,
    names,
    omniglot,
    register,
    registry,
    superclasses,
)
from learnedopt.tasks.data import characters, image_array, images, streams

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
SPLITS: tuple[Split, Split] = ("train", "valid")
SMALL_MLP = {"name": "image-mlp", "options": {"batch_size": 6, "hidden": [4], "activation": "tanh"}}
# Options beside the defaults that the shared tests run each family with; a family without a line runs with defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "quadratic": [{"dim": 3, "start_scale": 0.7}, {"distribution": "uniform", "start_scale": 0.7}],
    "spectral-quadratic": [
        {"dim": 6, "start_scale": 0.7, "decay": 1.0},
        {"dim": 5, "start_scale": 0.7, "spectrum": "geometric", "rotated": True, "decay": 1.0},
    ],
    "logistic": [{"start_scale": 0.7}],
    "linear-regression": [{"start_scale": 0.7, "num_train": 4}, {"start_scale": 0.7, "dim": 4, "num_relevant": 2}],
    "image-mlp": [
        {"batch_size": 6},
        {"batch_size": 6, "hidden": (4, 3), "activation": "tanh", "init": "normal", "std": 0.3},
        {"batch_size": 6, "hidden": (), "dataset": "fashion-mnist"},
        {"batch_size": 6, "crop": 20, "size": 10, "standardize": True, "relabel_every": 2},
    ],
    "image-conv": [
        {"batch_size": 5, "channels": (3, 4), "size": 7},
        {"batch_size": 5, "channels": (4, 6), "size": 7, "norm": "batch", "activation": "tanh", "standardize": True},
        {
            "batch_size": 3,
            "channels": (2, 4),
            "size": 7,
            "norm": "group",
            "groups": 2,
            "activation": "gelu",
            "residual": True,
            "dataset": "omniglot-characters",
        },
    ],
    "image-autoencoder": [
        {"batch_size": 4, "widths": (5, 3), "size": 14, "activation": "tanh"},
        {"batch_size": 4, "widths": (3,), "size": 7, "error": "cross-entropy", "dataset": "omniglot-characters"},
    ],
    "noisy-images": [{"num_train": 30, "num_valid": 20}],
    "sine": [{"shots": 4, "hidden": (5, 4), "init_seed": None}, {"protocol": "maml", "hidden": (5,), "init_std": 0.3}],
    "omniglot": [
        {"ways": 3, "shots": 2, "queries": 3, "width": 4, "init_seed": None},
        {"ways": 3, "shots": 2, "queries": 3, "width": 4, "batch_norm": "support", "batch_shots": 1, "split": "seeded"},
        {"ways": 3, "shots": 2, "queries": 3, "width": 4, "model": "conv-pool"},
        {"ways": 3, "shots": 2, "queries": 3, "width": 2, "model": "mlp", "batch_norm": "support"},
    ],
    "image-folder": [{"root": "none", "size": 20, "channels": 1, "ways": 2, "shots": 3, "queries": 1, "width": 3}],
    "clusters": [{"noise": 0.2}, {"shape": "quadratic", "num_losses": 3, "dim": 2}],
    "experts": [{"concentration": 0.9}],
    "superclasses": [{"shots": 2, "num_features": 5}],
    "mini-imagenet": [{"ways": 2, "shots": 2, "queries": 3, "width": 3, "model": "conv-pool"}],
    "text-transformer": [
        {"dim": 6, "num_heads": 2, "batch_size": 2, "context": 5},
        {"dim": 4, "num_layers": 1, "num_heads": 1, "bias": False, "batch_size": 3, "context": 4, "held_out": True},
    ],
    "text-rnn": [
        {"width": 4, "batch_size": 2, "context": 5},
        {"cell": "lstm", "width": 3, "num_layers": 2, "batch_size": 3, "context": 4, "held_out": True},
    ],
    "lasso": [{"num_rows": 3, "dim": 4, "strength": 0.3, "noise": 0.1}],
    "rastrigin": [{"dim": 3, "height": 0.5}],
    "rescaled": [
        {"family": SMALL_MLP, "initial_scale": 0.3, "tensor_scale": 0.4, "probability": 0.5},
        {"family": SMALL_MLP, "tensor_scale": 0.4, "coordinate_scale": 0.5},
    ],
}


NOT_RUN = ("mixture",)
"""Its tasks differ in shape, so that it has no parameters or batches of its own: tests/test_mixture.py."""


def enrolled() -> list[Any]:
    cases = [(name, options) for name in names() if name not in NOT_RUN for options in VARIANTS.get(name, [{}])]
    return [pytest.param(name, options, id=f"{name}-{i}") for i, (name, options) in enumerate(cases)]


every_family = pytest.mark.parametrize(("name", "options"), enrolled())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_images(dataset: str, meta_split: str) -> images.Images:
    """500 images of noise; the first two pixels of image i hold i."""
    random = np.random.default_rng([len(dataset), len(meta_split)])
    pixels = random.integers(256, size=(500, images.NUM_PIXELS)).astype(np.uint8)
    pixels[:, 0], pixels[:, 1] = np.arange(500) // 256, np.arange(500) % 256
    return images.Images(torch.from_numpy(pixels), torch.from_numpy(random.integers(images.NUM_CLASSES, size=500)))


def made_characters(meta_split: Any, held_out: bool) -> images.Images:
    """500 images of noise as above with other labels; where held out, 100 others."""
    pixels, labels = made_images("characters" + "a" * held_out, meta_split)
    part = slice(100 if held_out else None)
    return images.Images(pixels[part], (labels * 7 + 1)[part])


def indices(inputs: Tensor) -> Tensor:
    """Return which of ``made_images`` were drawn."""
    first = (inputs[..., :2] * 255).round().long()
    return 256 * first[..., 0] + first[..., 1]


def made_classes(side: int, channels: int) -> image_array.ClassImages:
    """Seven classes of noise, with 6 to 12 images."""
    counts = torch.arange(6, 13)
    pixels = np.random.default_rng(side).integers(256, size=(int(counts.sum()), side, side, channels), dtype=np.uint8)
    return image_array.ClassImages(torch.from_numpy(pixels), counts.cumsum(0) - counts, counts)


REMEMBERED = {k: functools.cache(getattr(superclasses, k).__wrapped__) for k in ("_components", "_features")}
"""What is remembered of ``made_images``, apart from what the package remembers of the real ones."""


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the data sets by ``made_images`` and ``made_classes``."""
    monkeypatch.setattr(images, "load", made_images)
    monkeypatch.setattr(characters, "load", made_characters)
    for name, of_made_images in REMEMBERED.items():
        monkeypatch.setattr(superclasses, name, of_made_images)
    monkeypatch.setattr(omniglot, "load", lambda *_: made_classes(28, 1))
    monkeypatch.setattr(image_folder, "_load", lambda *args: made_classes(*args[-2:]))
    monkeypatch.setattr(mini_imagenet, "_load", lambda *_: made_classes(84, 3))


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    """Forget which files were read, before and after."""
    for read in (images._split, images._read):
        read.cache_clear()
    yield
    for read in (images._split, images._read):
        read.cache_clear()


def assert_equal(found: Any, expected: Any) -> None:
    """Compare two trees bit by bit, dtypes included."""
    (flat, _), (other, _) = tree.flatten(found), tree.flatten(expected)
    assert len(flat) == len(other) > 0
    for a, b in zip(flat, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# Every family.


@every_family
@pytest.mark.usefixtures("no_files")
def test_sampling_depends_on_the_generator_alone(name: str, options: dict[str, Any]) -> None:
    family = make(name, **options)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tasks = family.sample(4, seeded())
    assert tree.size(tasks) == 4
    for _ in range(2):
        family.batch(tasks, 1, "train")
        family.init_params(tasks)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert_equal(family.sample(4, seeded()), tasks)
    others = tree.leaves(family.sample(4, seeded(1)))
    assert not all(torch.equal(a, b) for a, b in zip(tree.leaves(tasks), others, strict=True))
    shared = getattr(family, "init_seed", None) is not None  # asked to start all tasks at one point
    for leaf in tree.leaves(family.init_params(tasks)):
        constant = bool((leaf == leaf.flatten()[0]).all())  # as scales and shifts of a normalisation start
        assert torch.equal(leaf[0], leaf[1]) == (shared or constant)


@every_family
@pytest.mark.usefixtures("no_files")
def test_starts_and_batches_are_pure_functions_of_single_tasks(name: str, options: dict[str, Any]) -> None:
    family = make(name, **options)
    tasks = family.sample(5, seeded())
    params = family.init_params(tasks)
    batches: dict[Any, Batch] = {(split, step): family.batch(tasks, step, split) for step in (0, 7) for split in SPLITS}
    assert tree.size(params) == tree.size(batches["train", 0]) == 5
    for start, stop in ((3, 5), (0, 1)):
        part = tree.narrow(tasks, start, stop)
        for (split, step), whole in reversed(batches.items()):
            assert_equal(family.batch(part, step, split), tree.narrow(whole, start, stop))
        assert_equal(family.init_params(part), tree.narrow(params, start, stop))


@every_family
@pytest.mark.usefixtures("no_files")
def test_what_a_family_returns_is_the_callers(name: str, options: dict[str, Any]) -> None:
    family = make(name, **options)
    tasks = family.sample(2, seeded())
    expected = tree.tree_map(torch.clone, family.init_params(tasks))
    for p in family.init_params(tasks).values():
        p.add_(1.0)
    assert_equal(family.init_params(tasks), expected)


@every_family
@pytest.mark.usefixtures("no_files")
def test_loss_is_a_differentiable_scalar_and_runs_under_vmap(name: str, options: dict[str, Any]) -> None:
    family = make(name, **options)
    tasks = family.sample(3, seeded())
    params = family.init_params(tasks)
    for split in SPLITS:
        batch = family.batch(tasks, 2, split)
        at_once = torch.func.vmap(torch.func.grad_and_value(family.loss))(params, batch)
        metrics, outputs = (
            torch.func.vmap(family.metrics)(params, batch),
            torch.func.vmap(family.outputs)(params, batch),
        )
        for i in range(3):
            one, data = tree.tree_map(lambda x, i=i: x[i], (params, batch))
            leaves = [p.clone().requires_grad_() for p in one.values()]
            loss = family.loss(dict(zip(one, leaves, strict=True)), data)
            assert loss.shape == () and loss.dtype == torch.float64 and loss.isfinite()
            grads = torch.autograd.grad(loss, leaves)
            assert all(g.abs().max() > 0 for g in grads)
            found = tree.tree_map(lambda x, i=i: x[i], at_once)
            expected = (dict(zip(one, grads, strict=True)), loss.detach())
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
            torch.testing.assert_close(outputs[i], family.outputs(one, data), rtol=TOLERANCE, atol=TOLERANCE)
            assert_each_is_a_scalar_like(family.metrics(one, data), {k: v[i] for k, v in metrics.items()})


def assert_each_is_a_scalar_like(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(value.shape == () and value.isfinite() for value in found.values())
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@every_family
@pytest.mark.usefixtures("no_files")
def test_gradients_are_those_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    family = make(name, **options)
    tasks = family.sample(1, seeded())
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))

    def loss(*values: Tensor) -> Tensor:
        return family.loss(dict(zip(params, values, strict=True)), batch)

    at = tuple(p.clone().requires_grad_() for p in params.values())
    assert torch.autograd.gradcheck(loss, at, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, at, fast_mode=True)


@every_family
@pytest.mark.usefixtures("no_files")
def test_float32_tasks_are_the_float64_ones_rounded(name: str, options: dict[str, Any]) -> None:
    found = {}
    for dtype in ("float32", "float64"):
        family = make(name, dtype=dtype, **options)
        tasks = family.sample(2, seeded())
        found[dtype] = (family.init_params(tasks), family.batch(tasks, 1, "valid"))
        floats = [x.dtype for x in tree.leaves(found[dtype]) if x.is_floating_point()]
        assert set(floats) == {getattr(torch, dtype)}
    torch.testing.assert_close(tree.to(found["float32"], None, torch.float64), found["float64"], rtol=1e-6, atol=1e-7)


@every_family
def test_a_family_is_made_again_from_its_description(name: str, options: dict[str, Any]) -> None:
    family = make(name, meta_split="valid", **options)
    config = json.loads(json.dumps(describe(family)))
    assert config["name"] == name and config["options"].items() >= {"meta_split": "valid"}.items()
    assert build(config) == family != make(name, **options)
    assert dataclasses.is_dataclass(family) and hash(family) == hash(build(config))


# Known values.


@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
def test_quadratics_are_squared_distances(distribution: Any) -> None:
    family = Quadratic(dim=4, distribution=distribution)
    tasks = family.sample(1, seeded())
    W, y = tasks["W"][0].numpy(), tasks["y"][0].numpy()
    x = np.array([0.3, -1.2, 0.7, 2.0])
    batch = tree.squeeze(family.batch(tasks, 0, "train"))
    expected = sum((sum(W[i, j] * x[j] for j in range(4)) - y[i]) ** 2 for i in range(4))
    assert float(family.loss({"x": torch.from_numpy(x)}, batch)) == pytest.approx(expected, rel=1e-13)
    assert torch.equal(family.init_params(tasks)["x"], torch.zeros(1, 4))


def test_quadratics_have_the_distribution_that_they_name() -> None:
    cases: list[tuple[Any, float, float]] = [("gaussian", 0.0, 1.0), ("uniform", 0.5, 1 / 12)]
    for distribution, mean, variance in cases:
        tasks = Quadratic(distribution=distribution, start_scale=3.0).sample(2000, seeded())
        for entries in (tasks["W"], tasks["y"]):  # 20,000 numbers at least: tolerances are five standard errors
            assert float(entries.mean()) == pytest.approx(mean, abs=5 * (variance / 20_000) ** 0.5)
            assert float(entries.var()) == pytest.approx(variance, rel=0.05)
        assert (distribution == "uniform") == bool(((tasks["W"] >= 0) & (tasks["W"] <= 1)).all())
        assert float(tasks["start"].std()) == pytest.approx(3.0, rel=0.03)


def test_the_start_changes_no_function() -> None:
    at_zero, elsewhere = (Quadratic(start_scale=scale).sample(3, seeded()) for scale in (0.0, 1.0))
    assert_equal([at_zero["W"], at_zero["y"]], [elsewhere["W"], elsewhere["y"]])


def test_lasso_is_a_penalised_half_square_with_sparse_truth() -> None:
    family = Lasso(num_rows=3, dim=4, strength=0.3)
    batch = tree.squeeze(family.batch(family.sample(1, seeded()), 5, "valid"))
    x = np.array([0.3, -1.2, 0.0, 2.0])
    gap = batch["A"].numpy() @ x - batch["b"].numpy()
    found = torch.func.grad_and_value(family.loss)({"x": torch.from_numpy(x)}, batch)
    assert float(found[1]) == pytest.approx(0.5 * (gap**2).sum() + 0.3 * 3.5, rel=1e-13)
    np.testing.assert_allclose(found[0]["x"].numpy(), batch["A"].numpy().T @ gap + 0.3 * np.sign(x), rtol=1e-12)
    for density, noise in ((0.25, 0.0), (1.0, 0.0), (0.0, 0.5)):
        tasks = Lasso(num_rows=12, dim=4, density=density, noise=noise).sample(1000, seeded())
        true = torch.linalg.lstsq(tasks["A"], tasks["b"].unsqueeze(-1)).solution
        if noise:
            assert float(tasks["b"].std()) == pytest.approx(noise, rel=0.03)
            continue
        drawn = true.abs() > 1e-10
        assert float(drawn.double().mean()) == pytest.approx(density, abs=0.03)
        assert float(true[drawn].std()) == pytest.approx(1.0, rel=0.06)


def test_rastrigin_is_a_half_square_under_waves() -> None:
    family = Rastrigin(dim=3, height=2.0)
    batch = tree.squeeze(family.batch(family.sample(1, seeded()), 0, "train"))
    x = np.array([0.3, -1.2, 2.5])
    A, b, c = (batch[name].numpy() for name in ("A", "b", "c"))
    expected = 0.5 * ((A @ x - b) ** 2).sum() - 2.0 * sum(c[i] * np.cos(2 * np.pi * x[i]) for i in range(3)) + 6.0
    assert float(family.loss({"x": torch.from_numpy(x)}, batch)) == pytest.approx(expected, rel=1e-13)
    plain = {"A": torch.eye(3), "b": torch.zeros(3), "c": torch.ones(3)}
    assert float(family.loss({"x": torch.zeros(3)}, plain)) == 0.0
    assert float(family.loss({"x": torch.tensor([1.0, 0.0, 0.0])}, plain)) == pytest.approx(0.5)
    assert float(family.loss({"x": torch.tensor([0.5, 0.0, 0.0])}, plain)) == pytest.approx(0.125 + 4.0)


def test_logistic_loss_is_the_negative_log_likelihood() -> None:
    family = LogisticRegression(dim=3, num_train=7, num_valid=4)
    tasks = family.sample(1, seeded())
    weight = torch.tensor([0.5, -1.0, 2.0])
    for split, points in zip(SPLITS, (7, 4), strict=True):
        batch = tree.squeeze(family.batch(tasks, 0, split))
        p = 1 / (1 + np.exp(-batch["inputs"].numpy() @ weight.numpy()))
        labels = batch["targets"].numpy()
        assert labels.shape == (points,) and set(labels) <= {0.0, 1.0}
        expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
        assert float(family.loss({"weight": weight}, batch)) == pytest.approx(expected, rel=1e-12)
        accuracy = ((p > 0.5) == (labels == 1)).mean()
        assert float(family.metrics({"weight": weight}, batch)["accuracy"]) == pytest.approx(accuracy)


@pytest.mark.parametrize("shape", ["distance", "quadratic"])
def test_clusters_stand_within_their_radius_and_are_lipschitz(shape: Any) -> None:
    family = Clusters(dim=3, num_losses=4, shape=shape, distance=2.0, radius=0.5, width=0.3)
    tasks = family.sample(500, seeded())
    own = tasks["points"]
    assert torch.equal(own[:, 0], own[:, 1]) and torch.equal(own[:, 0, 0], own[:, 0, 3])  # repeated, without noise
    away = (own[:, 0, 0] - 2 / 3**0.5).norm(dim=1)
    assert 0.49 < float(away.max()) <= 0.5
    assert float(away.mean()) == pytest.approx(0.5 * 3 / 4, abs=0.02)  # uniform in a ball of three dimensions
    batch, x = tree.squeeze(family.batch(tree.narrow(tasks, 0, 1), 6, "train")), torch.tensor([3.0, -1.0, 0.5])
    assert torch.equal(batch["point"], own[0, 0, 2])
    gap = float((x - own[0, 0, 2]).norm())
    expected = gap**2 / 2 if shape == "quadratic" else (0.09 + gap**2) ** 0.5 - 0.3
    assert float(family.loss({"x": x}, batch)) == pytest.approx(expected, rel=1e-13)
    noisy = Clusters(dim=3, num_losses=40, noise=0.2).sample(500, seeded())["points"]
    assert float(noisy.var(dim=2).sum(-1).mean()) == pytest.approx(0.04, rel=0.05)


def test_the_good_experts_costs_are_lower_and_it_is_mostly_the_same_one() -> None:
    family = Experts(num_experts=4, num_losses=30, concentration=0.5, gap=0.6)
    tasks = family.sample(2000, seeded())
    costs = tasks["costs"]
    good = costs.mean((1, 2)).argmin(1)
    shares = torch.bincount(good, minlength=4) / 2000
    torch.testing.assert_close(shares, torch.tensor([8, 4, 2, 1]) / 15, rtol=0, atol=0.04)
    assert float(costs.max()) <= 1 and float(costs.min()) >= 0
    picked = costs.gather(3, good[:, None, None, None].expand(-1, 2, 30, 1))
    assert float(picked.max()) <= 0.4 and float(picked.mean()) == pytest.approx(0.2, abs=0.01)
    batch = tree.squeeze(family.batch(tree.narrow(tasks, 0, 1), 31, "valid"))
    x = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert float(family.loss({"x": x}, batch)) == pytest.approx(float(costs[0, 1, 1] @ x), rel=1e-13)


@pytest.mark.usefixtures("no_files")
def test_superclasses_draw_one_class_each_and_no_image_twice() -> None:
    family = Superclasses(shots=5, num_features=6, meta_split="valid")
    tasks = family.sample(30, seeded())
    labels = made_images("fashion-mnist", "valid").labels
    for each, own in zip(tasks["images"], tasks["labels"], strict=True):
        assert each.unique().numel() == 2 * family.num_losses
        for label, classes in enumerate(superclasses.SUPERCLASSES):
            chosen = labels[each[own == label]]
            assert (own == label).sum(1).tolist() == [5, 5]
            assert chosen.unique().numel() == 1 and int(chosen[0]) in classes
    drawn = {int(labels[i]) for i in tasks["images"].flatten()}
    assert drawn == set(range(10))
    assert not torch.equal(tasks["labels"][0], tasks["labels"][1])  # they come in an order of their own


@pytest.mark.usefixtures("no_files")
def test_superclasses_are_told_apart_by_principal_components_of_the_training_images() -> None:
    family = Superclasses(num_features=6, meta_split="test")
    tasks = family.sample(4, seeded())
    train = made_images("fashion-mnist", "train").pixels.double() / 255
    mean = train.mean(0)
    components = torch.linalg.svd(train - mean, full_matrices=False).Vh[:6]
    test = made_images("fashion-mnist", "test").pixels.double() / 255
    batch = family.batch(tasks, 2, "train")
    expected = (test[tasks["images"][:, 0, 2]] - mean) @ components.T
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(batch["inputs"].abs(), expected.abs(), rtol=1e-8, atol=1e-8)  # signs are free
    weight, one = torch.randn(4, 6, generator=seeded()), tree.squeeze(tree.narrow(batch, 0, 1))
    p = (weight @ one["inputs"]).softmax(0)
    assert float(family.loss({"weight": weight}, one)) == pytest.approx(-float(p[one["targets"]].log()), rel=1e-12)


def hessian_of(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.func.jacrev(torch.func.grad(fn))(at)  # pyright: ignore[reportReturnType]


def test_logistic_labels_follow_true_weights() -> None:
    """Given the inputs, labels are coins: with many points Newton's method recovers weights that explain fresh ones."""
    family = LogisticRegression(dim=5, num_train=4000, num_valid=4000)
    tasks = family.sample(1, seeded(2))
    train, valid = (tree.squeeze(family.batch(tasks, 0, split)) for split in SPLITS)
    weight = torch.zeros(5)
    for _ in range(10):
        grad = torch.func.grad(lambda w: family.loss({"weight": w}, train))(weight)
        hessian = hessian_of(lambda w: family.loss({"weight": w}, train), weight)
        weight = weight - torch.linalg.solve(hessian, grad)
    p = family.outputs({"weight": weight}, valid).sigmoid()
    likely = p > 0.8
    assert likely.sum() > 100
    assert float(valid["targets"][likely].mean()) == pytest.approx(float(p[likely].mean()), abs=0.06)


def test_linear_regression_is_least_squares_with_the_chosen_spectrum() -> None:
    family = LinearRegression(dim=5, num_train=20_000, num_valid=3, condition_number=1000.0, noise=0.2)
    tasks = family.sample(2, seeded())
    batch = tree.narrow(family.batch(tasks, 0, "train"), 0, 1)
    inputs, targets = (x[0].numpy() for x in (batch["inputs"], batch["targets"]))
    spectrum = np.array([1, 1000**-0.25, 1000**-0.5, 1000**-0.75, 1e-3])
    hessian = hessian_of(lambda w: family.loss({"weight": w}, tree.squeeze(batch)), torch.zeros(5)).numpy()
    np.testing.assert_allclose(hessian, inputs.T @ inputs / 20_000, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.diag(hessian), spectrum, rtol=0.06)
    assert np.linalg.cond(hessian) == pytest.approx(1000, rel=0.1)
    solution, (squares,), *_ = np.linalg.lstsq(inputs, targets, rcond=None)
    loss = float(family.loss({"weight": torch.from_numpy(solution)}, tree.squeeze(batch)))
    assert loss == pytest.approx(squares / 40_000, rel=1e-10)
    assert loss == pytest.approx(0.2**2 / 2, rel=0.05)


def test_linear_regressions_share_a_mean_and_differ_between_splits() -> None:
    family = LinearRegression(dim=3, num_train=40, num_valid=30, condition_number=1.0, noise=0.0, mean_weight=-2.0)
    tasks = family.sample(500, seeded())
    train, valid = (family.batch(tasks, 0, split) for split in SPLITS)
    assert train["inputs"].shape == (500, 40, 3) and valid["targets"].shape == (500, 30)
    assert not torch.equal(train["inputs"][:, :30], valid["inputs"])
    weights = [torch.linalg.lstsq(b["inputs"], b["targets"].unsqueeze(-1)).solution for b in (train, valid)]
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-10)  # without noise both splits tell the true weights
    assert float(weights[0].mean()) == pytest.approx(-2.0, abs=5 / 1500**0.5)
    assert float(weights[0].std()) == pytest.approx(1.0, rel=0.1)


def test_irrelevant_weights_of_a_linear_regression_are_zero_in_every_task() -> None:
    whole, few = (
        LinearRegression(dim=4, num_train=9, condition_number=1.0, noise=0.0, num_relevant=n) for n in (None, 2)
    )
    batches = [family.batch(family.sample(50, seeded()), 0, "train") for family in (whole, few)]
    assert torch.equal(batches[0]["inputs"], batches[1]["inputs"])
    weights = [torch.linalg.lstsq(b["inputs"], b["targets"].unsqueeze(-1)).solution.squeeze(-1) for b in batches]
    torch.testing.assert_close(weights[1][:, :2], weights[0][:, :2], rtol=1e-9, atol=1e-9)
    assert float(weights[1][:, 2:].abs().max()) < 1e-9 < 0.1 < float(weights[0][:, 2:].std())


@pytest.mark.usefixtures("no_files")
def test_noisy_images_have_one_training_set_in_which_a_share_of_the_labels_is_random() -> None:
    family = NoisyImages(num_train=300, num_valid=150, noise=0.5)
    tasks = family.sample(2, seeded())
    train, valid = (family.batch(tasks, 0, split) for split in SPLITS)
    for entry in (*train.values(), *valid.values()):
        assert torch.equal(entry[0], entry[1])
    pixels, labels = made_images("mnist", "train")
    chosen, _ = family._training_set()
    assert len(set(chosen.tolist())) == 450
    own, clean = chosen[:300], chosen[300:]
    mean = pixels[own].double().mean(0)
    torch.testing.assert_close(train["inputs"][0], (pixels[own].double() - mean) / 255)
    torch.testing.assert_close(valid["inputs"][0], (pixels[clean].double() - mean) / 255)
    assert torch.equal(train["index"][0], torch.arange(300)) and "index" not in valid
    assert torch.equal(valid["targets"][0], labels[clean])
    wrong = train["targets"][0] != labels[own]
    assert torch.equal(family.wrong_labels(), wrong)
    assert abs(int(wrong.sum()) - 135) < 15  # 150 are random, of which a tenth are right by chance
    test = NoisyImages(num_train=300, num_valid=150, noise=0.5, meta_split="test")
    assert_equal(test.batch(tasks, 3, "train"), train)  # weights of examples stay theirs
    fresh = made_images("mnist", "test")
    assert torch.equal(test.batch(tasks, 3, "valid")["targets"][1], fresh.labels)
    torch.testing.assert_close(test.batch(tasks, 3, "valid")["inputs"][1], (fresh.pixels.double() - mean) / 255)
    other = NoisyImages(num_train=300, num_valid=150, data_seed=1)
    assert not torch.equal(other.batch(tasks, 0, "train")["targets"], train["targets"])


@pytest.mark.parametrize("hidden", [(), (8,), (6, 5, 4)])
@pytest.mark.parametrize(("activation", "layer"), [("relu", nn.ReLU()), ("softplus", nn.Softplus()), ("elu", nn.ELU())])
@pytest.mark.usefixtures("no_files")
def test_the_mlp_is_the_sequence_of_layers(hidden: tuple[int, ...], activation: Any, layer: nn.Module) -> None:
    family = ImageMLP(hidden=hidden, activation=activation, batch_size=9)
    tasks = family.sample(1, seeded())
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))
    widths = [images.NUM_PIXELS, *hidden, images.NUM_CLASSES]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), layer)][:-1]
    module = nn.Sequential(*layers)
    module.load_state_dict({k: params[f"layer{int(k[0]) // 2}{k[1:]}"] for k in module.state_dict()})
    logits = module(batch["inputs"])
    assert logits.shape == (9, 10)
    torch.testing.assert_close(family.outputs(params, batch), logits, rtol=TOLERANCE, atol=TOLERANCE)
    expected = torch.stack([-row.log_softmax(0)[t] for row, t in zip(logits, batch["targets"], strict=True)]).mean()
    torch.testing.assert_close(family.loss(params, batch), expected, rtol=TOLERANCE, atol=TOLERANCE)
    right = [float(row.argmax() == t) for row, t in zip(logits, batch["targets"], strict=True)]
    assert float(family.metrics(params, batch)["accuracy"]) == pytest.approx(sum(right) / 9)


def test_the_mlp_starts_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    params = ImageMLP(hidden=(30,)).init_params({"seed": torch.arange(40)})
    for name, fan_in, fan_out in (("layer0", 784, 30), ("layer1", 30, 10)):
        reference = [nn.Linear(fan_in, fan_out) for _ in range(40)]
        for kind in ("weight", "bias"):
            ours = params[f"{name}.{kind}"].flatten()
            theirs = torch.stack([getattr(layer, kind).detach() for layer in reference]).flatten()
            assert float(ours.abs().max()) <= fan_in**-0.5 and float(ours.abs().max()) > 0.98 * fan_in**-0.5
            quantiles = torch.linspace(0, 1, 9)
            gaps = (ours[:9000].quantile(quantiles) - theirs[:9000].quantile(quantiles)).abs() * fan_in**0.5
            assert float(gaps.max()) < 6 / min(len(ours), 9000) ** 0.5  # standard errors of a quantile are below 1/√n


def test_the_mlp_starts_from_normal_numbers_where_asked() -> None:
    for given, std in ((None, 0.01), (0.2, 0.2)):
        params = ImageMLP(init="normal", std=given).init_params({"seed": torch.arange(30)})
        for values in params.values():
            z = values / std
            tolerance = 5 / z.numel() ** 0.5
            assert abs(float(z.mean())) < tolerance
            assert float(z.square().mean()) == pytest.approx(1, abs=1.5 * tolerance)
            assert float((z.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=tolerance)


@pytest.mark.usefixtures("no_files")
def test_minibatches_are_independent_draws_from_all_images() -> None:
    family = ImageMLP(batch_size=2000)
    tasks = family.sample(2, seeded())
    drawn = {
        (split, step): indices(family.batch(tasks, step, split)["inputs"]) for split in SPLITS for step in range(3)
    }
    flat = [row for index in drawn.values() for row in index]
    assert len({tuple(row.tolist()) for row in flat}) == 12  # tasks, steps and splits each draw their own
    for row in flat:
        assert int(row.min()) >= 0 and int(row.max()) < 500
        counts = row.bincount(minlength=500)
        assert int(counts.gt(0).sum()) > 480  # 500 (1 - e^-4) = 491 expected
        assert float((counts - 4.0).square().sum() / 4) == pytest.approx(499, abs=6 * (2 * 499) ** 0.5)  # χ²
    same = torch.stack([(a == b).double().mean() for a, b in itertools.pairwise(flat)])
    assert float(same.max()) < 0.01  # 1/500 expected


@pytest.mark.usefixtures("no_files")
def test_pixels_are_scaled_and_labels_belong_to_their_images() -> None:
    for meta_split in ("train", "valid", "test"):
        pixels, labels = made_images("mnist", meta_split)
        batch = ImageMLP(batch_size=50, meta_split=meta_split).batch({"seed": torch.tensor([5])}, 3, "valid")
        index = indices(batch["inputs"][0])
        assert torch.equal(batch["inputs"][0], pixels[index].double() / 255)
        assert torch.equal(batch["targets"][0], labels[index])
        assert batch["inputs"].max() == 1.0 and batch["inputs"].min() == 0.0


@pytest.mark.usefixtures("no_files")
def test_images_are_cropped_scaled_down_and_standardized_in_this_order() -> None:
    tasks = {"seed": torch.tensor([5])}
    index = indices(ImageMLP(batch_size=50).batch(tasks, 3, "valid")["inputs"][0])
    small = ImageMLP(batch_size=50, crop=24, size=12, standardize=True)
    found = small.batch(tasks, 3, "valid")["inputs"][0]
    square = made_images("mnist", "train").pixels[index].double().reshape(50, 28, 28)[:, 2:26, 2:26] / 255
    blocks = square.reshape(50, 12, 2, 12, 2).mean((2, 4))
    torch.testing.assert_close(found.reshape(50, 12, 12), (blocks - 0.1307) / 0.3081, rtol=TOLERANCE, atol=TOLERANCE)
    weight = small.init_params(tasks)["layer0.weight"]
    assert weight.shape == (1, 20, 144)
    assert 0.98 / 14 < float(weight.abs().max()) <= 1 / 14  # as its part of a network on whole images of 14 x 14


@pytest.mark.usefixtures("no_files")
def test_labels_are_permuted_anew_every_so_many_steps() -> None:
    plain, permuted = ImageMLP(batch_size=300), ImageMLP(batch_size=300, relabel_every=3)
    tasks = {"seed": torch.tensor([5, 6])}
    maps: dict[tuple[int, int], list[int]] = {}
    for step in range(6):
        for split in SPLITS:
            before, after = plain.batch(tasks, step, split), permuted.batch(tasks, step, split)
            assert torch.equal(before["inputs"], after["inputs"])
            for task in range(2):
                pairs = {*zip(before["targets"][task].tolist(), after["targets"][task].tolist(), strict=True)}
                assert len(pairs) == 10  # one label for each, and no two alike
                found = [new for _, new in sorted(pairs)]
                assert sorted(found) == [*range(10)] and maps.setdefault((task, step // 3), found) == found
    assert len({tuple(found) for found in maps.values()}) == 4  # two tasks, two stretches of steps


def test_streams_are_apart_and_repeatable() -> None:
    keys: list[Any] = [
        (seed, purpose, step)
        for seed in (0, 1, 2**62)
        for purpose in ("init", "labels", *SPLITS)
        for step in (0, 1, 10**6)
    ]
    drawn = [tuple(streams.stream(*key).integers(2**63, size=20)) for key in keys]
    assert len({value for row in drawn for value in row}) == 20 * len(keys)  # so none is a shifted copy of another
    assert drawn == [tuple(streams.stream(*key).integers(2**63, size=20)) for key in keys]


# The data sets.


def raw(root: Path, folder: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a data set's files in the plainest way."""
    pixels = gzip.decompress((root / folder / "raw" / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((root / folder / "raw" / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    count = int.from_bytes(pixels[4:8], "big")
    assert pixels[:4] == bytes([0, 0, 8, 3]) and labels[:4] == bytes([0, 0, 8, 1])
    return np.frombuffer(pixels[16:], np.uint8).reshape(count, -1), np.frombuffer(labels[8:], np.uint8)


@pytest.mark.parametrize(
    ("dataset", "folder", "labels", "mean"),
    [
        # First labels of training, validation and test images; mean pixel of the 60,000, as commonly published.
        ("mnist", "MNIST", ([5, 0, 4, 1, 9], [3, 8, 6, 9, 6], [7, 2, 1, 0, 4]), 0.1307),
        ("fashion-mnist", "FashionMNIST", ([9, 0, 0, 3, 0], [9, 2, 1, 0, 2], [9, 2, 1, 1, 6]), 0.2860),
    ],
)
def test_images_are_the_published_ones(
    data_root: Path, dataset: Any, folder: str, labels: tuple[list[int], ...], mean: float
) -> None:
    (pixels, classes), (test_pixels, test_classes) = (raw(data_root, folder, part) for part in ("train", "t10k"))
    parts = {
        "train": (pixels[:50_000], classes[:50_000]),
        "valid": (pixels[50_000:], classes[50_000:]),
        "test": (test_pixels, test_classes),
    }
    total = 0
    for (meta_split, (expected, expected_labels)), first in zip(parts.items(), labels, strict=True):
        found = images.load(dataset, meta_split)  # pyright: ignore[reportArgumentType]
        assert found.pixels.shape == expected.shape and torch.equal(found.pixels, torch.tensor(expected))
        assert torch.equal(found.labels, torch.tensor(expected_labels).long())
        assert found.labels[:5].tolist() == first
        total += int(found.pixels.sum(dtype=torch.int64)) * (meta_split != "test")
    assert total / (60_000 * 784 * 255) == pytest.approx(mean, abs=5e-5)


def test_mnist_sums_are_known(data_root: Path) -> None:
    sums = [int(images.load("mnist", part).pixels.sum(dtype=torch.int64)) for part in ("train", "valid", "test")]
    assert sums == [1_309_089_051, 258_209_494, 264_923_200]
    assert images.load("mnist", "train").pixels[0].nonzero()[0].item() == 5 * 28 + 12  # the first ink of the first 5


def test_meta_training_never_sees_held_out_images(data_root: Path) -> None:
    pixels, labels = raw(data_root, "MNIST", "train")
    position = {row.tobytes(): i for i, row in enumerate(pixels)}
    position |= {row.tobytes(): 60_000 + i for i, row in enumerate(raw(data_root, "MNIST", "t10k")[0])}
    assert len(position) == 70_000  # all images differ, so an image tells where it is from
    ranges = {"train": (0, 50_000), "valid": (50_000, 60_000), "test": (60_000, 70_000)}
    for meta_split, (start, stop) in ranges.items():
        family = ImageMLP(batch_size=1000, meta_split=meta_split)  # pyright: ignore[reportArgumentType]
        tasks = family.sample(2, seeded())
        seen = []
        for split in SPLITS:
            batch = family.batch(tasks, 0, split)
            found = (batch["inputs"] * 255).round().to(torch.uint8).flatten(0, 1).numpy()
            seen += [position[row.tobytes()] for row in found]
            if meta_split != "test":
                assert batch["targets"].flatten().tolist() == labels[seen[-2000:]].tolist()
        assert start <= min(seen) < start + (stop - start) // 100
        assert stop - (stop - start) // 100 <= max(seen) < stop


def test_files_are_read_once(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.load("mnist", "test")
    monkeypatch.setattr(images, "_content", lambda *args: pytest.fail("the files were read again"))
    family = ImageMLP(meta_split="test")
    family.batch(family.sample(1, seeded()), 0, "train")
    assert images.load("mnist", "test").pixels is images.load("mnist", "test").pixels


def unreachable(calls: list[str]) -> Callable[..., str]:
    def retrieve(url: str, known_hash: str, **kwargs: Any) -> str:
        assert known_hash.startswith("sha256:")
        calls.append(url)
        raise ConnectionError("no route to host")

    return retrieve


@pytest.mark.usefixtures("fresh_cache")
def test_missing_data_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    calls: list[str] = []
    monkeypatch.setattr(pooch, "retrieve", unreachable(calls))
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LEARNEDOPT_DATA", str(tmp_path / "data"))
    family = ImageMLP()
    with pytest.raises(FileNotFoundError) as caught:
        family.batch(family.sample(1, seeded()), 0, "train")
    message = str(caught.value)
    for part in ("data/MNIST/raw", "cache/MNIST/raw", "no route to host", "Set LEARNEDOPT_DATA to a folder"):
        assert part in message
    assert len(calls) == 2 and all(url.endswith("mnist/train-images-idx3-ubyte.gz") for url in calls)
    monkeypatch.delenv("LEARNEDOPT_DATA")
    with pytest.raises(FileNotFoundError, match=r"no train-images.*FashionMNIST/raw \(LEARNEDOPT_DATA is not set\)"):
        images.load("fashion-mnist", "valid")


@pytest.mark.usefixtures("fresh_cache")
def test_a_failed_download_is_told_in_a_line_and_in_full_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = images._SOURCES["mnist"]._replace(mirrors=("http://127.0.0.1:9/",))
    monkeypatch.setattr(images, "_SOURCES", {"mnist": nowhere})
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("LEARNEDOPT_DATA", raising=False)
    with caplog.at_level("INFO"), pytest.raises(FileNotFoundError) as caught:
        images.load("mnist", "test")
    name, place = "t10k-images-idx3-ubyte.gz", tmp_path / "MNIST" / "raw"
    assert str(caught.value) == (
        f"there is no {name} in {place} (LEARNEDOPT_DATA is not set), and it could not be downloaded (127.0.0.1: "
        "Connection refused). Set LEARNEDOPT_DATA to a folder that holds "
        f"MNIST/raw/{name}, or put the file into {place}"
    )
    assert "Max retries exceeded" in caplog.text


@pytest.mark.usefixtures("fresh_cache")
def test_files_are_looked_for_in_the_cache_and_then_downloaded(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    source = data_root / "MNIST" / "raw"
    cached = tmp_path / "MNIST" / "raw"
    cached.mkdir(parents=True)
    shutil.copy(source / "t10k-labels-idx1-ubyte.gz", cached)
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append(url)
        if "ossci" in url:  # the first mirror is down
            raise ConnectionError("down")
        assert hashlib.sha256((source / fname).read_bytes()).hexdigest() == known_hash.removeprefix("sha256:")
        return str(shutil.copy(source / fname, path))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("LEARNEDOPT_DATA")
    found = images.load("mnist", "test")
    assert [url.rpartition("/")[2] for url in asked] == ["t10k-images-idx3-ubyte.gz"] * 2
    assert torch.equal(found.labels, torch.tensor(raw(data_root, "MNIST", "t10k")[1]).long())


def recompressed(packed: bytes) -> bytes:
    content = bytearray(gzip.decompress(packed))
    content[3] = 7  # not a label file's magic number
    return gzip.compress(bytes(content))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda packed: packed[: len(packed) // 2], id="truncated"),
        pytest.param(lambda packed: packed[:100] + bytes([packed[100] ^ 1]) + packed[101:], id="one bit"),
        pytest.param(recompressed, id="magic number"),
        pytest.param(lambda packed: b"<html>not found</html>", id="no gzip"),
        pytest.param(lambda packed: b"", id="empty"),
    ],
)
@pytest.mark.usefixtures("fresh_cache")
def test_a_corrupt_file_is_named(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copy(data_root / "MNIST" / "raw" / name, folder)
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    monkeypatch.setenv("LEARNEDOPT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"corrupt.*SHA-256.*delete it") as caught:
        images.load("mnist", "test")
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("fresh_cache")
def test_one_data_set_is_not_taken_for_another(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MNIST").symlink_to(data_root / "FashionMNIST")
    monkeypatch.setenv("LEARNEDOPT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="another file than the mnist that was published"):
        images.load("mnist", "test")


# The registry.


def test_names_are_those_that_the_documentation_names() -> None:
    assert {
        "quadratic", "logistic", "linear-regression", "image-mlp", "sine", "omniglot", "image-folder", "mini-imagenet"
    } <= set(names())  # fmt: skip
    classes = [Quadratic, LogisticRegression, LinearRegression, ImageMLP]
    assert [type(make(name)) for name in names()[:4]] == classes
    assert all(hasattr(families, name) for name in families.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Sines'"):
        families.Sines  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make("quadratics"), ValueError, "no task family 'quadratics'; did you mean 'quadratic'.*image-mlp"),
        (lambda: make("quadratic", dims=3), ValueError, "no option 'dims'; did you mean 'dim'.*dim: int = 10"),
        (lambda: make("image-mlp", hiden=(3,)), ValueError, "did you mean 'hidden'"),
        (lambda: make("image-mlp", hidden=20), TypeError, r"hidden=20 \(int\).*hidden: tuple\[int, ...\]"),
        (lambda: make("image-mlp", hidden=(20, 1.5)), TypeError, r"hidden=\(20, 1.5\)"),
        (lambda: make("image-mlp", hidden=(20, 0)), ValueError, r"hidden\[1\]=0"),
        (lambda: make("image-mlp", activation="sigmod"), ValueError, "activation='sigmod'.*did you mean 'sigmoid'"),
        (lambda: make("image-mlp", dataset="cifar"), ValueError, "dataset='cifar'.*'fashion-mnist'"),
        (lambda: make("image-mlp", batch_size=0), ValueError, "batch_size=0"),
        (lambda: make("image-mlp", batch_size=True), TypeError, "batch_size=True"),
        (lambda: make("image-mlp", init="zero"), ValueError, "init='zero'"),
        (lambda: make("image-mlp", std=0.1), ValueError, "std=0.1 has no effect with init='linear'"),
        (lambda: make("image-mlp", std=-0.1, init="normal"), ValueError, "std=-0.1"),
        (lambda: make("image-mlp", size=9), ValueError, "size=9 does not divide crop=28"),
        (lambda: make("image-mlp", size=0), ValueError, "size=0"),
        (lambda: make("image-mlp", relabel_every=0), ValueError, "relabel_every=0"),
        (lambda: make("image-mlp", standardize=1), TypeError, "standardize=1"),
        (lambda: make("image-mlp", meta_split="tets"), ValueError, "meta_split='tets'.*did you mean 'test'"),
        (lambda: make("quadratic", dtype="float16"), ValueError, "dtype='float16'"),
        (lambda: make("quadratic", dtype=torch.float64), TypeError, "dtype=torch.float64"),
        (lambda: make("quadratic", dim=-1), ValueError, "dim=-1"),
        (lambda: make("quadratic", dim=10.0), TypeError, "dim=10.0"),
        (lambda: make("quadratic", distribution="normal"), ValueError, "distribution='normal'.*'gaussian'"),
        (lambda: make("quadratic", start_scale=-1), ValueError, "start_scale=-1"),
        (lambda: make("quadratic", start_scale=float("nan")), ValueError, "start_scale=nan"),
        (lambda: make("logistic", num_train=0), ValueError, "num_train=0"),
        (lambda: make("linear-regression", num_relevant=11), ValueError, "num_relevant=11 of dim=10"),
        (lambda: make("noisy-images", noise=1.5), ValueError, "noise=1.5 is no share"),
        (lambda: make("noisy-images", data_seed=None), TypeError, "data_seed=None"),
        (lambda: make("linear-regression", condition_number=0.5), ValueError, "condition_number=0.5"),
        (lambda: make("linear-regression", dim=1), ValueError, "in one dimension"),
        (lambda: make("linear-regression", noise="low"), TypeError, "noise='low'"),
        (lambda: ImageMLP(hidden=[20]), ValueError, r"hidden=\[20\] is not a tuple"),  # pyright: ignore[reportArgumentType]
        (lambda: Quadratic(dim=2.0), ValueError, "dim=2.0"),  # pyright: ignore[reportArgumentType]
        (lambda: build({"name": "quadratic"}), ValueError, "no configuration"),
        (lambda: build({"name": "os", "options": {}}), ValueError, "no task family 'os'"),
        (lambda: build({"name": "quadratic", "options": {"dim": None}}), TypeError, "dim=None"),
    ],
)
def test_what_cannot_be_made_is_refused(call: Callable[[], TaskFamily], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_lists_are_taken_for_tuples() -> None:
    assert make("image-mlp", hidden=[40, 40]) == ImageMLP(hidden=(40, 40))


@dataclasses.dataclass(frozen=True)
class Bowl(TaskFamily):
    """A family of a user's own."""

    center: Any

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {"center": self.center + torch.randn(num_tasks, 2, generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"x": torch.zeros_like(tasks["center"])}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        return tasks

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (params["x"] - batch["center"]).square().sum()


class Loose(Bowl):
    """One whose arguments are not on record."""

    def __init__(self, size: int) -> None:
        super().__init__(float(size))


def test_a_users_own_family_joins_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.FAMILIES, "registered", {})
    with pytest.raises(ValueError, match=r"Bowl is not registered.*register\('<name>', Bowl\)"):
        describe(Bowl(1.0))
    register("bowl", Bowl)
    register("bowl", Bowl)  # a module that is imported twice does no harm
    assert names()[-1] == "bowl"
    assert build(json.loads(json.dumps(describe(Bowl(2.5))))) == make("bowl", center=2.5)
    wrong: list[tuple[dict[str, Any], str]] = [({}, "needs center="), ({"centre": 1.0}, "did you mean 'center'")]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            make("bowl", **options)
    with pytest.raises(ValueError, match="did you mean 'bowl'"):
        make("bawl")


def test_what_cannot_join_the_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.FAMILIES, "registered", {})
    register("bowl", Bowl)
    for name, factory in (("bowl", Loose), ("quadratic", Bowl)):
        with pytest.raises(ValueError, match="already registered"):
            register(name, factory)
    with pytest.raises(TypeError, match="class or function"):
        register("seven", 7)  # pyright: ignore[reportArgumentType]
    register("seven", lambda: 7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="returned a int"):
        make("seven")
    for value, where in ((torch.ones(2), ""), (float("inf"), ""), ((1.0, (2.0, object())), r"\[1\]\[1\]")):
        with pytest.raises(TypeError, match=rf"bowl\.center{where} is"):
            describe(Bowl(value))
