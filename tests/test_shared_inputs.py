"""Losses of particles of several tasks: torch's rules for a vmap within another, and where they are helped."""

from __future__ import annotations

import pytest
import torch
from problems import FLOAT
from torch import Tensor
from torch.nn import functional

from learnedopt.execution.shared_inputs import SharedInputs

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
    with SharedInputs():
        found = torch.func.vmap(torch.func.vmap(loss, in_dims=(0, None)))(outputs, targets)
        grads = torch.func.vmap(torch.func.vmap(torch.func.grad(loss), in_dims=(0, None)))(outputs, targets)
    for i, target in enumerate(targets):
        for j, output in enumerate(outputs[i]):
            torch.testing.assert_close(found[i, j], loss(output, target), rtol=1e-14, atol=0)
            torch.testing.assert_close(grads[i, j], torch.func.grad(loss)(output, target), rtol=1e-14, atol=1e-16)
