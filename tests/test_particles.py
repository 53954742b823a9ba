"""Particles run together are what each of them is alone, whatever the pieces are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import FLOAT, Both, Labelled, Quadratic, generic_theta, imaml_loop, sample, template
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from learnedopt import Execution, InnerLoop, State, Tape, TaskFamily, Theta, UpdateRule, optimizers
from learnedopt.core import tree
from learnedopt.core.tree import Params
from learnedopt.core.vetting.purity import near
from learnedopt.execution import particle_trial, particles
from learnedopt.execution.lane_functions import LaneFunctions

pytestmark = pytest.mark.usefixtures("float64")

NUM_SLOTS, NUM_PARTICLES, NUM_STEPS = 3, 4, 3


LOOPS = {
    "an lstm": lambda execution: InnerLoop(Quadratic(), optimizers.make("lstm", hidden_size=3), execution),
    "adam, which counts": lambda execution: _of("adam", Quadratic(), execution),
    "rates of a start's own": lambda execution: _of("meta-sgd", Quadratic(), execution),
    "a classifier": lambda execution: _of("momentum", Labelled(), execution),
    "a small network": lambda execution: _of("small-mlp", Labelled(), execution),
    "a penalty and its strength": lambda execution: imaml_loop(Labelled(), execution, learn=True),
    "theta in both losses": lambda execution: InnerLoop(
        Labelled(), optimizers.make("momentum", lr=0.1), execution, Both()
    ),
}
every_loop = pytest.mark.parametrize("name", LOOPS)


def _of(name: str, family: TaskFamily, execution: Execution) -> InnerLoop:
    return InnerLoop(family, optimizers.example(name, template(family)), execution)


def thetas_of(loop: InnerLoop, slots: int = NUM_SLOTS, lanes: int = NUM_PARTICLES) -> Theta:
    """Return (slots, lanes, ...) thetas that all differ."""
    each = [
        {k: v * (1 - 0.03 * i) + 0.004 * i for k, v in generic_theta(loop, seed=3 + i).items()}
        for i in range(slots * lanes)
    ]
    return {k: torch.stack([theta[k] for theta in each]).unflatten(0, (slots, lanes)) for k in each[0]}


@every_loop
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 9], ids=str)
def test_every_particle_is_what_it_is_alone(name: str, chunk_size: int | None) -> None:
    loop, alone = LOOPS[name](Execution(chunk_size)), LOOPS[name](Execution(1))
    tasks, thetas = sample(loop.family, NUM_SLOTS), thetas_of(loop)
    start = particles.begin(loop, thetas, tasks, loop.start(tasks).params)
    end, losses = particles.run(loop, start, NUM_STEPS)
    found = {split: particles.losses(loop, end, split) for split in ("train", "valid")}
    assert end.steps == (NUM_STEPS,) * NUM_SLOTS and losses.shape == (NUM_STEPS, NUM_SLOTS, NUM_PARTICLES)
    for i in range(NUM_SLOTS):
        task = tree.narrow(tasks, i, i + 1)
        for j in range(NUM_PARTICLES):
            theta = {k: v[i, j] for k, v in thetas.items()}
            rollout = alone.run(theta, alone.start(task), NUM_STEPS, Tape.NONE)
            close(losses[:, i, j], rollout.losses[:, 0])
            for a, b in zip(tree.leaves(end[3:]), tree.leaves(rollout.end[1:3]), strict=True):
                close(a[i, j], b[0])
            for split, values in found.items():
                close(values[i, j], alone.losses(theta, rollout.end, split)[0])


@every_loop
def test_slots_at_different_steps_are_those_apart(name: str) -> None:
    loop = LOOPS[name](Execution())
    tasks, thetas = sample(loop.family, NUM_SLOTS), thetas_of(loop)
    start = particles.begin(loop, thetas, tasks, loop.start(tasks).params)
    parts = particles.split(start, [1, 1, 1])
    ahead = [part if i == 0 else particles.run(loop, part, i)[0] for i, part in enumerate(parts)]
    together, losses = particles.run(loop, particles.concatenate(ahead), 2)
    assert together.steps == (2, 3, 4)
    for i, part in enumerate(ahead):
        end, apart = particles.run(loop, part, 2)
        close(losses[:, i], apart[:, 0])
        for a, b in zip(tree.leaves(together[3:]), tree.leaves(end[3:]), strict=True):
            close(a[i], b[0])


def test_data_are_gathered_once_for_all_particles_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LOOPS["a classifier"](Execution())
    seen: list[int] = []
    batch = type(loop.family).batch

    def counted(self, tasks, step, split):
        seen.append(tree.size(tasks))
        return batch(self, tasks, step, split)

    tasks, thetas = sample(loop.family, NUM_SLOTS), thetas_of(loop)
    start = particles.begin(loop, thetas, tasks, loop.start(tasks).params)
    particles.run(loop, start, 1)  # what is tried once
    monkeypatch.setattr(type(loop.family), "batch", counted)
    particles.run(loop, start, NUM_STEPS)
    assert seen == [NUM_SLOTS] * NUM_STEPS


class Products(TorchDispatchMode):
    """Counts products of matrices and remembers the largest tensor that is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.copied = list[tuple[int, ...]](), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products.append(tuple(out.shape))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.copied = max(self.copied, out.numel())
        return out


@pytest.mark.parametrize("form", ["linear", "matmul", "at"])
@pytest.mark.parametrize("slots", [1, 3])
def test_one_product_serves_all_particles_of_a_slot(form: str, slots: int) -> None:
    x, w, b = torch.randn(slots, 50, 40), torch.randn(slots, 6, 8, 40), torch.randn(slots, 6, 8)

    def layer(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        if form == "linear":
            return functional.linear(x, w, b)
        return (torch.matmul(x, w.mT) if form == "matmul" else x @ w.mT) + b

    mapped = torch.func.vmap(layer, in_dims=(0, 0, None))
    lanes = torch.func.vmap(mapped) if slots > 1 else lambda w, b, x: mapped(w[0], b[0], x[0]).unsqueeze(0)
    with Products() as counted, LaneFunctions():
        found = lanes(w, b, x)
    assert len(counted.products) == 1 and counted.copied < x.numel()
    torch.testing.assert_close(found, torch.einsum("sni,smoi->smno", x, w) + b.unsqueeze(2), rtol=1e-12, atol=1e-12)


is_batched = torch._C._functorch.is_batchedtensor


class Apart(Labelled):
    """A loss that fails under two levels of vmap, as some of torch's operations do."""

    def loss(self, params: Params, batch: Any) -> Tensor:
        inside = torch._C._functorch.get_unwrapped(params["w"]) if is_batched(params["w"]) else params["w"]
        if is_batched(inside):
            raise RuntimeError("no rule for two levels of vmap")
        return super().loss(params, batch)


class Steps(Labelled):
    """A loss that asks for a number."""

    def loss(self, params: Params, batch: Any) -> Tensor:
        loss = super().loss(params, batch)
        return loss * (1 if loss.item() > 0 else 2)


class Halved(Labelled):
    """A loss that is another one where it is one of several."""

    def loss(self, params: Params, batch: Any) -> Tensor:
        return super().loss(params, batch) * (0.5 if is_batched(params["w"]) else 1.0)


def test_what_torch_fails_at_for_several_slots_is_run_slot_by_slot(caplog: pytest.LogCaptureFixture) -> None:
    loop, alone = (InnerLoop(Apart(), optimizers.make("sgd", lr=0.1), Execution(n)) for n in (None, 1))
    tasks, thetas = sample(loop.family, NUM_SLOTS), thetas_of(loop)
    for _ in range(2):
        start = particles.begin(loop, thetas, tasks, loop.start(tasks).params)
        end, losses = particles.run(loop, start, NUM_STEPS)
    expected, losses_alone = particles.run(alone, start, NUM_STEPS)
    close(losses, losses_alone)
    for k, p in expected.params.items():
        close(end.params[k], p)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "one task after the other" in said[0] and "no rule for two levels" in said[0]


@pytest.mark.parametrize("family", [Steps(), Halved()], ids=["asks for a number", "differs together"])
def test_what_cannot_run_together_is_refused_with_what_to_do(family: TaskFamily) -> None:
    loop = InnerLoop(family, optimizers.make("sgd", lr=0.1))
    tasks, thetas = sample(family, NUM_SLOTS), thetas_of(loop)
    start = particles.begin(loop, thetas, tasks, loop.start(tasks).params)
    with pytest.raises(ValueError, match=r"cannot be run together: .*Execution\(chunk_size=1\)"):
        particles.run(loop, start, NUM_STEPS)
    particles.run(InnerLoop(family, loop.rule, Execution(1)), start, NUM_STEPS)


class Asking(UpdateRule):
    """Gradient descent whose start asks for a number."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        return {k: p * (1 if theta["lr"].item() > 0 else 2) for k, p in params.items()}, ()

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        return {k: -theta["lr"] * g for k, g in grads.items()}, state


def test_what_cannot_start_together_is_refused_with_what_to_do() -> None:
    loop, alone = (InnerLoop(Labelled(), Asking(), Execution(n)) for n in (None, 1))
    tasks, thetas = sample(loop.family, NUM_SLOTS), thetas_of(loop)
    with pytest.raises(ValueError, match=r"Asking.init cannot start particles together: .*Execution\(chunk_size=1\)"):
        particles.begin(loop, thetas, tasks, loop.start(tasks).params)
    begun = particles.begin(alone, thetas, tasks, alone.start(tasks).params)
    for k, p in alone.start(tasks).params.items():
        close(begun.params[k], p.unsqueeze(1).expand(NUM_SLOTS, NUM_PARTICLES, *p.shape[1:]))


def test_on_a_gpu_products_of_float32_may_be_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.ones(3, dtype=torch.float32), torch.full((3,), 1.01, dtype=torch.float32)
    assert not near(x, y, particle_trial._eps(y))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert near(x, y, particle_trial._eps(y)) and not near(x, 1.1 * x, particle_trial._eps(x))
    assert not near(x.double(), y.double(), particle_trial._eps(y.double()))


def test_noise_that_an_optimizer_blows_up_is_no_difference() -> None:
    """Adam moves by its rate along gradients that are zero but for rounding."""
    loop = InnerLoop(Cancelling(), optimizers.make("adam", lr=0.1, eps=0.0))
    tasks, thetas = sample(loop.family, NUM_SLOTS), thetas_of(loop)
    thetas = {k: torch.full_like(v, {"lr": 0.1, "beta1": 0.9, "beta2": 0.99}.get(k, 1e-300)) for k, v in thetas.items()}
    start = particles.begin(loop, thetas, tasks, loop.start(tasks).params)
    particles.run(loop, start, 1)


class Cancelling(Labelled):
    """The classifier with a bias that its normalised outputs do not feel."""

    def loss(self, params: Params, batch: Any) -> Tensor:
        outputs = self.outputs(params, batch) + params["b"].sum() * 3
        return functional.cross_entropy(outputs - outputs.mean(-1, keepdim=True), batch["targets"])


@pytest.mark.parametrize("lanes", ["weights", "inputs", "both", "both and a shared bias", "nested", "no bias"])
def test_the_layer_and_its_gradients_are_torch_s(lanes: str) -> None:
    """In every arrangement of lanes, gradients by reverse mode around it."""
    dims = {
        "weights": (None, 0, 0), "inputs": (0, None, None), "both": (0, 0, 0), "both and a shared bias": (0, 0, None),
        "nested": (None, 0, 0), "no bias": (None, 0, 0),
    }[lanes]  # fmt: skip
    shapes = [(5, 7, 4), (3, 4), (3,)]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*(() if d is None else (2,)), *s, generator=generator, dtype=FLOAT)
        for s, d in zip(shapes, dims, strict=True)
    ]
    if lanes == "nested":  # the inputs have a lane outside, the weights both
        tensors = [torch.stack([t, 2 * t]) for t in tensors]
    bias = lanes != "no bias"

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.linear(x, w, b if bias else None).tanh()

    fn = torch.func.vmap(layer, in_dims=dims)
    fn = torch.func.vmap(fn) if lanes == "nested" else fn
    results = []
    for shared in (True, False):
        leaves = [t.clone().requires_grad_() for t in tensors]
        if shared:
            with LaneFunctions():
                out = fn(*leaves)
        else:
            out = fn(*leaves)
        grads = torch.autograd.grad(
            (out * torch.arange(out.numel()).view_as(out)).sum(), leaves, materialize_grads=True
        )
        results.append((out, *grads))
    for a, b in zip(*results, strict=True):
        close(a, b)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
