"""Vetting: every kind of silently wrong loss is found and named, and innocent losses pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import LayerNormMLP, Logistic, Quadratic, TanhMLP
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import learnedopt
from learnedopt import Execution, InnerLoop, ModuleFamily, TaskFamily, Tasks
from learnedopt.core import mixed_mode
from learnedopt.core.inner_objective import InnerObjective, Penalty
from learnedopt.core.tree import Params, Theta
from learnedopt.core.vetting import Finding, examine, report, vet

# torch's own forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

OneLoss = Callable[[Params, Any], Tensor]


class Given(TaskFamily):
    """Any loss of given parameters on six points of three features with labels; tasks differ in all of them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], loss: OneLoss, dtype: torch.dtype = torch.float32) -> None:
        self.shapes, self.one, self.dtype = shapes, loss, dtype
        self.held: dict[str, Any] = {}
        self.scale = 0.7

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {"seed": torch.randint(1000, (num_tasks,), generator=generator)}

    def _draw(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=self.dtype)

    def init_params(self, tasks: Tasks) -> Params:
        seeds = tasks["seed"].tolist()
        return {
            k: self.scale * torch.stack([self._draw(seed + i, *shape) for seed in seeds])
            for i, (k, shape) in enumerate(self.shapes.items())
        }

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        seeds = [seed + 7 * step + 3 for seed in tasks["seed"].tolist()]
        labels = [torch.randint(3, (6,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"x": torch.stack([self._draw(seed, 6, 3) for seed in seeds]), "y": torch.stack(labels)}

    def loss(self, params: Params, batch: Any) -> Tensor:
        return self.one(params, batch)


def ask(
    family: TaskFamily, second_derivatives: bool = True, num_tasks: int = 2, objective: InnerObjective | None = None,
    theta: Theta | None = None, **execution: Any,
) -> list[Finding]:  # fmt: skip
    """Examine a loop of gradient descent on the first tasks of a family."""
    loop = InnerLoop(family, learnedopt.optimizers.make("sgd", lr=0.1), Execution(**execution))
    if objective is not None:
        loop.inner_objective = objective  # type: ignore[attr-defined]
    theta = theta or loop.rule.init_theta(torch.Generator().manual_seed(0))
    carry = loop.start(family.sample(num_tasks, torch.Generator().manual_seed(3)))
    return examine(loop, theta, carry._replace(state=()), second_derivatives=second_derivatives)


def failed(findings: list[Finding]) -> str:
    """Return what failed, in words."""
    return report([finding for finding in findings if not finding.passed]) if any_failed(findings) else ""


def any_failed(findings: list[Finding]) -> bool:
    return any(not finding.passed for finding in findings)


def mlp(params: Params, x: Tensor) -> Tensor:
    return functional.relu(x @ params["w1"] + params["b1"]) @ params["w2"]


MLP = {"w1": (3, 5), "b1": (5,), "w2": (5, 3)}


def cross_entropy(params: Params, batch: Any) -> Tensor:
    return functional.cross_entropy(mlp(params, batch["x"]), batch["y"])


class Net(nn.Module):
    """Two layers, the second checkpointed as asked."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(3, 5), nn.Linear(5, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.reentrant is None:
            return self.second(hidden)
        return checkpoint(lambda h: self.second(h).tanh(), hidden, use_reentrant=self.reentrant)


def of_module(module: nn.Module) -> tuple[dict[str, tuple[int, ...]], OneLoss]:
    """Return the shapes and the loss of a module that functional_call gives its parameters."""

    def loss(params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(functional_call(module, params, (batch["x"],)), batch["y"])

    return {k: tuple(p.shape) for k, p in module.named_parameters()}, loss


def at_rest(module: nn.Module) -> nn.Module:
    for _ in range(200):
        module(torch.zeros(1, 3))
    return module


def random_noise(params: Params, batch: Any) -> Tensor:
    return cross_entropy(params, {**batch, "x": functional.dropout(batch["x"], 0.3)})


def stochastic_depth(params: Params, batch: Any) -> Tensor:
    kept = random.random() < 0.9999  # rarely seen in values
    return cross_entropy(params, batch) * (1.0 if kept else 2.0)


def numpy_noise(params: Params, batch: Any) -> Tensor:
    return cross_entropy(params, batch) + 1e-3 * float(np.random.rand())


def local_dropout(params: Params, batch: Any) -> Tensor:
    return cross_entropy(params, {**batch, "x": nn.Dropout(0.2)(batch["x"])})


def own_generator() -> OneLoss:
    generator = torch.Generator().manual_seed(0)

    def loss(params: Params, batch: Any) -> Tensor:
        return cross_entropy(params, batch) * (1 + 0.1 * torch.rand((), generator=generator))

    return loss


def moving_average() -> OneLoss:
    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            return x - self.mean

    center = Centered()
    return lambda params, batch: cross_entropy(params, {**batch, "x": center(batch["x"])})


def running_statistics() -> OneLoss:
    norm = nn.BatchNorm1d(3)  # in training mode: the loss does not read what it writes
    for p in norm.parameters():
        p.requires_grad_(False)
    return lambda params, batch: cross_entropy(params, {**batch, "x": norm(batch["x"])})


def exchanged_buffer() -> OneLoss:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return x

    part = Counting()
    return lambda params, batch: cross_entropy(params, {**batch, "x": part(batch["x"])})


class Spectral(nn.Module):
    """A spectral norm that was made once, in training mode: its power iteration goes on at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def remembers() -> OneLoss:
    last: dict[str, Tensor] = {}

    def loss(params: Params, batch: Any) -> Tensor:
        value = cross_entropy(params, batch)
        before = last.get("value", torch.zeros(()))
        last["value"] = value.detach()
        return value + 0.01 * before

    return loss


def writes_batch(params: Params, batch: Any) -> Tensor:
    batch["x"].sub_(batch["x"].mean(0))
    return cross_entropy(params, batch)


def max_norm(params: Params, batch: Any) -> Tensor:
    found = functional.embedding(batch["y"], params["table"], max_norm=1.0)
    return functional.cross_entropy(found @ params["head"], batch["y"])


def max_norm_not_met(params: Params, batch: Any) -> Tensor:
    found = functional.embedding(batch["y"], params["table"], max_norm=1e6)  # writes only once rows have grown
    return functional.cross_entropy(found @ params["head"], batch["y"])


def by_frequency(params: Params, batch: Any) -> Tensor:
    found = functional.embedding(batch["y"], params["table"], scale_grad_by_freq=True)
    return functional.cross_entropy(found @ params["head"], batch["y"])


def stop_gradient(params: Params, batch: Any) -> Tensor:
    return cross_entropy({**params, "w1": params["w1"].detach()}, batch)


def weight_norm(params: Params, batch: Any) -> Tensor:
    weight = torch._weight_norm(params["v"], params["g"], 0)
    return functional.cross_entropy((batch["x"] @ weight).tanh(), batch["y"])


class HalfSecond(torch.autograd.Function):
    """A square whose gradient is right and not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2 * ctx.saved_tensors[0].detach()


def custom_backward(params: Params, batch: Any) -> Tensor:
    return cross_entropy(params, batch) + HalfSecond.apply(params["w1"]).sum()


def captures() -> OneLoss:
    scale = torch.ones(3, requires_grad=True)
    return lambda params, batch: cross_entropy(params, {**batch, "x": batch["x"] * scale})


TABLE = {"table": (3, 4), "head": (4, 3)}
NORMED = {"v": (3, 3), "g": (3, 1)}
# kind -> (shapes, loss), and words of the answer; each is asked without second derivatives unless it is about them.
SILENT: dict[str, tuple[Callable[[], tuple[dict[str, tuple[int, ...]], OneLoss]], str]] = {
    "dropout": (lambda: (MLP, random_noise), "torch's global generator"),
    "dropout module in forward": (lambda: (MLP, local_dropout), "torch's global generator"),
    "stochastic depth": (lambda: (MLP, stochastic_depth), "Python's random"),
    "noise of NumPy": (lambda: (MLP, numpy_noise), "NumPy's global generator"),
    "generator of its own": (lambda: (MLP, own_generator()), "draws from Given.one:generator"),
    "moving average": (lambda: (MLP, moving_average()), "writes to Given.one:center.mean"),
    "running statistics": (lambda: (MLP, running_statistics()), "norm.running_mean"),
    "exchanged buffer": (lambda: (MLP, exchanged_buffer()), "part.seen"),
    "spectral norm": (lambda: of_module(Spectral()), "._u"),
    "spectral norm at rest": (lambda: of_module(at_rest(Spectral())), "._u"),
    "memory": (lambda: (MLP, remembers()), "at first, then"),
    "writes to its batch": (lambda: (MLP, writes_batch), "writes to batch['x']"),
    "max_norm": (lambda: (TABLE, max_norm), "writes to parameters[0]['table']"),
    "max_norm not met": (lambda: (TABLE, max_norm_not_met), "writes to parameters[0]['table']"),
    "scale_grad_by_freq": (lambda: (TABLE, by_frequency), "most wrong is that of 'table'"),
    "detach": (lambda: (MLP, stop_gradient), "most wrong is that of 'w1'"),
    "checkpoint": (lambda: of_module(Net(False)), "most wrong is that of"),
    "reentrant checkpoint": (lambda: of_module(Net(True)), "heckpoint"),
    "captured": (lambda: (MLP, captures()), "Given.one:scale of shape (3,), which requires a gradient"),
    "weight_norm": (lambda: (NORMED, weight_norm), "they are off by"),
    "custom backward": (lambda: (MLP, custom_backward), "at 'w1'"),
}
@pytest.fixture
def seed() -> None:
    """Seed what modules initialise themselves from."""
    torch.manual_seed(0)


SECOND = ("weight_norm", "custom backward")


@pytest.mark.parametrize("kind", SILENT)
def test_a_silently_wrong_loss_is_caught(kind: str, seed: None) -> None:
    make, words = SILENT[kind]
    answer = failed(ask(Given(*make()), second_derivatives=kind in SECOND))
    assert words in answer, answer


def with_second(shapes: dict[str, tuple[int, ...]], loss: OneLoss, **options: Any) -> Callable[[], TaskFamily]:
    return lambda: Given(shapes, loss, **options)


class Attending(nn.Module):
    """A small transformer layer over the six points."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return self.head(self.layer(self.up(x)[None])[0])


def frozen_backbone() -> tuple[dict[str, tuple[int, ...]], OneLoss]:
    """Return a head on float32 features that the family holds, so that the parameters alone cannot be promoted."""
    with torch.random.fork_rng():
        backbone = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    for p in backbone.parameters():
        p.requires_grad_(False)

    def loss(params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(backbone(batch["x"] + params["shift"]) @ params["w"], batch["y"])

    return {"w": (8, 3), "shift": (3,)}, loss


def convolution(params: Params, batch: Any) -> Tensor:
    images = batch["x"].relu().reshape(1, 1, 6, 3).expand(3, 1, 6, 3) * torch.linspace(0, 1, 3)[:, None, None, None]
    hidden = functional.conv2d(images.to(params["filter"].dtype), params["filter"], padding=1)
    hidden = functional.batch_norm(hidden, None, None, params["scale"], params["shift"], training=True).relu()
    hidden = functional.max_pool2d(hidden, 3, 1, 1)
    return functional.cross_entropy(hidden.flatten(1) @ params["head"], batch["y"][:3])


def deep_relu(params: Params, batch: Any) -> Tensor:
    hidden = batch["x"].repeat(50, 1)
    for i in range(4):
        hidden = functional.relu(hidden @ params[f"w{i}"])
    return functional.cross_entropy(hidden @ params["head"], batch["y"].repeat(50))


CONV = {"filter": (4, 1, 3, 3), "scale": (4,), "shift": (4,), "head": (72, 3)}
DEEP = {"w0": (3, 32), "w1": (32, 32), "w2": (32, 32), "w3": (32, 32), "head": (32, 3)}


def fit(params: Params, batch: Any) -> Tensor:
    return mlp(params, batch["x"])


def rounds_inside(params: Params, batch: Any) -> Tensor:
    halves = {k: p.bfloat16().float() for k, p in params.items()}
    return cross_entropy(halves, batch)


def through_numpy(params: Params, batch: Any) -> Tensor:
    weight = torch.from_numpy(batch["x"].numpy().mean(0).astype(np.float32))
    return (weight @ params["w1"]).square().sum()


def caches(cache: dict[str, Any]) -> OneLoss:
    def loss(params: Params, batch: Any) -> Tensor:
        hidden = batch["x"] @ params["w1"] + params["b1"]
        cache["hidden"] = hidden.detach()  # to look at: not read again
        cache.setdefault("mask", torch.ones(6, 1))
        return functional.cross_entropy((hidden * cache["mask"]).relu() @ params["w2"], batch["y"])

    return loss


def seeds_itself(params: Params, batch: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(6, 3)
    return cross_entropy(params, {**batch, "x": batch["x"] + 0.1 * noise})


def near_zero(params: Params, batch: Any) -> Tensor:
    return (params["w"].exp().sum().log() - params["w"].logsumexp(0)).square() + 1e-12 * params["w"].square().sum()


def kinked_start(params: Params, batch: Any) -> Tensor:
    return (batch["x"] @ (0 * params["w"]) + params["w"].abs().sum()).sum()


def edge(params: Params, batch: Any) -> Tensor:
    return (batch["x"] @ params["w"]).relu().sqrt().sum() + params["w"].square().sum()


INNOCENT: dict[str, Callable[[], TaskFamily]] = {
    "ReLU net": with_second(MLP, cross_entropy),
    "ReLU net in float64": with_second(MLP, cross_entropy, dtype=torch.float64),
    "deep ReLU net": with_second(DEEP, deep_relu),
    "convolutions": with_second(CONV, convolution),
    "module": lambda: Given(*of_module(Net())),
    "transformer": lambda: Given(*of_module(Attending())),
    "frozen backbone": lambda: Given(*frozen_backbone()),
    "checkpoint with parameters passed": with_second(
        MLP, lambda p, b: checkpoint(lambda *w: cross_entropy(dict(zip(p, w, strict=True)), b), *p.values(), use_reentrant=False)
    ),
    "spectral norm in eval": lambda: Given(*of_module(Spectral().eval())),
    "embedding": with_second(
        TABLE, lambda p, b: functional.cross_entropy(functional.embedding(b["y"], p["table"]) @ p["head"], b["y"])
    ),
    "huber": with_second(MLP, lambda p, b: functional.huber_loss(fit(p, b), b["x"])),
    "L1": with_second(MLP, lambda p, b: functional.l1_loss(fit(p, b), b["x"])),
    "L1 penalty": with_second(MLP, lambda p, b: cross_entropy(p, b) + sum(x.abs().sum() for x in p.values())),
    "hinge": with_second(MLP, lambda p, b: (1 - fit(p, b) * (2.0 * (b["x"] > 0) - 1)).relu().mean()),
    "layer norm": with_second(MLP, lambda p, b: functional.mse_loss(functional.layer_norm(fit(p, b), (3,)), b["x"])),
    "logsumexp": with_second({"w": (7,)}, lambda p, b: (30 * p["w"]).logsumexp(0)),
    "near zero": with_second({"w": (7,)}, near_zero),
    "tiny gradients": with_second(MLP, lambda p, b: 1e-8 * cross_entropy(p, b)),
    "tiny beside an offset": with_second(MLP, lambda p, b: 1e-8 * cross_entropy(p, b) + 1),
    "huge": with_second(MLP, lambda p, b: 1e8 * cross_entropy(p, b)),
    "huge offset": with_second(MLP, lambda p, b: cross_entropy(p, b) + 1e8),
    "unread parameter": with_second({**MLP, "spare": (3,)}, cross_entropy),
    "gradient of zero": with_second(MLP, lambda p, b: cross_entropy(p, b) + 0.0 * p["b1"].sum()),
    "linear": with_second({"w": (3,)}, lambda p, b: (b["x"] @ p["w"]).sum()),
    "kinks": with_second({"w": (3, 1)}, kinked_start),
    "edge of the domain": with_second({"w": (3,)}, edge),
    "rounds inside": with_second(MLP, rounds_inside),
    "through NumPy": with_second(MLP, through_numpy),
    "keeps what it saw": lambda: Given(MLP, caches({})),
    "seeds itself": with_second(MLP, seeds_itself),
    "cholesky": with_second({"a": (3, 3)}, lambda p, b: torch.logdet(p["a"] @ p["a"].mT + torch.eye(3))),
    "constant": with_second({"w": (3,)}, lambda p, b: b["x"].sum() + 0 * p["w"].sum()),
    "problems: quadratic": Quadratic,
    "problems: tanh": TanhMLP,
    "problems: layer norm": LayerNormMLP,
    "problems: logistic": Logistic,
    "quadratic": lambda: learnedopt.tasks.make("quadratic"),
    "logistic": lambda: learnedopt.tasks.make("logistic"),
    "linear-regression": lambda: learnedopt.tasks.make("linear-regression"),
    "sine": lambda: learnedopt.tasks.make("sine"),
}


EXECUTIONS = {"alone": {}, "together": {"chunk_size": 2}, "mixed": {"mixed_mode": True}}
NO_FORWARD_MODE = ("checkpoint with parameters passed", "huber", "layer norm", "cholesky")
LOUD = {  # what torch refuses by itself
    "checkpoint with parameters passed": ("together",),
    "through NumPy": ("together",),
    "seeds itself": ("together",),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("kind", INNOCENT)
def test_an_innocent_loss_passes(kind: str, execution: str, seed: None) -> None:
    if execution == "mixed" and kind in NO_FORWARD_MODE:
        pytest.skip("that mode's own tests have these")
    findings = ask(INNOCENT[kind](), **EXECUTIONS[execution])
    if execution in LOUD.get(kind, ()):
        assert [finding.error is not None for finding in findings if not finding.passed] == [True], report(findings)
        return
    assert not any_failed(findings), report(findings)
    assert ("could not be told" in report(findings)) == (kind in UNCLEAR), report(findings)


UNCLEAR: tuple[str, ...] = ()
