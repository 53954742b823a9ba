"""MAML: the meta-gradient of a start through inner gradient descent, the final loss on held-out examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers_jax
from benchmarks.networks import CONV_WAYS, IMAGE, Forward, Problem, Stored, at, conv, conv_pooled_first, images, mlp
from benchmarks.suite import Call, Competitor, Size, Workload, peer
from learnedopt import Execution, FinalLoss, GradientEstimator, InnerLoop, Unrolled
from learnedopt import optimizers as rules
from learnedopt.execution.allocator import keep_freed_memory
from learnedopt.execution.programs import CompileWarning

WIDTHS, NUM_EXAMPLES = (784, 256, 128, 64, 5), 25
SHOTS, QUERIES = 1, 15
LR = 0.05
LEARN2LEARN = "learn2learn.algorithms.maml"


def mlp_problem(size: Size) -> Problem:
    """Return the MLP with 25 + 25 random images a task."""
    generator = torch.Generator().manual_seed(0)
    train, valid = (images((size.tasks, NUM_EXAMPLES), WIDTHS[-1], generator, size.torch_dtype) for _ in range(2))
    return Problem(*mlp(WIDTHS, nn.ReLU, size.torch_dtype), train, valid)


def narrow_problem(size: Size) -> Problem:
    """Return an MLP with one hidden layer of ``units``, 10 + 10 random images a task."""
    generator = torch.Generator().manual_seed(0)
    train, valid = (images((size.tasks, 10), WIDTHS[-1], generator, size.torch_dtype) for _ in range(2))
    return Problem(*mlp((IMAGE**2, size.units, WIDTHS[-1]), nn.ReLU, size.torch_dtype), train, valid)


def conv_problem(size: Size, network: Callable[[torch.dtype], tuple[nn.Module, Forward]] = conv) -> Problem:
    """Return the convolutional network with 1 + 15 random images a class."""
    generator = torch.Generator().manual_seed(0)

    def draw(per_class: int) -> tuple[Tensor, Tensor]:
        flat, _ = images((size.tasks, CONV_WAYS * per_class), CONV_WAYS, generator, size.torch_dtype)
        classes = torch.arange(CONV_WAYS).repeat_interleave(per_class).expand(size.tasks, -1)
        return flat.unflatten(-1, (1, IMAGE, IMAGE)), classes.contiguous()

    return Problem(*network(size.torch_dtype), draw(SHOTS), draw(QUERIES))


def pooled_first_problem(size: Size) -> Problem:
    """Return the same problem, computed in another order."""
    return conv_problem(size, conv_pooled_first)


Pose = Callable[[Size], Problem]
Estimate = Callable[[int], GradientEstimator]


def ours(pose: Pose, estimator: Estimate = Unrolled, execution: Execution | None = None) -> Callable[[Size], Call]:
    """Return how this library computes it."""

    def build(size: Size) -> Call:
        problem = pose(size)
        rule = rules.make("maml", template=problem.start, lr=LR)
        family, generator = Stored(problem), torch.Generator().manual_seed(0)
        loop = InnerLoop(family, rule, execution or Execution())
        warnings.simplefilter("error", CompileWarning)  # what falls back to the plain loop is not to pass for compiled
        theta, tasks = rule.init_theta(generator), family.sample(size.tasks, generator)

        def call() -> list[Tensor]:
            estimate = estimator(size.steps).estimate(loop, theta, FinalLoss(), loop.start(tasks))
            return list(estimate.grads.values())

        return call

    return build


def plain(pose: Pose) -> Callable[[Size], Call]:
    """Return the loop that one writes by hand."""

    def build(size: Size) -> Call:
        problem = pose(size)

        def call() -> list[Tensor]:
            start = [p.detach().requires_grad_() for p in problem.start.values()]
            total = [torch.zeros_like(p) for p in start]
            for task in range(size.tasks):
                params: Sequence[Tensor] = start
                for _ in range(size.steps):
                    loss = problem.loss(params, at(problem.train, task))
                    grads = torch.autograd.grad(loss, params, create_graph=True)
                    params = [p - LR * g for p, g in zip(params, grads, strict=True)]
                value = problem.loss(params, at(problem.valid, task)) / size.tasks
                for sum_, grad in zip(total, torch.autograd.grad(value, start), strict=True):
                    sum_ += grad
            return total

        return call

    return build


def higher(pose: Pose) -> Callable[[Size], Call]:
    """Return higher's inner-loop context (Grefenstette et al. 2019)."""

    def build(size: Size) -> Call:
        package, problem = peer("higher"), pose(size)
        module = problem.module
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)

        def call() -> list[Tensor]:
            module.zero_grad()
            for task in range(size.tasks):
                with package.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (patched, moving):
                    for _ in range(size.steps):
                        moving.step(_loss(patched, at(problem.train, task)))
                    (_loss(patched, at(problem.valid, task)) / size.tasks).backward()
            return _grads(module)

        return call

    return build


def kept(build: Callable[[Size], Call]) -> Callable[[Size], Call]:
    """Return a competitor with the allocator set up as this library does it for itself."""

    def build_so(size: Size) -> Call:
        keep_freed_memory()
        return build(size)

    return build_so


def torchopt(pose: Pose) -> Callable[[Size], Call]:
    """Return TorchOpt's differentiable optimizer (Ren et al. 2023)."""

    def build(size: Size) -> Call:
        package, problem = peer("torchopt"), pose(size)
        module = problem.module
        leaves = list(module.parameters())

        def call() -> list[Tensor]:
            module.zero_grad()
            optimizer = package.MetaSGD(module, lr=LR)
            start = [package.extract_state_dict(x, by="reference") for x in (module, optimizer)]
            for task in range(size.tasks):
                for _ in range(size.steps):
                    optimizer.step(_loss(module, at(problem.train, task)))
                (_loss(module, at(problem.valid, task)) / size.tasks).backward()
                for x, state in zip((module, optimizer), start, strict=True):
                    package.recover_state_dict(x, state)
            return [_grad(p) for p in leaves]

        return call

    return build


def learn2learn(pose: Pose) -> Callable[[Size], Call]:
    """Return learn2learn's MAML (Arnold et al. 2020)."""

    def build(size: Size) -> Call:
        package, problem = peer(LEARN2LEARN), pose(size)
        module = problem.module
        maml = package.MAML(module, lr=LR)

        def call() -> list[Tensor]:
            module.zero_grad()
            for task in range(size.tasks):
                learner = maml.clone()
                for _ in range(size.steps):
                    learner.adapt(_loss(learner, at(problem.train, task)))
                (_loss(learner, at(problem.valid, task)) / size.tasks).backward()
            return _grads(module)

        return call

    return build


def _loss(network: Any, examples: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(network(examples[0]), examples[1])


def _grads(module: nn.Module) -> list[Tensor]:
    return [_grad(p) for p in module.parameters()]


def _grad(p: Tensor) -> Tensor:
    if p.grad is None:
        raise RuntimeError("a parameter got no gradient")
    return p.grad


def _peers(pose: Pose) -> dict[str, Competitor]:
    return {
        "higher": Competitor(higher(pose), "higher"),
        "torchopt": Competitor(torchopt(pose), "torchopt"),
        "learn2learn": Competitor(learn2learn(pose), LEARN2LEARN),
        "plain autograd": Competitor(plain(pose)),
    }


def _segments(pose: Pose, *lengths: int) -> dict[str, Competitor]:
    def shortened(length: int) -> Estimate:
        return lambda steps: Unrolled(steps, segment=length)

    return {f"learnedopt, segments of {n}": Competitor(ours(pose, shortened(n))) for n in lengths}


_COMPILED = Competitor(ours(mlp_problem, execution=Execution(compile=True)), warm_at_size=True)
_MLP_TEXT = (
    "MLP 784-256-128-64-5 with ReLU, learned start, gradient descent with a fixed rate, 25 + 25 random images a task."
)
_CONV_TEXT = (
    "Four blocks of 64 3x3 filters, batch normalisation on batch statistics, ReLU, 2x2 pooling; 5-way 1-shot, 15 "
    "queries a class, random images. *Pooled first*: ReLU after pooling, which is equal, and channels last."
)
WORKLOADS = {
    "maml-mlp": Workload(
        "MAML, MLP, 16 tasks, 5 steps",
        _MLP_TEXT,
        Size(steps=5, tasks=16),
        Size(steps=5, tasks=2),
        {
            "learnedopt": Competitor(ours(mlp_problem)),
            **_peers(mlp_problem),
            "higher, memory kept": Competitor(kept(higher(mlp_problem)), "higher"),
        },
        "plain autograd",
    ),
    "maml-mlp-compiled": Workload(
        "MAML, MLP, 16 tasks, 5 steps, compiled",
        _MLP_TEXT + " `Execution(compile=True)`.",
        Size(steps=5, tasks=16),
        Size(steps=2, tasks=2),
        {
            "learnedopt, compiled": _COMPILED,
            "learnedopt": Competitor(ours(mlp_problem)),
            "higher": Competitor(higher(mlp_problem), "higher"),
            "torchopt": Competitor(torchopt(mlp_problem), "torchopt"),
            "plain autograd": Competitor(plain(mlp_problem)),
            "learn2learn": Competitor(learn2learn(mlp_problem), LEARN2LEARN),
            **peers_jax.rows(lambda size, remat: peers_jax.maml(mlp_problem(size), size, LR, remat=remat)),
        },
        "plain autograd",
    ),
    "maml-conv": Workload(
        "MAML, convolutions, 2 tasks, 5 steps",
        _CONV_TEXT,
        Size(steps=5, tasks=2),
        Size(steps=3, tasks=1),
        {
            "learnedopt": Competitor(ours(conv_problem)),
            "learnedopt, pooled first": Competitor(ours(pooled_first_problem)),
            **_peers(conv_problem),
            "higher, pooled first": Competitor(higher(pooled_first_problem), "higher"),
            "higher, memory kept": Competitor(kept(higher(conv_problem)), "higher"),
        },
        "plain autograd",
    ),
    "maml-conv-16": Workload(
        "MAML, convolutions, 2 tasks, 16 steps, memory",
        _CONV_TEXT + " Segments run their steps again on the way back, mixed mode the gradients.",
        Size(steps=16, tasks=2),
        Size(steps=5, tasks=1),
        {
            **_segments(conv_problem, 1, 4),
            "learnedopt, mixed mode": Competitor(ours(conv_problem, execution=Execution(mixed_mode=True))),
            "learnedopt": Competitor(ours(conv_problem)),
            "learnedopt, pooled first, segments of 1": Competitor(
                ours(pooled_first_problem, lambda steps: Unrolled(steps, segment=1))
            ),
            "higher": Competitor(higher(conv_problem), "higher"),
        },
        "higher",
    ),
}
