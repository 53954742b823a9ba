"""Implicit MAML: proximal gradient descent, then a few steps of conjugate gradient on its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import Problem, Stored, at
from benchmarks.suite import Call, Competitor, Size, Workload, peer
from benchmarks.workloads_maml import Pose, conv_problem, mlp_problem
from learnedopt import ConjugateGradient, FinalLoss, Implicit, InnerLoop, Proximal
from learnedopt import optimizers as rules

LR, STRENGTH, PRODUCTS = 0.05, 2.0, 5


def ours(pose: Pose) -> Callable[[Size], Call]:
    """Return how this library computes it; with no tolerance for a warning, as nothing is to converge here."""

    def build(size: Size) -> Call:
        problem = pose(size)
        rule = rules.make("maml", template=problem.start, lr=LR)
        family, generator = Stored(problem), torch.Generator().manual_seed(0)
        loop = InnerLoop(family, rule, inner_objective=Proximal(problem.start, STRENGTH))
        theta, tasks = loop.init_theta(generator), family.sample(size.tasks, generator)
        estimator = Implicit(size.steps, ConjugateGradient(PRODUCTS), tolerance=math.inf)

        def call() -> list[Tensor]:
            return list(estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads.values())

        return call

    return build


def _regularised(problem: Problem, params: Sequence[Tensor], start: Sequence[Tensor], task: int) -> Tensor:
    distance = sum((p - s).square().sum() for p, s in zip(params, start, strict=True))
    return problem.loss(params, at(problem.train, task)) + 0.5 * STRENGTH * distance


def plain(pose: Pose, *, retained: bool) -> Callable[[Size], Call]:
    """Return it as written by hand: with one retained graph, or with a new one for each product, as hypertorch does."""

    def build(size: Size) -> Call:
        problem = pose(size)
        start = list(problem.start.values())

        def call() -> list[Tensor]:
            total = [torch.zeros_like(p) for p in start]
            for task in range(size.tasks):
                params = [p.clone().requires_grad_() for p in start]
                for _ in range(size.steps):
                    grads = torch.autograd.grad(_regularised(problem, params, start, task), params)
                    with torch.no_grad():
                        for p, g in zip(params, grads, strict=True):
                            p -= LR * g

                def slopes(at: list[Tensor] = params, which: int = task) -> tuple[Tensor, ...]:
                    return torch.autograd.grad(_regularised(problem, at, start, which), at, create_graph=True)

                kept = slopes() if retained else None

                def product(
                    v: list[Tensor], kept: Any = kept, slopes: Any = slopes, at: Any = params
                ) -> Sequence[Tensor]:
                    return torch.autograd.grad(kept or slopes(), at, v, retain_graph=kept is not None)

                rhs = torch.autograd.grad(problem.loss(params, at(problem.valid, task)) / size.tasks, params)
                # The start enters the gradient of the proximal term alone, by -strength.
                for sum_, u in zip(total, _solve(product, list(rhs)), strict=True):
                    sum_ += STRENGTH * u
            return total

        return call

    return build


def _solve(product: Callable[[list[Tensor]], Sequence[Tensor]], rhs: list[Tensor]) -> list[Tensor]:
    """Take a few steps of conjugate gradient from zero."""
    x, r, p = [torch.zeros_like(b) for b in rhs], rhs, rhs
    rr = _dot(r, r)
    for _ in range(PRODUCTS):
        ap = product(p)
        alpha = rr / _dot(p, ap)
        x = [a + alpha * b for a, b in zip(x, p, strict=True)]
        r = [a - alpha * b for a, b in zip(r, ap, strict=True)]
        rr, before = _dot(r, r), rr
        p = [a + rr / before * b for a, b in zip(r, p, strict=True)]
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def torchopt(pose: Pose) -> Callable[[Size], Call]:
    """Return TorchOpt's implicit differentiation with its own conjugate gradient (Ren et al. 2023)."""

    def build(size: Size) -> Call:
        package, problem = peer("torchopt"), pose(size)
        solver = package.linear_solve.solve_cg(maxiter=PRODUCTS, rtol=0.0, atol=0.0)

        class Inner(package.nn.ImplicitMetaGradientModule, linear_solve=solver):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
            def __init__(self, meta_network: Any) -> None:
                super().__init__()
                self.meta_network = meta_network
                self.network = package.module_clone(meta_network, by="deepcopy", detach_buffers=True)
                with torch.no_grad():
                    for p in self.network.parameters():
                        p.detach_().requires_grad_()

            def objective(self, task: int) -> Tensor:
                inputs, classes = at(problem.train, task)
                loss = torch.nn.functional.cross_entropy(self.network(inputs), classes)
                pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
                return loss + 0.5 * STRENGTH * sum((p - s).square().sum() for p, s in pairs)

            def solve(self, task: int) -> Any:
                params = tuple(self.parameters())
                optimizer = torch.optim.SGD(params, lr=LR)
                with torch.enable_grad():
                    for _ in range(size.steps):
                        optimizer.zero_grad()
                        self.objective(task).backward(inputs=params)
                        optimizer.step()
                return self

        module = problem.module

        def call() -> list[Tensor]:
            module.zero_grad()
            for task in range(size.tasks):
                inner = Inner(module)
                inner.solve(task)
                inputs, classes = at(problem.valid, task)
                (torch.nn.functional.cross_entropy(inner.network(inputs), classes) / size.tasks).backward()
            return [p.grad for p in module.parameters() if p.grad is not None]

        return call

    return build


def _competitors(pose: Pose) -> dict[str, Competitor]:
    return {
        "learnedopt": Competitor(ours(pose)),
        "torchopt": Competitor(torchopt(pose), "torchopt"),
        "plain, graph per product": Competitor(plain(pose, retained=False)),
        "plain, one graph": Competitor(plain(pose, retained=True)),
    }


_TEXT = (
    f"16 steps of gradient descent on loss + {STRENGTH / 2:g} |x - start|^2, {PRODUCTS} steps of conjugate gradient. "
    "*Graph per product*: the gradient's graph is built anew for each Hessian-vector product, as hypertorch does."
)
WORKLOADS = {
    "imaml-mlp": Workload(
        "Implicit MAML, MLP, 16 tasks", _TEXT, Size(steps=16, tasks=16), Size(steps=16, tasks=2),
        _competitors(mlp_problem), "plain, one graph",
    ),
    "imaml-conv": Workload(
        "Implicit MAML, convolutions, 2 tasks", _TEXT, Size(steps=16, tasks=2), Size(steps=16, tasks=1),
        _competitors(conv_problem), "plain, one graph",
    ),
}  # fmt: skip
