"""Any module as a family: what it computes, what is made right, and what is refused before the first step."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import learnedopt
from learnedopt import FinalLoss, ModuleFamily, Unrolled
from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Split
from learnedopt.core.tree import Theta
from learnedopt.optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_equal(found: Any, expected: Any) -> None:
    """Compare two trees bit by bit."""
    assert len(tree.leaves(found)) == len(tree.leaves(expected)) > 0
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True))


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def rows(*shape: int) -> Callable[[int, int, Split], tuple[Tensor, Tensor]]:
    """Inputs of a shape, and targets that a squared error is taken from."""

    def data(seed: int, step: int, split: Split) -> tuple[Tensor, Tensor]:
        generator = seeded(1000 * (seed % 1000) + 2 * step + (split == "valid"))
        return torch.randn(*shape, generator=generator), torch.randn((), generator=generator)

    return data


def squared(outputs: Any, target: Tensor) -> Tensor:
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    return (outputs - target).square().mean()


def meta_gradient(
    family: ModuleFamily, chunk_size: int = 1, tape: Tape = Tape.FULL, dtype: torch.dtype | None = None,
    segment: int | None = None,
) -> Theta:  # fmt: skip
    """Of the rate after three steps: it is wrong where the gradient or, on a full tape, the Hessian is."""
    loop = InnerLoop(family, SGD(lr=0.3), Execution(chunk_size=chunk_size, dtype=dtype))
    theta, tasks = loop.rule.init_theta(seeded()), family.sample(2, seeded())
    return Unrolled(3, tape, segment=segment).estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def points(seed: int, step: int, split: Split) -> tuple[Tensor, Tensor]:
    generator = seeded(1000 * (seed % 1000) + 2 * step + (split == "valid"))
    inputs = torch.randn(8, 3, generator=generator)
    return inputs, (inputs[:, :2] > 0).double()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_module_is_trained_as_it_is_without_the_engine(chunk_size: int) -> None:
    family = ModuleFamily(mlp, nn.functional.mse_loss, points)
    loop = InnerLoop(family, SGD(lr=0.3), Execution(chunk_size=chunk_size))
    tasks = family.sample(3, seeded())
    theta = loop.rule.init_theta(seeded())
    rollout = loop.run(theta, loop.start(tasks), 10, Tape.NONE)
    valid = loop.losses(theta, rollout.end, "valid")
    for i, seed in enumerate(tasks["seed"].tolist()):
        torch.manual_seed(seed)
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        for step in range(10):
            inputs, targets = points(seed, step, "train")
            loss = nn.functional.mse_loss(module(inputs), targets)
            torch.testing.assert_close(rollout.losses[step, i], loss.detach(), rtol=TOLERANCE, atol=TOLERANCE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, p in module.named_parameters():
            torch.testing.assert_close(rollout.end.params[name][i], p.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        inputs, targets = points(seed, 10, "valid")
        expected = nn.functional.mse_loss(module(inputs), targets).detach()
        torch.testing.assert_close(valid[i], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_module_family_leaves_global_randomness_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    family = ModuleFamily(mlp, nn.functional.mse_loss, points)
    tasks = family.sample(2, seeded())
    params = family.init_params(tasks)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(params["0.weight"][0], params["0.weight"][1])
    torch.rand(3)
    assert_equal(family.init_params(tree.narrow(tasks, 1, 2)), tree.narrow(params, 1, 2))


def test_a_module_family_seeds_no_accelerator_that_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has not, a seed would be kept for later and change what the user draws there."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA was seeded"))
    family = ModuleFamily(mlp, nn.functional.mse_loss, points)
    family.init_params(family.sample(2, seeded()))


class WithConstants(nn.Module):
    """A module with a trained and a frozen layer, a buffer, and one weight used twice."""

    def __init__(self, frozen: nn.Linear, shift: Tensor) -> None:
        super().__init__()
        self.frozen, self.first, self.again = frozen.requires_grad_(False), nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.register_buffer("shift", shift)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(self.frozen(inputs)) + self.shift))


def test_frozen_parameters_and_buffers_are_constants() -> None:
    frozen, shift = nn.Linear(3, 4), torch.arange(4.0)
    family = ModuleFamily(lambda: WithConstants(frozen, shift), nn.functional.mse_loss, points)
    tasks = family.sample(2, seeded())
    params = family.init_params(tasks)
    assert set(params) == {"first.weight", "first.bias", "again.bias"}
    one, inputs = tree.tree_map(lambda x: x[1], params), torch.randn(8, 3, generator=seeded())
    hidden = torch.tanh(frozen(inputs) @ one["first.weight"].T + one["first.bias"] + shift)
    expected = hidden @ one["first.weight"].T + one["again.bias"]
    found = family.outputs(one, {"inputs": inputs})
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    rounded = family.outputs(tree.to(one, None, torch.float32), {"inputs": inputs.float()})
    torch.testing.assert_close(rounded, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_batch_may_be_a_tree() -> None:
    def data(seed: int, step: int, split: Split) -> tuple[Any, Any]:
        inputs, targets = points(seed, step, split)
        return {"points": inputs, "scale": torch.tensor(2.0)}, (targets, targets + 1)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return inputs["scale"] * self.layer(inputs["points"])

    family = ModuleFamily(Scaled, lambda out, targets: (out - targets[1]).square().mean(), data)
    tasks = family.sample(2, seeded())
    params, batch = family.init_params(tasks), family.batch(tasks, 0, "train")
    assert batch["inputs"]["points"].shape == (2, 8, 3) and batch["targets"][1].shape == (2, 8, 2)
    found = torch.func.vmap(family.loss)(params, batch)
    for i, seed in enumerate(tasks["seed"].tolist()):
        inputs, targets = points(seed, 0, "train")
        out = 2 * (inputs @ params["layer.weight"][i].T + params["layer.bias"][i])
        torch.testing.assert_close(found[i], (out - targets - 1).square().mean(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), ValueError, r"module '1' \(Dropout\) is active"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.AlphaDropout(0.1)), ValueError, "active dropout.*set p=0"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.RReLU()), ValueError, "RReLU"),
        (lambda: nn.LSTM(3, 2, num_layers=2, dropout=0.1), ValueError, r"module 'itself' \(LSTM\) is active dropout"),
        (lambda: nn.MultiheadAttention(4, 2, dropout=0.1), ValueError, "MultiheadAttention"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), ValueError, "'1'.*running statistics.*=False"),
        (lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), ValueError, "running statistics"),
        (lambda: nn.Tanh(), ValueError, "nothing to train"),
        (lambda: nn.Linear(3, 2).requires_grad_(False), ValueError, "nothing to train"),
        (lambda: WithConstants(nn.Linear(3, 4), torch.zeros(4)), ValueError, "'frozen.weight'.*differs from one build"),
        (lambda: WithConstants(nn.Linear(3, 4).apply(nullify), torch.rand(4)), ValueError, "'shift'.*differs"),
        (lambda: {"weight": torch.ones(3)}, TypeError, "build returned a dict"),
    ],
)
def test_what_is_no_pure_module_is_refused(module: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModuleFamily(module, nn.functional.mse_loss, points)


def nullify(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()


@pytest.mark.parametrize(
    "part",
    [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2).eval()],
)
def test_what_is_switched_off_is_accepted(part: nn.Module) -> None:
    family = ModuleFamily(lambda: nn.Sequential(nn.Linear(3, 2), part.double()), nn.functional.mse_loss, points)
    tasks = family.sample(1, seeded())
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))
    assert torch.equal(family.loss(params, batch), family.loss(params, batch))


# Constants keep their precision.


SEEN: list[tuple[torch.dtype, torch.dtype]] = []


class Frozen(nn.Module):
    """A frozen layer and a buffer of one dtype before a trained layer of another."""

    def __init__(self, frozen: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.frozen, self.trained = frozen, nn.Linear(4, 2, dtype=dtype)
        self.register_buffer("shift", torch.full((4,), 1 / 3, dtype=frozen.weight.dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        SEEN.append((self.frozen.weight.dtype, self.shift.dtype))
        hidden = torch.tanh(self.frozen(inputs.to(self.frozen.weight.dtype)) + self.shift)
        return self.trained(hidden.to(self.trained.weight.dtype))


@pytest.mark.parametrize(
    ("own", "trained"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)],
)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_constants_keep_their_own_precision(own: torch.dtype, trained: torch.dtype, chunk_size: int) -> None:
    frozen = nn.Linear(3, 4, dtype=own).requires_grad_(False)
    family = ModuleFamily(lambda: Frozen(frozen, trained), squared, rows(5, 3))
    loop = InnerLoop(family, SGD(lr=0.3), Execution(chunk_size=chunk_size))
    carry = loop.begin(loop.rule.init_theta(seeded()), loop.start(family.sample(2, seeded())))
    SEEN.clear()
    found = loop.outputs(carry, "train")
    assert set(SEEN) == {(own, own)}
    for i, seed in enumerate(carry.tasks["seed"].tolist()):
        torch.manual_seed(seed)
        expected = Frozen(frozen, trained)(rows(5, 3)(seed, 0, "train")[0])
        # Mapped products of matrices round differently.
        tolerance = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.1}[own]
        torch.testing.assert_close(found[i], expected.detach(), rtol=tolerance, atol=tolerance)


def test_constants_follow_the_execution_where_they_had_the_parameters_dtype() -> None:
    seen = {}

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, dtype=torch.float32)
            self.register_buffer("same", torch.ones(2, dtype=torch.float32))
            self.register_buffer("rough", torch.ones(2, dtype=torch.bfloat16))
            self.register_buffer("count", torch.ones(2, dtype=torch.int64))

        def forward(self, inputs: Tensor) -> Tensor:
            seen.update({name: buffer.dtype for name, buffer in self.named_buffers()})
            return self.layer(inputs) * self.same * self.rough * self.count

    family = ModuleFamily(Mixed, squared, rows(5, 3))
    meta_gradient(family, dtype=torch.float64)
    assert seen == {"same": torch.float64, "rough": torch.bfloat16, "count": torch.int64}


# The template is left as it was.


class Shared(nn.Sequential):
    """One layer used twice, and its weight a third time in another place."""

    def __init__(self) -> None:
        layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
        other.weight = layer.weight
        super().__init__(layer, nn.Tanh(), layer, nn.Tanh(), other)


class Failing(Shared):
    def forward(self, inputs: Tensor) -> Tensor:
        super().forward(inputs)
        raise KeyError("in forward")


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.last = self.layer(inputs)
        return self.last


class Recurrent(nn.LSTM):
    def __init__(self) -> None:
        super().__init__(3, 2)


def state_of(module: nn.Module) -> dict[str, int]:
    """Which object lies where in a module: parameters, buffers and plain attributes."""
    found = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    found |= {name: id(b) for name, b in module.named_buffers(remove_duplicate=False)}
    for name, part in module.named_modules(remove_duplicate=False):
        found |= {f"{name}.{attribute}": id(value) for attribute, value in vars(part).items()}
    return found


@pytest.mark.parametrize("build", [Shared, Caching, Recurrent, Failing])
@pytest.mark.parametrize("how", ["plain", "no_grad", "grad", "vmap", "loop"])
def test_a_call_leaves_the_module_as_it_was(build: type[nn.Module], how: str) -> None:
    if build is Recurrent and how == "vmap":
        pytest.skip("recurrent layers are not mapped")
    family = ModuleFamily(build, squared, rows(5, 3))
    before, tasks = state_of(family.module), family.sample(2, seeded())
    params, batch = family.init_params(tasks), family.batch(tasks, 0, "train")
    one = {k: p[0].requires_grad_() for k, p in params.items()}, tree.tree_map(lambda x: x[0], batch)

    def call() -> None:
        if how == "plain":
            family.loss(*one).backward()
        elif how == "no_grad":
            with torch.no_grad():
                family.outputs(*one)
        elif how == "grad":
            torch.func.grad(family.loss)(*one)
        elif how == "vmap":
            torch.func.vmap(family.loss)(params, batch)
        else:
            meta_gradient(family)

    if build is Failing:
        with pytest.raises(KeyError):
            call()
    else:
        call()
    assert state_of(family.module) == before
    assert all(p.grad is None and p.is_leaf for p in family.module.parameters())
    twin = copy.deepcopy(family)
    pickled = io.BytesIO()
    torch.save(family.module, pickled)
    if build is not Failing:
        assert_equal(twin.loss(*one), family.loss(*one))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_shared_layers_and_tied_weights_get_the_gradient_of_all_their_uses(chunk_size: int) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = nn.Linear(3, 3), nn.Parameter(nn.Linear(3, 3).bias.detach())

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(self.layer(torch.tanh(self.layer(inputs))))
            return functional.linear(hidden, self.layer.weight, self.bias)

    family = ModuleFamily(Shared, squared, rows(5, 3))
    assert set(family.init_params(family.sample(1, seeded()))) == {"0.weight", "0.bias", "4.bias"}
    found = meta_gradient(family, chunk_size)
    assert_close(found, meta_gradient(ModuleFamily(Written, squared, rows(5, 3)), chunk_size))


def test_weights_that_a_hook_computes_can_be_copied() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        family = ModuleFamily(lambda: nn.utils.weight_norm(nn.Linear(3, 2), dim=None), squared, rows(5, 3))
        meta_gradient(family)
    copy.deepcopy(family)


# Checkpointing.


class Blocks(nn.Module):
    """Residual blocks; the last layer starts at zero, and no seed enters, so that a template's weights look right."""

    def __init__(self, how: str | None, *, all_alike: bool) -> None:
        super().__init__()
        self.how, self.first, self.body, self.last = how, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        if all_alike:
            with torch.no_grad():
                for i, p in enumerate(self.parameters()):
                    p.copy_(torch.linspace(-0.5, 0.7, p.numel()).reshape(p.shape).cos() * (1 + i / 3))
                self.last.weight.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        def block(hidden: Tensor) -> Tensor:
            return hidden + torch.tanh(self.body(torch.tanh(hidden)))

        hidden = self.first(inputs)
        if self.how == "attribute":
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
        elif self.how is not None:
            hidden = checkpoint(block, hidden, use_reentrant=self.how == "reentrant")
        else:
            hidden = block(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("all_alike", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "attribute"])
@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("tape", [Tape.FULL, Tape.FIRST_ORDER])
def test_checkpointing_is_refused_before_the_first_step(how: str, all_alike: bool, chunk_size: int, tape: Tape) -> None:
    steps = []

    def data(seed: int, step: int, split: Split) -> tuple[Tensor, Tensor]:
        steps.append(step)
        return rows(5, 3)(seed, step, split)

    family = ModuleFamily(lambda: Blocks(how, all_alike=all_alike), squared, data)
    with pytest.raises(ValueError, match=r"computed again on the way back.*segment="):
        meta_gradient(family, chunk_size, tape)
    assert set(steps) == {0}


def test_what_takes_the_place_of_checkpointing_is_right() -> None:
    family = ModuleFamily(lambda: Blocks(None, all_alike=False), squared, rows(5, 3))
    assert_close(meta_gradient(family, segment=1), meta_gradient(family))


def test_checkpointing_is_refused_because_it_is_wrong() -> None:
    """The gradient that a loop would get; should torch mend it, the refusal can go."""
    family = ModuleFamily(lambda: Blocks("not reentrant", all_alike=False), squared, rows(5, 3))
    plain = ModuleFamily(lambda: Blocks(None, all_alike=False), squared, rows(5, 3))
    tasks = family.sample(1, seeded())
    batch = tree.squeeze(family.batch(tasks, 0, "train"))
    found, right = [], []
    for each, grads in ((family, found), (plain, right)):
        params = {k: p.requires_grad_() for k, p in tree.squeeze(family.init_params(tasks)).items()}
        grads += torch.autograd.grad(each.loss(params, batch), [*params.values()])
    error = sum((a - b).square().sum() for a, b in zip(found, right, strict=True)).sqrt()
    assert error > 0.01 * sum(b.square().sum() for b in right).sqrt()


def test_a_first_layer_whose_gradient_checkpointing_loses_is_refused() -> None:
    class First(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return self[1](checkpoint(self[0], inputs, use_reentrant=True))

    family = ModuleFamily(lambda: First(nn.Linear(3, 3), nn.Linear(3, 2)), squared, rows(5, 3))
    with pytest.raises(ValueError, match="computed again on the way back"):
        meta_gradient(family)


def test_checkpointing_of_constants_that_follow_the_parameters_is_refused() -> None:
    """The way back would meet them in their own dtype."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, dtype=torch.float32)
            self.register_buffer("mixing", torch.ones(2, 2, dtype=torch.float32))

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(lambda x: (x @ self.mixing).tanh(), self.layer(inputs), use_reentrant=False)

    with pytest.raises(ValueError, match="computed again on the way back"):
        meta_gradient(ModuleFamily(Body, squared, rows(5, 3)), dtype=torch.float64)


def test_a_gradient_that_is_not_finite_is_not_taken_for_checkpointing() -> None:
    class Root(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs * 0.0).abs().sqrt()

    family = ModuleFamily(lambda: Root(3, 2, bias=False), squared, rows(5, 3))
    tasks = family.sample(1, seeded())
    one = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))
    assert family.faults(*one) == []


# What a call writes, keeps or draws.


class Average(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 2), how
        self.register_buffer("mean", torch.zeros(2))
        self.plain, self.history = 0.0, []

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.layer(inputs)
        if self.how == "nothing new":
            self.mean.mul_(0.9)
        elif self.how == "in place":
            self.mean.lerp_(out.detach().mean(0), 0.1)
        elif self.how == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        elif self.how == "plain":
            self.plain = 0.9 * self.plain + 0.1 * out.detach().mean(0)
        else:
            self.history.append(out)
        return out - self.mean - self.plain


class Inner(nn.Module):
    """``fn`` after a layer; ``fn`` draws random numbers."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.noisy = nn.Linear(3, 2), Noisy(fn)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.noisy(self.layer(inputs))


class Noisy(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fn(inputs)


class LowNorm(nn.Module):
    """The functional form of ``Embedding(max_norm=...)`` and ``Embedding(sparse=True)``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(4, 3)), options

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.embedding(inputs.abs().long().clamp(max=3), self.weight, **self.options)


with torch.random.fork_rng():
    torch.manual_seed(0)
    SPECTRAL = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2, dtype=torch.float64))
PRIVATE = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Average("in place"), r"'itself' \(Average\) writes to its buffer 'mean'"),
        (lambda: nn.Sequential(Average("assigned")), r"'0' \(Average\) writes to its buffer '0.mean'"),
        (lambda: Average("plain"), "keeps what a later call reads"),
        (lambda: Average("list"), r"'itself' \(Average\) puts tensors into its 'history'"),
        (lambda: Average("nothing new"), "writes to its buffer 'mean'"),
        (lambda: copy.deepcopy(SPECTRAL), r"_SpectralNorm\) writes to its buffer 'parametrizations.weight.0._"),
        (lambda: Inner(functional.dropout), r"'noisy' \(Noisy\) draws random numbers"),
        (lambda: Inner(lambda x: functional.dropout(x, p=0.01)), "'noisy'"),
        (lambda: Inner(lambda x: nn.Dropout(0.3)(x)), "'noisy'"),
        (lambda: Inner(lambda x: x + 1e-9 * torch.randn_like(x)), "'noisy'"),
        (lambda: Inner(lambda x: x if random.random() < 0.99 else 0 * x), "'noisy'"),
        (lambda: Inner(lambda x: x if np.random.rand() < 0.99 else 0 * x), "'noisy'"),
        (lambda: Inner(lambda x: x + torch.rand(2, generator=PRIVATE)), "keeps what a later call reads"),
        (lambda: LowNorm(max_norm=0.1), r"\(LowNorm\) writes to the parameter 'weight'"),
        (lambda: LowNorm(sparse=True), "gradient of 'weight' is sparse.*sparse=False"),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_what_no_pure_function_does_is_refused_before_the_first_step(
    build: Callable[[], nn.Module], message: str, chunk_size: int
) -> None:
    family = ModuleFamily(build, squared, rows(5, 3))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    constants = {name: b.clone() for name, b in family.module.named_buffers()}
    with pytest.raises(ValueError, match=message):
        meta_gradient(family, chunk_size)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(torch.equal(b, constants[name]) for name, b in family.module.named_buffers())


def test_a_loss_that_draws_is_refused() -> None:
    family = ModuleFamily(mlp, lambda out, target: squared(functional.dropout(out), target), rows(5, 3))
    with pytest.raises(ValueError, match="loss_fn draws random numbers"):
        meta_gradient(family)


def test_noise_under_a_seed_of_its_own_is_accepted() -> None:
    def noise(x: Tensor) -> Tensor:
        return x + torch.randn(2, generator=torch.Generator().manual_seed(0))

    meta_gradient(ModuleFamily(lambda: Inner(noise), squared, rows(5, 3)))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.Embedding(4, 3, max_norm=1.0), r"'1' \(Embedding\) has max_norm=1.0"),
        (nn.Embedding(4, 3, sparse=True), "pass sparse=False"),
        (nn.EmbeddingBag(4, 3, sparse=True), "pass sparse=False"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "not the gradient of the loss"),
        (nn.Linear(2, 2, dtype=torch.complex128), "'1.weight' is complex.*view_as_real"),
    ],
)
def test_layers_without_a_gradient_for_rules_are_refused(part: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleFamily(lambda: nn.Sequential(nn.Linear(3, 2), part), squared, rows(5, 3))


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_a_frozen_embedding_may_have_any_gradient(options: dict[str, Any]) -> None:
    frozen = nn.Embedding(4, 3, **options).requires_grad_(False)

    def data(seed: int, step: int, split: Split) -> tuple[Tensor, Tensor]:
        return torch.arange(5) % 4, torch.tensor(1.0)

    family = ModuleFamily(lambda: nn.Sequential(frozen, nn.Linear(3, 2)), squared, data)
    assert meta_gradient(family)["lr"].isfinite()


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' has no shape yet"):
        ModuleFamily(lambda: nn.LazyLinear(2), squared, rows(5, 3))


# Second derivatives.


def second_derivative_error(module: nn.Module, inputs: Tensor) -> float:
    """How far a product of Hessian and vector lies from a difference of gradients."""
    params = {k: p.detach() for k, p in module.named_parameters()}
    along = {k: torch.randn(p.shape, generator=seeded(i)) for i, (k, p) in enumerate(params.items())}

    def gradient(at: float) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {k: (p + at * along[k]).requires_grad_() for k, p in params.items()}
        loss = torch.func.functional_call(module, leaves, (inputs,)).sin().square().sum()
        grads = torch.autograd.grad(loss, [*leaves.values()], create_graph=True)
        return [*leaves.values()], list(grads)

    leaves, grads = gradient(0.0)
    found = torch.autograd.grad(sum((g * a).sum() for g, a in zip(grads, along.values(), strict=True)), leaves)
    right = [(a - b) / 2e-5 for a, b in zip(gradient(1e-5)[1], gradient(-1e-5)[1], strict=True)]
    difference = sum((a - b).square().sum() for a, b in zip(found, right, strict=True))
    return float((difference / sum(b.square().sum() for b in right)).sqrt().detach())


@pytest.mark.parametrize(("dim", "wrong"), [(0, True), (1, False), (2, True), (None, False)])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_is_refused_on_a_full_tape_where_torch_is_wrong(dim: int | None, wrong: bool, old: bool) -> None:
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm

    def build() -> nn.Module:
        return nn.Sequential(nn.Tanh(), norm(nn.Conv1d(3, 2, 2), dim=dim))  # pyright: ignore[reportArgumentType]

    torch.manual_seed(0)
    error = second_derivative_error(build(), torch.randn(4, 3, 5))
    assert error > 0.05 if wrong else error < 1e-7  # should torch mend it, the refusal can go
    family = ModuleFamily(build, squared, rows(4, 3, 5))
    meta_gradient(family, tape=Tape.FIRST_ORDER)
    if wrong:
        with pytest.raises(ValueError, match=rf"module '1.*weight normalisation over dim={dim}.*dim=None"):
            meta_gradient(family)
    else:
        meta_gradient(family)


def test_scaling_by_frequency_is_refused_because_it_is_not_the_gradient() -> None:
    weight, indices = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 1, 1])
    found, right = (
        torch.autograd.grad(functional.embedding(indices, weight, scale_grad_by_freq=scale).sin().sum(), weight)[0]
        for scale in (True, False)
    )
    assert (found - right).norm() > 0.1 * right.norm()


class Attention(nn.Module):
    def __init__(self, *, math: bool) -> None:
        super().__init__()
        self.layer, self.math = nn.Linear(4, 8), math

    def forward(self, inputs: Tensor) -> Tensor:
        heads = self.layer(inputs).unflatten(-1, (2, 4)).transpose(-2, -3)
        with sdpa_kernel(SDPBackend.MATH) if self.math else sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return functional.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_fused_attention_says_what_to_do_on_a_full_tape(chunk_size: int) -> None:
    fused = ModuleFamily(lambda: Attention(math=False), squared, rows(3, 5, 4))
    with pytest.raises(ValueError, match=r"fused attention has no second derivative.*SDPBackend.MATH"):
        meta_gradient(fused, chunk_size)
    plain = ModuleFamily(lambda: Attention(math=True), squared, rows(3, 5, 4))
    assert_close(
        meta_gradient(fused, chunk_size, Tape.FIRST_ORDER), meta_gradient(plain, chunk_size, Tape.FIRST_ORDER), 1e-9
    )
    assert_close(meta_gradient(plain, chunk_size), meta_gradient(plain, 3 - chunk_size))
    with sdpa_kernel(SDPBackend.MATH):
        layer = ModuleFamily(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), squared, rows(3, 5, 4))
        meta_gradient(layer, chunk_size)


# Tasks together.


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_say_how_to_run_them(layer: Any) -> None:
    family = ModuleFamily(lambda: layer(3, 2), squared, rows(5, 3))
    with pytest.raises(RuntimeError, match=r"Execution\(chunk_size=1\).*matrix products.*torch: Batching rule") as info:
        meta_gradient(family, 2)
    assert isinstance(info.value.__cause__, RuntimeError)
    assert meta_gradient(family, 1)["lr"].isfinite()


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_attention_in_eval_mode_is_run_without_its_fast_path(chunk_size: int) -> None:
    def build(*, evaluated: bool) -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).train(not evaluated)

    with sdpa_kernel(SDPBackend.MATH):
        found, right = (
            meta_gradient(ModuleFamily(lambda e=e: build(evaluated=e), squared, rows(3, 5, 4)), chunk_size)
            for e in (True, False)
        )
    assert_close(found, right)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "torch.where"),
        (lambda x: x + 0.0 * x.sum().item(), r"item\(\)"),
        (lambda x: torch.zeros(5, 2).add_(x), "torch.stack"),
        (lambda x: torch.zeros(2).index_add_(0, torch.tensor([0, 1]), x[0]), "torch.stack"),
    ],
)
def test_what_cannot_be_mapped_says_what_to_do(fn: Callable[[Tensor], Tensor], message: str) -> None:
    family = ModuleFamily(lambda: Inner(fn), squared, rows(5, 3))
    with pytest.raises(RuntimeError, match=rf"{message}.*chunk_size=1"):
        meta_gradient(family, 2)
    assert meta_gradient(family, 1)["lr"].isfinite()


def test_other_errors_pass_as_they_are() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        meta_gradient(ModuleFamily(lambda: Inner(fail), squared, rows(5, 3)))


# Data.


class Pooled(nn.Module):
    """Attention over padded sequences: what lies in the padding must not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            mixed, _ = self.attention(tokens, tokens, tokens, key_padding_mask=padding, need_weights=False)
        return self.head(mixed.masked_fill(padding[..., None], 0.0).sum(1))


def sequences(as_dict: bool, fill: float) -> Callable[[int, int, Split], tuple[Any, Tensor]]:
    def data(seed: int, step: int, split: Split) -> tuple[Any, Tensor]:
        tokens = rows(6, 5, 4)(seed, step, split)[0]
        padding = torch.arange(5) >= torch.arange(6)[:, None] % 4 + 2
        tokens = tokens.masked_fill(padding[..., None], fill)
        inputs = {"padding": padding, "tokens": tokens} if as_dict else (tokens, padding)
        return inputs, tokens[:, 0].sum(1, keepdim=True)

    return data


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_several_inputs_and_a_padding_mask(chunk_size: int) -> None:
    expected = meta_gradient(ModuleFamily(Pooled, functional.mse_loss, sequences(False, 0.0)), 1)
    for as_dict in (True, False):
        for fill in (0.0, 7.0):
            family = ModuleFamily(Pooled, functional.mse_loss, sequences(as_dict, fill))
            assert_close(meta_gradient(family, chunk_size), expected)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ((torch.ones(2), torch.ones(2)), "pair"),
        (((torch.ones(2), torch.ones(2)),), "pair"),
        ([torch.ones(2), torch.ones(2)], "pair"),
        ({"a": torch.ones(2)}, "dict"),
    ],
)
def test_a_tree_that_forward_does_not_take_apart_is_one_argument(inputs: Any, expected: str) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, everything: Any) -> Tensor:
            assert len(everything) == (2 if expected == "pair" else 1) and isinstance(everything, dict | tuple | list)
            first = everything["a"] if isinstance(everything, dict) else everything[1]
            return self.scale * first

    assert meta_gradient(ModuleFamily(Takes, squared, lambda *_: (inputs, torch.zeros(()))), 2)["lr"].isfinite()


def test_arrays_and_numbers_become_tensors_and_targets_may_be_none() -> None:
    def data(seed: int, step: int, split: Split) -> tuple[Any, Any]:
        array = rows(5, 3)(seed, step, split)[0].numpy()
        array.setflags(write=False)
        return (array, 2.5), (np.arange(5) % 2, np.float64(0.5), 3)

    class Scaled(nn.Linear):
        def forward(self, inputs: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return scale * super().forward(inputs)

    def loss(outputs: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(outputs, targets[0]) * targets[1] * targets[2]

    family = ModuleFamily(lambda: Scaled(3, 2), loss, data)
    batch = family.batch(family.sample(2, seeded()), 0, "train")
    assert batch["targets"][0].dtype == batch["targets"][2].dtype == torch.int64
    assert batch["inputs"][1].tolist() == [2.5, 2.5] and batch["targets"][2].tolist() == [3, 3]
    assert meta_gradient(family, 2)["lr"].isfinite()

    def without(outputs: Tensor, targets: None) -> Tensor:
        assert targets is None
        return outputs.square().mean()

    def zero(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - 0 * targets).square().mean()

    bare = ModuleFamily(mlp, without, lambda *at: (rows(5, 3)(*at)[0], None))
    assert_close(meta_gradient(bare, 2), meta_gradient(ModuleFamily(mlp, zero, rows(5, 3)), 1))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            lambda seed, *_: (torch.ones(1 + seed, 3), None),
            ValueError,
            r"inputs of shapes \[\(2, 3\), \(3, 3\)\].*pad",
        ),
        (lambda *_: ((torch.ones(5, 3), None), torch.ones(())), TypeError, "inputs that hold a NoneType"),
        (lambda *_: (torch.ones(5, 3), "cat"), TypeError, "targets that hold a str.*numpy arrays"),
        (lambda *_: (np.array(["cat"]), None), TypeError, "inputs that cannot become a tensor"),
        (lambda *_: torch.ones(5, 3), TypeError, r"pair \(inputs, targets\), got a Tensor"),
        (lambda seed, *_: (torch.ones(5, 3), None if seed % 2 else torch.ones(())), TypeError, "NoneType"),
    ],
)
def test_data_that_is_no_batch_is_refused(data: Any, error: type[Exception], message: str) -> None:
    family = ModuleFamily(mlp, squared, data)
    with pytest.raises(error, match=message):
        family.batch({"seed": torch.tensor([1, 2])}, 0, "train")


def whole_targets(dtype: torch.dtype) -> Any:
    return lambda *_: (torch.ones(5, 3), torch.ones(5, 2, dtype=dtype))


@pytest.mark.parametrize(
    ("data", "loss_fn", "message"),
    [
        (lambda *_: (np.ones((5, 3), np.float32), 0.0), squared, "numpy arrays are float64"),
        (whole_targets(torch.int64), functional.binary_cross_entropy_with_logits, r"targets.float\(\)"),
        (whole_targets(torch.int32), lambda out, y: functional.cross_entropy(out, y[:, 0]), r"targets.long\(\)"),
    ],
)
def test_dtypes_that_do_not_go_together_say_what_to_do(data: Any, loss_fn: Any, message: str) -> None:
    family = ModuleFamily(mlp, loss_fn, data)
    with pytest.raises(RuntimeError, match=message):
        meta_gradient(family)


def test_both_names_are_one_class() -> None:
    assert learnedopt.ModuleFamily is learnedopt.tasks.ModuleFamily is ModuleFamily
