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
from learnedopt.core.inner_objective import InnerObjective, Penalty, TaskLoss
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
    rule = learnedopt.optimizers.make("sgd", lr=0.1)
    loop = InnerLoop(family, rule, Execution(**execution), objective or TaskLoss())
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

    def __init__(self, backend: Any = nn.attention.SDPBackend.MATH) -> None:
        super().__init__()
        self.backend = backend
        self.up = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with nn.attention.sdpa_kernel(self.backend):
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


class OfAKernel(torch.autograd.Function):
    """The square of its input, computed in float32 whatever it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.square(x.detach().numpy().astype(np.float32))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]


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
        MLP,
        lambda p, b: checkpoint(
            lambda *w: cross_entropy(dict(zip(p, w, strict=True)), b), *p.values(), use_reentrant=False
        ),
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
    "computes in float32": with_second(MLP, lambda p, b: cross_entropy(p, b) + OfAKernel.apply(p["w1"]).sum()),
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
LOUD = {  # what torch refuses by itself
    "checkpoint with parameters passed": ("together",),
    "through NumPy": ("together",),
    "seeds itself": ("together",),
    "computes in float32": ("together",),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("kind", INNOCENT)
def test_an_innocent_loss_passes(kind: str, execution: str, seed: None) -> None:
    findings = ask(INNOCENT[kind](), **EXECUTIONS[execution])
    if execution in LOUD.get(kind, ()):
        assert [finding.error is not None for finding in findings if not finding.passed] == [True], report(findings)
        return
    assert not any_failed(findings), report(findings)
    assert ("could not be told" in report(findings)) == (kind in UNCLEAR), report(findings)


UNCLEAR: tuple[str, ...] = ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["ReLU net", "layer norm", "tiny gradients", "logsumexp", "embedding", "quadratic"])
def test_an_innocent_loss_passes_in_another_precision(kind: str, dtype: torch.dtype) -> None:
    for chunk_size in (1, 2):
        findings = ask(INNOCENT[kind](), dtype=dtype, chunk_size=chunk_size)
        assert not any_failed(findings), report(findings)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_families_of_images_pass(execution: str, data_root: Path) -> None:
    families = [
        learnedopt.tasks.make("image-mlp"),
        learnedopt.tasks.make("image-mlp", hidden=(40, 40), activation="relu", init="normal", batch_size=32),
        learnedopt.tasks.make("image-conv", channels=(4, 8), norm="batch", size=14, activation="gelu"),
        learnedopt.tasks.make("image-conv", channels=(4, 8), norm="group", size=14, residual=True),
        learnedopt.tasks.make("image-autoencoder", widths=(16,), size=14),
        learnedopt.tasks.make("image-autoencoder", widths=(16,), size=14, error="cross-entropy"),
        learnedopt.tasks.make("omniglot", model="conv", width=8),
        learnedopt.tasks.make("omniglot", model="conv-pool", width=8),
        learnedopt.tasks.make("omniglot", model="mlp", width=16),
    ]
    for family in families:
        findings = ask(family, **EXECUTIONS[execution])
        assert not any_failed(findings), report(findings)
        assert "could not be told" not in report(findings), report(findings)


class WrongTogether(torch.autograd.Function):
    """A square root of squares whose rule for tasks together sums over them as well."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return x.square().sum().expand(info.batch_size), 0


class Batched(Given):
    """Batches that ``change`` makes of the right ones and the number of the task's place."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(MLP, cross_entropy)
        self.change = change

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        batch = super().batch(tasks, step, split)
        return {**batch, "x": self.change(batch["x"], torch.arange(len(batch["x"]))[:, None, None])}


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "place in the batch": lambda x, place: x + place,
    "mean over tasks": lambda x, place: x - x.mean((0, 1)),
    "global generator": lambda x, place: x + torch.randn_like(x),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_tasks_that_interact_in_their_batches_are_caught(kind: str) -> None:
    answer = failed(ask(Batched(CHANGES[kind])))
    assert "1 questions" in answer and "alone" in answer, answer


def test_a_batch_of_one_task_that_is_drawn_anew_is_caught() -> None:
    assert "task 0 has the loss" in failed(ask(Batched(CHANGES["global generator"]), num_tasks=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_that_interact_when_run_together_are_caught(dtype: torch.dtype) -> None:
    family = Given({"w": (4,)}, lambda params, batch: WrongTogether.apply(params["w"]), dtype=dtype)
    assert not any_failed(ask(family, second_derivatives=False, chunk_size=1))
    assert "Do tasks that are run together" in failed(ask(family, second_derivatives=False, chunk_size=2))


def test_what_takes_no_tasks_together_says_what_to_do() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4)
    family = Given(*of_module(nn.Sequential(lstm, Last())))
    assert "Execution(chunk_size=1)" in failed(ask(family, second_derivatives=False, chunk_size=2))


def test_attention_without_second_derivatives_says_what_to_do() -> None:
    torch.manual_seed(0)
    family = Given(*of_module(Attending(nn.attention.SDPBackend.FLASH_ATTENTION)))
    assert not any_failed(ask(family, second_derivatives=False))
    assert "SDPBackend.MATH" in failed(ask(family))


class Last(nn.Module):
    def forward(self, outputs: tuple[Tensor, Any]) -> Tensor:
        return outputs[0][:, :3]


def through_factor(a: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(a))


@pytest.mark.parametrize("function", [lambda a: torch.linalg.slogdet(a)[1], torch.linalg.det, through_factor])
def test_wrong_forward_over_reverse_is_caught(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever mixed mode does about these functions: what it returns is what is judged."""

    class Naive(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Callable[[Tensor], Tensor], p: Tensor) -> tuple[Tensor, ...]:
            ctx.loss = loss
            ctx.save_for_backward(p)
            with torch.enable_grad():
                x = p.detach().requires_grad_()
                value = loss(x)
                return value.detach(), torch.autograd.grad(value, x)[0]

        @staticmethod
        def backward(ctx: Any, of_value: Tensor, of_grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
            with torch.enable_grad(), torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(ctx.saved_tensors[0].requires_grad_(), of_grad)
                grad = torch.autograd.grad(ctx.loss(dual), dual)[0]
                return None, torch.autograd.forward_ad.unpack_dual(grad).tangent

    def naive(losses: Any, params: Params, *rest: Any) -> tuple[Tensor, list[Tensor]]:
        value, *grads = Naive.apply(lambda a: losses({"a": a}, *rest[:1]), params["a"])
        return value, grads

    monkeypatch.setattr(mixed_mode, "value_and_gradient", naive)
    family = Given({"a": (3, 3)}, lambda p, b: function(p["a"] @ p["a"].mT + torch.eye(3)).sum())
    assert not any_failed(ask(family))
    answer = failed(ask(family, mixed_mode=True))
    assert "they are off by" in answer and "'a'" in answer, answer


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda p, b: p["w"], ValueError, "must be a scalar, got shape"),
        (lambda p, b: p["w"].sum().item(), TypeError, "must be a scalar tensor, got a float"),
        (lambda p, b: p["w"].sum() / 0, ValueError, "the loss is"),
        (lambda p, b: p["missing"], KeyError, "missing"),
    ],
)
def test_a_loss_that_is_no_number_raises_as_it_is(loss: OneLoss, error: type[Exception], words: str) -> None:
    family = Given({"w": (3,)}, loss)
    findings = ask(family)
    assert len(findings) == 1 and words in findings[0].answer
    loop = InnerLoop(family, learnedopt.optimizers.make("sgd", lr=0.1))
    carry = loop.start(family.sample(1, torch.Generator().manual_seed(3)))
    with pytest.raises(error, match=words):
        vet(loop, loop.rule.init_theta(torch.Generator()), carry._replace(state=()), second_derivatives=True)


def test_vet_raises_what_was_found_and_what_to_do() -> None:
    family = Given(MLP, random_noise)
    loop = InnerLoop(family, learnedopt.optimizers.make("sgd", lr=0.1))
    carry = loop.start(family.sample(2, torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match=r"Given: Does the loss give the same.*draws from torch's.*dropout.*vet=False"):
        vet(loop, loop.rule.init_theta(torch.Generator()), carry._replace(state=()), second_derivatives=False)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_asks_the_same_without_gradients(context: Callable[[], Any]) -> None:
    family = Given(MLP, cross_entropy)
    expected = [finding.answer for finding in ask(family, chunk_size=2)]
    with context():
        assert [finding.answer for finding in ask(family, chunk_size=2)] == expected
        assert "most wrong is that of 'w1'" in failed(ask(Given(MLP, stop_gradient)))


@pytest.mark.parametrize("kind", ["dropout", "max_norm", "writes to its batch", "stochastic depth", "noise of NumPy"])
def test_nothing_of_the_callers_changes(kind: str) -> None:
    family = Given(*SILENT[kind][0]())
    loop = InnerLoop(family, learnedopt.optimizers.make("sgd", lr=0.1))
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(family.sample(2, torch.Generator().manual_seed(3)))._replace(state=())
    before = {k: p.clone() for k, p in carry.params.items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    examine(loop, theta, carry, second_derivatives=True)
    assert all(torch.equal(before[k], p) and p.grad is None and not p.requires_grad for k, p in carry.params.items())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()


class Penalized(InnerObjective):
    """A learned decay as a penalty, whose closed form may be wrong."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.tensor(0.3)}


class Decayed(InnerObjective):
    """A learned decay in the loss."""

    def __init__(self, learned: bool = True) -> None:
        self.learned = learned

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.tensor(0.3)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        decay = theta["decay"] if self.learned else theta["decay"].detach()
        return family.loss(params, batch) + 0.5 * decay * sum(p.square().sum() for p in params.values())


class Pull(Penalty):
    def __init__(self, factor: float, exponent: float = 1.0) -> None:
        self.factor, self.exponent = factor, exponent

    def value(self, theta: Theta, params: Params) -> Tensor:
        return 0.5 * self.exponent * theta["decay"] * torch.stack([p.square().sum() for p in params.values()]).sum()

    def gradient(self, theta: Theta, params: Params) -> Params | None:
        return {k: self.factor * theta["decay"] * p for k, p in params.items()}


def test_theta_in_the_inner_loss_is_asked_about() -> None:
    theta = {"decay": torch.tensor(0.3), "lr": torch.tensor(0.1)}
    for objective in (Decayed(), Penalized(Pull(1.0))):
        for execution in EXECUTIONS.values():
            findings = ask(Given(MLP, cross_entropy), objective=objective, theta=theta, **execution)
            assert not any_failed(findings), report(findings)
    lost = failed(ask(Given(MLP, cross_entropy), objective=Decayed(learned=False), theta=theta))
    assert "theta['decay']" in lost and "Is the gradient the derivative" in lost, lost


@pytest.mark.parametrize("penalty", [Pull(1.1), Pull(1.0, 2.0)], ids=["gradient", "value"])
def test_a_wrong_closed_form_of_a_penalty_is_caught(penalty: Penalty) -> None:
    theta = {"decay": torch.tensor(0.3), "lr": torch.tensor(0.1)}
    answer = failed(ask(Given(MLP, cross_entropy), objective=Penalized(penalty), theta=theta))
    assert "Is the loss the family's plus the penalty" in answer, answer


class WrongOutside(Decayed):
    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return family.loss({k: functional.dropout(p, 0.5) for k, p in params.items()}, batch)


def test_the_outer_loss_is_asked_about_where_it_is_another_one() -> None:
    theta = {"decay": torch.tensor(0.3), "lr": torch.tensor(0.1)}
    findings = ask(Given(MLP, cross_entropy), objective=WrongOutside(), theta=theta)
    assert [finding.passed for finding in findings[:6]] == [True] * 6
    assert "torch's global generator" in failed(findings)


class Counted(Given):
    calls = 0

    def loss(self, params: Params, batch: Any) -> Tensor:
        Counted.calls += 1
        return super().loss(params, batch)


@pytest.mark.parametrize(("second", "expected"), [(False, 6), (True, 8)])
def test_it_costs_a_few_evaluations(second: bool, expected: int) -> None:
    Counted.calls = 0
    assert not any_failed(ask(Counted(MLP, cross_entropy), second_derivatives=second))
    assert Counted.calls == expected
    Counted.calls = 0
    assert not any_failed(ask(Counted(MLP, cross_entropy), second_derivatives=second, chunk_size=2))
    assert Counted.calls == expected + 3  # both together, and each alone


def test_a_report_is_in_words() -> None:
    assert report(ask(Given(MLP, cross_entropy))).endswith("7 questions were asked; none failed.")
    assert "[FAILED] Does the loss give the same bits" in report(ask(Given(MLP, random_noise)))


def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + step)
    return torch.randn(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.dropout(x, 0.3))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Net(False), "checkpoint"),
        (lambda: Net(True), "heckpoint"),
        (Noisy, "torch's global generator"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "weight_norm"),
    ],
)
def test_a_module_is_caught_as_a_family(build: Callable[[], nn.Module], words: str) -> None:
    loss = nn.functional.cross_entropy
    family = ModuleFamily(build, lambda outputs, targets: loss(outputs.tanh(), targets), data)
    assert words in failed(ask(family))
