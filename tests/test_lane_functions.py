"""Losses of particles of several tasks: torch's rules for a vmap within another, and where they are helped."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from problems import FLOAT
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from learnedopt.execution.lane_functions import LaneFunctions

LOSSES = {
    "mse": functional.mse_loss,
    "smooth-l1": functional.smooth_l1_loss,
    "huber": functional.huber_loss,
    "l1": functional.l1_loss,
    "logits": functional.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(6, 1), (4,), ()], ids=["column", "row", "number"])
def test_targets_that_all_particles_share(name: str, reduction: str, shape: tuple[int, ...]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[name](outputs, targets, reduction=reduction)

    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 4, *shape, generator=generator, dtype=FLOAT)
    targets = torch.rand(2, *shape, generator=generator, dtype=FLOAT)
    with LaneFunctions():
        found = torch.func.vmap(torch.func.vmap(loss, in_dims=(0, None)))(outputs, targets)
        grads = torch.func.vmap(torch.func.vmap(torch.func.grad(loss), in_dims=(0, None)))(outputs, targets)
    for i, target in enumerate(targets):
        for j, output in enumerate(outputs[i]):
            torch.testing.assert_close(found[i, j], loss(output, target), rtol=1e-14, atol=0)
            torch.testing.assert_close(grads[i, j], torch.func.grad(loss)(output, target), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("ignored", [0, 3, 7], ids=str)
def test_cross_entropy_is_torch_s(ignored: int) -> None:
    """With its gradient; rows of target -100 do not count, and where all are, the result is NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, 7, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(6, (3, 7), generator=generator)
    targets[:, :ignored] = -100
    mapped = torch.func.vmap(torch.func.vmap(functional.cross_entropy, in_dims=(0, None)))
    leaves = logits.clone().requires_grad_()
    with LaneFunctions():
        found = mapped(leaves, targets)
    own = logits.clone().requires_grad_()
    expected = torch.stack(
        [torch.stack([functional.cross_entropy(own[i, j], targets[i]) for j in range(4)]) for i in range(3)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert found.isnan().all() == (ignored == 7)
    if ignored < 7:
        gradients = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((found, leaves), (expected, own))]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_products_under_autocast_are_left_to_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)

    def layer(w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (functional.linear(x, w).tanh() @ w).float().square().mean()

    found = []
    for mode in (LaneFunctions(), nullcontext()):
        leaves = w.clone().requires_grad_()
        with mode:
            values = torch.func.vmap(layer)(leaves)
        found.append((values, *torch.autograd.grad(values.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_classes_out_of_range_are_an_error() -> None:
    mapped = torch.func.vmap(functional.cross_entropy, in_dims=(0, None))
    with LaneFunctions(), pytest.raises(RuntimeError, match="out of bounds"):
        mapped(torch.randn(2, 3, 4), torch.tensor([0, 9, 1]))


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 2},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"weight": torch.arange(1.0, 7.0, dtype=FLOAT)},
    ],
    ids=["ignore_index", "sum", "none", "label_smoothing", "weight"],
)
def test_cross_entropy_with_options_is_left_to_torch(options: dict[str, object]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, **options)  # pyright: ignore[reportArgumentType]

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 6, generator=generator, dtype=FLOAT)
    targets = torch.randint(6, (7,), generator=generator)
    with LaneFunctions():
        found = torch.func.vmap(loss, in_dims=(0, None))(logits, targets)
    expected = torch.stack([loss(x, targets) for x in logits])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_cross_entropy_is_one_softmax_along_the_rows() -> None:
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._log_softmax.default:
                seen.append((tuple(args[0].shape), args[1]))
            return func(*args, **(kwargs or {}))

    with Seen(), LaneFunctions():
        torch.func.vmap(functional.cross_entropy, in_dims=(0, None))(torch.randn(4, 70, 6), torch.zeros(70).long())
    assert seen == [((4, 6, 70), 1)]
