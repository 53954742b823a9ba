"""Mixed mode on real layers, losses and linear algebra: the plain tape's meta-gradient, and what the log says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from problems import TanhMLP, generic_theta, sample, template
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from learnedopt import Estimate, Execution, FinalLoss, InnerLoop, ModuleFamily, SumOfLosses, Tasks, Unrolled, optimizers
from learnedopt.core.tree import Params
from learnedopt.execution.memory import peak_of

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning"),
]

ONE, SEVERAL = 1, 3


class Kind(NamedTuple):
    """A model on inputs of ``shape`` with 3 outputs; ``reason``: of the log, None where forward mode serves."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (6, 4)
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    reason: str | None = None
    chunks: tuple[int, ...] = (ONE, SEVERAL)


class Of(nn.Module):
    """A module and how it is called."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


class OnMatrix(nn.Module):
    """A scalar function of a matrix (3, 3) near 2 I, positive definite and of no symmetry."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.matrix, self.function = nn.Parameter(2 * torch.eye(3) + 0.3 * torch.rand(3, 3)), function

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] @ self.matrix + self.function(self.matrix).sum() ** 2


def mlp(activation: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), norm or nn.Identity(), activation, nn.Linear(4, 3))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *layers, nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, one_hot(targets))


def one_hot(targets: Tensor) -> Tensor:
    return (targets[:, None] == torch.arange(3)).to(torch.float64)  # torch's own has no rule for vmap


def regression(loss: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: loss(outputs, one_hot(targets), **options)


def of_matrix(function: Callable[[Tensor], Tensor], reason: str | None = None) -> Kind:
    return Kind(lambda: OnMatrix(function), reason=reason)


def symmetric(a: Tensor) -> Tensor:
    return a @ a.mT + torch.eye(3)


def attention(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0][:, -1, :3]


FRAME = torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(3, 3)
LAST = {"batch_first": True}
SUMMED = regression(functional.mse_loss, reduction="sum")
linalg = torch.linalg
KINDS: dict[str, Kind] = {
    "tanh": Kind(lambda: mlp(nn.Tanh())),
    "silu": Kind(lambda: mlp(nn.SiLU()), reason="silu_backward"),
    "mish": Kind(lambda: mlp(nn.Mish()), reason="mish_backward"),
    "gelu": Kind(lambda: mlp(nn.GELU())),
    "mse": Kind(lambda: mlp(nn.Tanh()), loss=squares, reason="MseLoss"),
    "mse, summed": Kind(lambda: mlp(nn.Tanh()), loss=SUMMED, reason="MseLoss"),
    "squares": Kind(lambda: mlp(nn.Tanh()), loss=lambda outputs, targets: (outputs - one_hot(targets)).square().mean()),
    "huber": Kind(lambda: mlp(nn.Tanh()), loss=regression(functional.huber_loss, delta=0.4), reason="huber_loss"),
    "smooth l1": Kind(lambda: mlp(nn.Tanh()), loss=regression(functional.smooth_l1_loss, beta=0.4)),
    "group norm": Kind(lambda: images(nn.GroupNorm(2, 4)), (6, 2, 6, 6), reason="native_group_norm_backward"),
    "batch norm": Kind(lambda: images(nn.BatchNorm2d(4, track_running_stats=False)), (6, 2, 6, 6)),
    "instance norm": Kind(lambda: images(nn.InstanceNorm2d(4, affine=True)), (6, 2, 6, 6)),
    "layer norm": Kind(lambda: mlp(nn.Tanh(), nn.LayerNorm(4))),
    "RMS norm": Kind(lambda: mlp(nn.Tanh(), nn.RMSNorm(4))),
    "LSTM": Kind(lambda: Of(nn.LSTM(4, 3, **LAST), lambda m, x: m(x)[0][:, -1]), (6, 5, 4), chunks=(ONE,)),
    "GRU": Kind(lambda: Of(nn.GRU(4, 3, **LAST), lambda m, x: m(x)[0][:, -1]), (6, 5, 4), chunks=(ONE,)),
    "LSTM cell": Kind(lambda: Of(nn.LSTMCell(4, 3), lambda m, x: m(x)[0]), chunks=(ONE,)),
    "attention": Kind(lambda: Of(nn.MultiheadAttention(4, 2, **LAST), attention), (6, 5, 4)),
    "transformer": Kind(
        lambda: Of(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **LAST), lambda m, x: m(x)[:, -1, :3]), (6, 5, 4)
    ),
    "det": of_matrix(linalg.det, "LinalgDet"),
    "slogdet": of_matrix(lambda a: linalg.slogdet(a)[1], "LinalgSlogdet"),
    "logdet": of_matrix(lambda a: torch.logdet(symmetric(a)), "LinalgSlogdet"),
    "solve": of_matrix(lambda a: linalg.solve(a, FRAME), "LinalgSolveEx"),
    "inverse of Cholesky": of_matrix(
        lambda a: FRAME * torch.cholesky_inverse(linalg.cholesky(symmetric(a))), "CholeskyInverse"
    ),
    "inv": of_matrix(lambda a: FRAME * linalg.inv(a)),
    "cholesky": of_matrix(lambda a: FRAME * linalg.cholesky(symmetric(a))),
    "triangular": of_matrix(lambda a: FRAME * linalg.solve_triangular(a.tril(), FRAME, upper=False)),
    "eigh": of_matrix(lambda a: linalg.eigvalsh(symmetric(a)) * FRAME[0] + linalg.eigh(symmetric(a))[1] ** 2 @ FRAME),
    "svd": of_matrix(lambda a: linalg.svd(a)[0] ** 2 * FRAME + linalg.svdvals(a)),
    "qr": of_matrix(lambda a: linalg.qr(a)[1] * FRAME),
    "lstsq": of_matrix(lambda a: linalg.lstsq(a[:, :2], FRAME).solution),
    "pinv": of_matrix(lambda a: linalg.pinv(a[:, :2]) * FRAME[:2], "LinalgPinv"),
    "norm": of_matrix(lambda a: linalg.matrix_norm(a), "LinalgVectorNorm"),
    "prod": of_matrix(lambda a: a.prod(0), "Prod"),
    "cumprod": of_matrix(lambda a: a.cumprod(1), "Cumprod"),
}  # fmt: skip
CASES = [(name, chunk) for name, kind in KINDS.items() for chunk in kind.chunks]


def estimate(kind: Kind, execution: Execution) -> Estimate:
    """Return the meta-gradient of a learned start and rate, through two steps of three tasks."""

    def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * (seed % 1000) + 10 * step + (split == "valid"))
        return torch.randn(kind.shape, generator=generator), torch.randint(3, kind.shape[:1], generator=generator)

    family = ModuleFamily(kind.build, kind.loss, data)
    loop = InnerLoop(family, optimizers.example("maml", template(family)), execution)
    tasks = family.sample(3, torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH):
        return Unrolled(2).estimate(loop, generic_theta(loop.rule), SumOfLosses(), loop.start(tasks))


@pytest.mark.parametrize(("name", "chunk_size"), CASES, ids=[f"{name}-{chunk}" for name, chunk in CASES])
def test_mixed_mode_is_the_plain_tape(name: str, chunk_size: int, caplog: pytest.LogCaptureFixture) -> None:
    kind = KINDS[name]
    expected = estimate(kind, Execution(chunk_size))
    with caplog.at_level(logging.WARNING, "learnedopt"):
        found = estimate(kind, Execution(chunk_size, mixed_mode=True))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    for key, grad in expected.grads.items():
        worst = (found.grads[key] - grad).abs().max()
        assert worst <= 1e-10 * grad.abs().max() + 1e-14, (key, worst)
    assert max(g.abs().max() for g in expected.grads.values()) > 1e-3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (kind.reason is not None), said
    assert kind.reason is None or kind.reason in said[0]


class Wide(TanhMLP):
    """On so many points that what a gradient reads is larger than the parameters; in squares: reverse mode."""

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        batch = super().batch(tasks, step, split)
        return {"x": batch["x"].repeat(1, 50, 1), "y": batch["y"].repeat(1, 50)}

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.mse_loss(self.outputs(params, batch)[:, 0], batch["y"].to(torch.float64))


def test_reverse_over_reverse_keeps_parameters_in_place_of_graphs_as_well(caplog: pytest.LogCaptureFixture) -> None:
    def peak(num_steps: int, execution: Execution) -> int:
        loop = InnerLoop(Wide(), optimizers.example("maml", template(Wide())), execution)
        theta, carry = generic_theta(loop.rule), loop.start(sample(Wide(), 1))
        return peak_of(lambda: Unrolled(num_steps).estimate(loop, theta, FinalLoss(), carry))

    plain, mixed = (peak(9, x) - peak(4, x) for x in (Execution(), Execution(mixed_mode=True)))
    batch = Wide().batch(sample(Wide(), 1), 0, "train")
    params, batch = (sum(x.numel() * x.element_size() for x in y.values()) for y in (template(Wide()), batch))
    assert plain > 5 * (batch + 50 * params)
    assert mixed <= 5 * (batch + 2 * params)
    assert "MseLoss" in caplog.text
