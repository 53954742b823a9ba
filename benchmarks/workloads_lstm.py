"""The meta-training step of the coordinatewise LSTM optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers_jax
from benchmarks.networks import IMAGE, Problem, Stored, at, images, mlp
from benchmarks.suite import Call, Competitor, Size, Workload, peer
from learnedopt import Execution, FirstOrder, InnerLoop, SumOfLosses, Theta
from learnedopt import optimizers as rules
from learnedopt import tasks as families
from learnedopt.execution.programs import CompileWarning

HIDDEN, FACTOR, SCALE = 20, 10.0, 0.1
BATCH, DIM = 128, 10
Cells = tuple[nn.LSTMCell, nn.LSTMCell, nn.Linear]
States = list[tuple[Tensor, Tensor]]


def mlp_problem(size: Size) -> Problem:
    """Return the MLP 784-20-10 with a batch of 128 random images for each step and for the end."""
    generator = torch.Generator().manual_seed(0)
    data = images((size.tasks, size.steps + 1, BATCH), 10, generator, size.torch_dtype)
    return Problem(*mlp((IMAGE**2, 20, 10), nn.Sigmoid, size.torch_dtype), data, data)


def trained(size: Size) -> Theta:
    """Return weights of the optimizer."""
    theta = rules.make("lstm").init_theta(torch.Generator().manual_seed(0))
    return {k: v.to(size.torch_dtype) for k, v in theta.items()}


def cells_of(theta: Theta) -> Cells:
    """Return the same network in torch's own cells."""
    cells = nn.LSTMCell(2, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
    weights = in_cells(theta)
    for p, w in zip((p for cell in cells for p in cell.parameters()), weights, strict=True):
        p.data = w.clone()
    return cells


def in_cells(values: Theta, *, gradient: bool = False) -> list[Tensor]:
    """Return values shaped as theta in the order of torch's cells: gates i, f, g, o, weights apart, two biases.

    Only the sum of two biases matters: the second is zero, and its gradient is the first's.
    """
    found = []
    for layer in (1, 2):
        weight, bias = (_reordered(values[f"lstm{layer}/{kind}"]) for kind in ("weight", "bias"))
        num_inputs = weight.shape[1] - HIDDEN
        second = bias if gradient else torch.zeros_like(bias)
        found += [weight[:, :num_inputs], weight[:, num_inputs:], bias, second]
    return [*found, values["readout/weight"], values["readout/bias"]]


def _reordered(gates: Tensor) -> Tensor:
    i, f, o, g = gates.chunk(4)
    return torch.cat([i, f, g, o])


def _inputs(grads: Tensor) -> Tensor:
    """Return the two inputs (num_coordinates, 2): scale and direction of the gradient."""
    magnitude = grads.abs()
    large = magnitude >= math.exp(-FACTOR)
    scale = torch.where(large, torch.where(large, magnitude, 1.0).log() / FACTOR, -1.0)
    return torch.stack([scale, torch.where(large, grads.sign(), math.exp(FACTOR) * grads)], dim=1)


def step_of(cells: Cells, grads: Tensor, states: States) -> tuple[Tensor, States]:
    """Return the deltas (num_coordinates,) and the new states."""
    first, second, readout = cells
    states = [first(_inputs(grads), states[0]), states[1]]
    states = [states[0], second(states[0][0], states[1])]
    return SCALE * readout(states[1][0]).squeeze(1), states


def zeros(num_coordinates: int, like: Tensor) -> States:
    zero = like.new_zeros(num_coordinates, HIDDEN)
    return [(zero, zero), (zero, zero)]


def ours_mlp(size: Size, *, compile: bool = False) -> Call:
    """Return how this library computes the meta-training step on the MLP."""
    family = Stored(mlp_problem(size), fresh=True)
    return _ours(
        InnerLoop(family, rules.make("lstm"), Execution(compile=compile)),
        family.sample(size.tasks, torch.Generator()),
        size,
    )


def ours_quadratics(size: Size, *, compile: bool = False) -> Call:
    """Return the same on quadratics, all tasks at once."""
    family, tasks = _quadratics(size)
    return _ours(InnerLoop(family, rules.make("lstm"), Execution(chunk_size=size.tasks, compile=compile)), tasks, size)


def _ours(loop: InnerLoop, tasks: Any, size: Size) -> Call:
    theta = trained(size)
    warnings.simplefilter("error", CompileWarning)  # what falls back to the plain gradient is not to pass for compiled

    def call() -> list[Tensor]:
        estimate = FirstOrder(size.steps).estimate(loop, theta, SumOfLosses(), loop.start(tasks))
        return in_cells(estimate.grads, gradient=True)

    return call


def _quadratics(size: Size) -> tuple[Any, Any]:
    family = families.make("quadratic", dim=DIM, start_scale=1.0, dtype=size.dtype)
    return family, family.sample(size.tasks, torch.Generator().manual_seed(0))


class Batched(nn.Module):
    """All quadratics together, as one writes them for torch: the sum of their losses is what is descended."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())

    def forward(self, examples: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of the losses."""
        matrices, targets = examples
        return ((matrices @ self.x[:, :, None]).squeeze(2) - targets).square().sum()


class OnImages(nn.Module):
    """The MLP with its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, examples: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self.network(examples[0]), examples[1])


Posed = tuple[nn.Module, list[Any], int]  # a module that returns its loss on data, the data of steps 0..K, tasks in it


def _posed_mlp(size: Size) -> Posed:
    if size.tasks != 1:
        raise ValueError(f"tasks={size.tasks}: the peers' loops on the MLP are written for one task")
    problem = mlp_problem(size)
    return OnImages(problem.module), [at(problem.train, 0, step) for step in range(size.steps + 1)], 1


def _posed_quadratics(size: Size) -> Posed:
    _, tasks = _quadratics(size)
    return Batched(tasks["start"]), [(tasks["W"], tasks["y"])] * (size.steps + 1), size.tasks


def plain(pose: Callable[[Size], Posed]) -> Callable[[Size], Call]:
    """Return a loop over ``nn.LSTMCell`` written by hand, with one backward pass through all of it."""

    def build(size: Size) -> Call:
        (module, data, num_tasks), cells = pose(size), cells_of(trained(size))
        names, weights = [k for k, _ in module.named_parameters()], weights_of(cells)

        def call() -> list[Tensor]:
            params = [p.detach().requires_grad_() for p in module.parameters()]
            states, total = zeros(sum(p.numel() for p in params), params[0]), torch.zeros(())
            for step in range(size.steps + 1):
                loss = torch.func.functional_call(module, dict(zip(names, params, strict=True)), (data[step],))
                total = total + loss if step else total
                if step < size.steps:
                    grads = torch.autograd.grad(loss, params, retain_graph=step > 0)
                    deltas, states = step_of(cells, torch.cat([g.flatten() for g in grads]), states)
                    pieces = deltas.split([p.numel() for p in params])
                    params = [p + d.view_as(p) for p, d in zip(params, pieces, strict=True)]
            return list(torch.autograd.grad(total / num_tasks, weights))

        return call

    return build


def higher(pose: Callable[[Size], Posed]) -> Callable[[Size], Call]:
    """Return higher (Grefenstette et al. 2019) with the LSTM as a differentiable optimizer that is registered there."""

    def build(size: Size) -> Call:
        package = peer("higher")
        (module, data, num_tasks), cells = pose(size), cells_of(trained(size))

        class Placeholder(torch.optim.SGD):
            """Holds the parameters until higher takes them."""

        class Learned(package.optim.DifferentiableOptimizer):
            states: States | None = None

            def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
                (group,), (grads,) = self.param_groups, grouped_grads
                params = group["params"]
                flat = torch.cat([g.detach().flatten() for g in grads])
                deltas, self.states = step_of(cells, flat, self.states or zeros(len(flat), flat))
                pieces = deltas.split([p.numel() for p in params])
                for i, (p, d) in enumerate(zip(params, pieces, strict=True)):
                    params[i] = p + d.view_as(p)

        package.register_optim(Placeholder, Learned)

        def call() -> list[Tensor]:
            with package.innerloop_ctx(module, Placeholder(module.parameters(), lr=1.0)) as (patched, moving):
                total = torch.zeros(())
                for step in range(size.steps):
                    loss = patched(data[step])
                    total = total + loss if step else total
                    moving.step(loss)
                total = total + patched(data[size.steps])
                return list(torch.autograd.grad(total / num_tasks, weights_of(cells)))

        return call

    return build


def jax_mlp(size: Size, remat: bool) -> Call:
    """Return the MLP in JAX."""
    problem, jax = mlp_problem(size), peers_jax.ready(size)
    data = tuple(peers_jax.array(x[0]) for x in problem.train)
    loss, weights = peers_jax.mlp_loss(jax.nn.sigmoid), weights_of(cells_of(trained(size)))
    start = list(problem.start.values())
    return peers_jax.lstm_training(start, loss, lambda i: tuple(x[i] for x in data), weights, size, 1, remat=remat)


def jax_quadratics(size: Size, remat: bool) -> Call:
    """Return the quadratics in JAX."""
    (_, tasks), jax = _quadratics(size), peers_jax.ready(size)
    data = tuple(peers_jax.array(tasks[k]) for k in ("W", "y"))

    def loss(params: list[Any], batch: Any) -> Any:
        return jax.numpy.square((batch[0] @ params[0][:, :, None])[:, :, 0] - batch[1]).sum()

    weights = weights_of(cells_of(trained(size)))
    return peers_jax.lstm_training([tasks["start"]], loss, lambda i: data, weights, size, size.tasks, remat=remat)


def weights_of(cells: Cells) -> list[Tensor]:
    return [p for cell in cells for p in cell.parameters()]


def _training(
    ours: Callable[..., Call], pose: Callable[[Size], Posed], jax: Callable[[Size, bool], Call]
) -> dict[str, Competitor]:
    return {
        "learnedopt": Competitor(ours),
        "learnedopt, compiled": Competitor(lambda size: ours(size, compile=True), warm_at_size=True),
        "higher": Competitor(higher(pose), "higher"),
        "nn.LSTMCell loop": Competitor(plain(pose)),
        **peers_jax.rows(jax),
    }


_TEXT = (
    f"Two layers of {HIDDEN} units, gradients detached, the sum of the losses after each of the steps. *Compiled*: the "
    "gradient of an inner step, by `Execution(compile=True)`."
)
WORKLOADS = {
    "lstm-mlp": Workload(
        "LSTM meta-training step, MLP 784-20-10, 20 steps", _TEXT + f" Batches of {BATCH} random images.",
        Size(steps=20), Size(steps=5), _training(ours_mlp, _posed_mlp, jax_mlp), "nn.LSTMCell loop",
    ),
    "lstm-quadratics": Workload(
        f"LSTM meta-training step, 128 quadratics of {DIM} dimensions, 20 steps",
        _TEXT + " All quadratics at once; for the peers they are one module.",
        Size(steps=20, tasks=128), Size(steps=20, tasks=8),
        _training(ours_quadratics, _posed_quadratics, jax_quadratics), "nn.LSTMCell loop",
    ),
}  # fmt: skip
