"""Convex problems, and deterministic methods that minimise them: what studies of meta-gradients set side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import FinalLoss
from learnedopt.core.rule import UpdateRule
from learnedopt.core.task import TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.core.weights import WeightsName
from learnedopt.estimators.unrolled import Truncated
from learnedopt.meta_optimizers.dual_averaging import DualAveraging, LastGradient
from learnedopt.training.tracker import Metrics, NullTracker
from learnedopt.training.trainer import MetaTrainer
from learnedopt.training.validation import task_generator

KINDS = ("power", "geometric", "breast-cancer", "digits")
RATES = (0.25, 0.5, 1.0, 2.0, 3.5)
MOMENTA = (0.8, 0.9, 0.95, 0.97, 0.99, 0.997, 0.999)
ADAGRAD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Problem(NamedTuple):
    """A family of one problem f, the same in every task of a seed: L, min f, and ``‖x_0 - x*‖²``."""

    family: TaskFamily
    seed: int
    smoothness: float
    minimum: float
    squared_distance: float

    def tasks(self) -> Tasks:
        """Return the one task, as a meta-training of the seed draws it."""
        return self.family.sample(1, task_generator(self.seed, 0))


class Found(NamedTuple):
    """``losses``: f at the points where evaluations 1 to T take the gradient; and the settings that were tuned."""

    losses: list[float]
    settings: dict[str, float]


Minimise: TypeAlias = Callable[[Problem, int], Found]
"""Minimises a problem by so many evaluations."""


# Problems


def make_problem(name: str, dim: int, seed: int) -> Problem:
    """Return the problem that a name such as "power:3" stands for.

    Args:
        name: ``kind:number``. "power:3" is a quadratic with eigenvalues i^-3, "geometric:4" one whose eigenvalues fall
            geometrically to 10^-4, both in a random basis; "breast-cancer:1e-3" and "digits:1e-3" (is the digit even?)
            are logistic regressions with L2 of 1e-3, on points out of scikit-learn.
        dim: of a quadratic.
        seed: of a quadratic's basis and solution.

    Raises:
        ImportError: scikit-learn is not installed, and the problem takes its points from it.
        ValueError: there is no such problem.
    """
    from learnedopt.tasks import RegularizedLogistic, SpectralQuadratic

    kind, number = parsed(name)
    if kind in ("power", "geometric"):
        family = SpectralQuadratic(dim, "power" if kind == "power" else "geometric", number, True, dtype="float64")
        return Problem(family, seed, 1.0, 0.0, float(dim))
    family = RegularizedLogistic(*_points(kind), number)
    solution, minimum = _solve(family)
    return Problem(family, seed, family.smoothness(), minimum, float(solution.square().sum()))


def parsed(name: str) -> tuple[str, float]:
    """Return the kind and the number of a problem's name; ValueError where it is none."""
    kind, _, text = name.partition(":")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind not in KINDS or not (number > 0 and math.isfinite(number)):
        raise ValueError(
            f"problem {name!r} is not of the form kind:number with a positive number and a kind of {', '.join(KINDS)}, "
            "such as 'power:3' or 'digits:1e-3'"
        )
    return kind, number


def _points(kind: str) -> tuple[Tensor, Tensor]:
    """Return standardised features with a column of ones, and labels, in float64."""
    try:
        from sklearn import datasets  # pyright: ignore[reportMissingImports, reportMissingTypeStubs] - no types
    except ImportError as error:
        raise ImportError(
            f"the problem {kind!r} takes its points from scikit-learn, which is not installed: pip install "
            "scikit-learn, or name other problems"
        ) from error
    load: Any = {"breast-cancer": datasets.load_breast_cancer, "digits": datasets.load_digits}[kind]
    features, labels = (torch.as_tensor(x, dtype=torch.float64) for x in load(return_X_y=True))
    spread = features.std(0, correction=0)
    # A pixel that is the same everywhere tells nothing: it stays at 0.
    inputs = (features - features.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1), (labels % 2 == 0).double()


def _solve(family: TaskFamily) -> tuple[Tensor, float]:
    """Return the minimiser and the minimum by Newton's method with dense matrices, steps halved where f rises."""
    tasks = family.sample(1, task_generator(0, 0))
    batch = tree.squeeze(family.batch(tasks, 0, "train"))
    (name, start), = family.init_params(tasks).items()  # fmt: skip

    def loss(x: Tensor) -> Tensor:
        return family.loss({name: x}, batch)

    # torch gives it no types.
    solve = cast("Callable[..., Tensor]", torch.linalg.solve)  # pyright: ignore[reportUnknownMemberType]
    x = start[0]
    for _ in range(50):
        gradient, hessian = torch.func.grad(loss)(x), torch.func.jacrev(torch.func.grad(loss))(x)
        step, length = solve(hessian, gradient), 1.0
        while length > 1e-6 and loss(x - length * step) > loss(x):
            length /= 2
        x = x - length * step
    left, first = (tree.length(torch.func.grad(loss)(point)) for point in (x, start[0]))
    if not left <= 1e-13 * first.clamp(min=1):
        raise RuntimeError(f"Newton's method did not solve {family!r}; its gradient is {left:.1e}")
    return x, float(loss(x))


# Methods


class _Losses(NullTracker):
    """Notes the meta-loss of every meta-step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, metrics: Metrics, step: int) -> None:
        self.values.append(float(metrics["meta_loss"]))  # pyright: ignore[reportArgumentType]


def _meta_gradients(weights: WeightsName, rate: float, hint: LastGradient | None = None) -> Minimise:
    """Return the method of one-step meta-gradients by dual averaging; ``rate`` is β L."""

    def minimise(problem: Problem, num_steps: int) -> Found:
        from learnedopt.optimizers import Averaged, Iterate

        template = tree.squeeze(problem.family.init_params(problem.tasks()))
        loop = InnerLoop(problem.family, Averaged(Iterate(template), weights))
        beta, losses = rate / problem.smoothness, _Losses()
        trainer = MetaTrainer(
            loop, Truncated(1), FinalLoss(), lambda p: DualAveraging(p, beta, weights, hint), losses, seed=problem.seed
        )
        trainer.run(num_steps)
        return Found(losses.values, {"beta": beta})

    return minimise


def _rule(make: Callable[[], UpdateRule], grid: Mapping[str, Sequence[float]], scaled: bool = True) -> Minimise:
    """Return the method of a rule at the best point of a grid of its theta; ``scaled``: ``lr`` is in units of 1/L."""

    def minimise(problem: Problem, num_steps: int) -> Found:
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        if scaled:
            points = [{**point, "lr": point["lr"] / problem.smoothness} for point in points]
        theta = {k: torch.tensor([point[k] for point in points], dtype=torch.float64) for k in grid}
        # One theta a task: all points of the grid run side by side.
        loop = InnerLoop(problem.family, make(), Execution(chunk_size=len(points)))
        tasks = tree.tree_map(lambda x: x.expand(len(points), *x.shape[1:]), problem.tasks())
        carry = loop.start(tasks)
        losses = loop.run(theta, carry, num_steps, Tape.NONE, theta_per_task=True).losses
        best = int(losses[-1].nan_to_num(torch.inf).argmin())
        return Found(tree.numbers(losses[:, best]), points[best])

    return minimise


def _descent() -> UpdateRule:
    from learnedopt.optimizers import SGD

    return SGD(learn=("lr",))


def _momentum() -> UpdateRule:
    from learnedopt.optimizers import Momentum

    return Momentum(learn=("lr", "momentum"))


class _WithRate(UpdateRule):
    """A rule whose theta is its rate."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.ones((), dtype=torch.float64)}


class _Nesterov(_WithRate):
    """``x' = y - lr ∇f(y);  y' = x' + (t-1)/(t+2) (x' - x)`` with the parameters at y (Nesterov 1983)."""

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"x": params, "step": torch.zeros((), dtype=torch.float64)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        step = state["step"] + 1
        x = {k: p - theta["lr"] * grads[k] for k, p in params.items()}
        ahead = {k: (step - 1) / (step + 2) * (x[k] - state["x"][k]) for k in x}
        return {k: x[k] + ahead[k] - p for k, p in params.items()}, {"x": x, "step": step}


class _AdaGrad(_WithRate):
    """``x' = x - lr g / sqrt(Σ g²)`` for each coordinate (Duchi et al. 2011); 0 where there was no gradient."""

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {k: torch.zeros_like(p) for k, p in params.items()}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        sums = {k: state[k] + g.square() for k, g in grads.items()}
        return {k: -theta["lr"] * torch.where(sums[k] > 0, g * sums[k].rsqrt(), 0.0) for k, g in grads.items()}, sums


METHODS: dict[str, Minimise] = {
    "gradient descent": _rule(_descent, {"lr": (1.0,)}),
    "momentum": _rule(_momentum, {"lr": RATES, "momentum": MOMENTA}),
    "Nesterov": _rule(_Nesterov, {"lr": (1.0,)}),
    "AdaGrad": _rule(_AdaGrad, {"lr": ADAGRAD_RATES}, scaled=False),
    "plain": _meta_gradients("constant", 1.0),
    "plain, linear weights": _meta_gradients("linear", 0.25),
    "optimistic": _meta_gradients("linear", 0.25, LastGradient()),
}
"""Method -> what minimises a problem by it."""
