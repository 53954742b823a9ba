"""The two linear systems of implicit differentiation: the optimality condition's, and the step map's.

Each is built once at the inner solution, with one retained graph from which every product is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import Carry, InnerLoop, Tape, pull
from learnedopt.core.tree import Theta


class System(ABC):
    """``A u = rhs`` at a chunk's inner solution ``end``, and the way from ``u`` to a gradient of theta."""

    end: Carry
    symmetric: bool = False
    """Whether the operator is symmetric whatever the problem."""

    @abstractmethod
    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record the graph at ``end``; ``theta`` must be leaves."""

    @abstractmethod
    def right_hand_side(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Return (num_tasks, dim) for cotangents of the parameters, each (num_tasks, ...)."""

    @abstractmethod
    def operator(self, rows: Tensor) -> Tensor:
        """Apply each task's operator to its row of ``rows`` (num_tasks, dim)."""

    @abstractmethod
    def pull_back(self, solution: Tensor) -> Theta:
        """Return the gradient of theta, summed over the chunk's tasks, for the system's solution."""

    @abstractmethod
    def stationarity(self) -> Tensor:
        """Return how far each task (num_tasks,) is from its solution; dimensionless, 0 at the solution."""

    def vanishing(self) -> list[str]:
        """Return the meta-parameters that do not move the solution, as far as the end shows; none by default."""
        return []


class OptimalitySystem(System):
    """``grad(loss + regularizer) = 0``: the operator is the Hessian, symmetric."""

    symmetric = True

    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record the gradient's graph."""
        self.end, self.theta = end, theta
        task_map = TaskMap(tree.size(end.params))
        batch = task_map.unbatch(_last_batch(loop, start, end))
        with torch.enable_grad():
            self.params = [p.detach().requires_grad_() for p in end.params.values()]
            params = task_map.unbatch(dict(zip(end.params, self.params, strict=True)))
            loss = task_map.apply(loop.family.loss, (), params, batch).sum()
            pulls = task_map.rebatch(pull(loop.rule, task_map, theta, params, create_graph=True))
            self.loss_grads = torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True)
            self.term_grads = [pulls[k] for k in end.params]
            self.grads = [a + b for a, b in zip(self.loss_grads, self.term_grads, strict=True)]

    def right_hand_side(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Return the cotangents as they are."""
        return tree.ravel(cotangents)

    def operator(self, rows: Tensor) -> Tensor:
        """Return Hessian-vector products, by reverse over reverse."""
        return tree.ravel(self._pull(rows, self.params))

    def pull_back(self, solution: Tensor) -> Theta:
        """Return ``-u^T d grad / d theta``."""
        return dict(zip(self.theta, self._pull(-solution, list(self.theta.values())), strict=True))

    def _pull(self, rows: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        cotangents = tree.unravel(rows, self.params)
        return torch.autograd.grad(self.grads, wanted, cotangents, retain_graph=True, materialize_grads=True)

    def stationarity(self) -> Tensor:
        """Return ``|grad(loss + regularizer)| / (|grad loss| + |grad regularizer|)``."""
        total, loss, term = (tree.ravel(g).detach().norm(dim=1) for g in (self.grads, self.loss_grads, self.term_grads))
        # Compared with ==, so that what is not finite is reported as NaN and not as solved.
        return torch.where(total == 0, 0.0, total / torch.where(total == 0, 1.0, loss + term))


class PublishedSystem(OptimalitySystem):
    """``OptimalitySystem`` with the operator of iMAML's published code in place of the Hessian.

    With H the Hessian of the loss alone and lambda the regularizer's weight, the exact gradient of the start is
    ``(I + H/lambda)^-1 v``, ``v = d objective/d params``; the code solves ``(1 + 1) I + H/(lambda + 10)`` instead.

    Raises:
        ValueError: the regularizer is not ``lambda/2 |params - start|^2`` with one lambda for all coordinates.
    """

    damping = 1.0
    offset = 10.0

    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record the gradient's graph, and read lambda off the regularizer."""
        super().__init__(loop, theta, start, end)
        # Different numbers, so that a curvature that mixes coordinates shows as one that varies.
        flat = tree.ravel(self.params).detach()
        probe = torch.linspace(1.0, 2.0, flat.shape[1], dtype=flat.dtype, device=flat.device).expand_as(flat)
        cotangents = tree.unravel(probe, self.params)
        found = torch.autograd.grad(self.term_grads, self.params, cotangents, retain_graph=True, materialize_grads=True)
        ratios = tree.ravel(found) / probe
        self.strength = ratios.mean(1, keepdim=True)
        if not torch.allclose(ratios, self.strength, rtol=torch.finfo(ratios.dtype).eps ** 0.5, atol=0.0):
            raise ValueError(
                "the published operator is for a proximal term with one strength, but this regularizer's curvature "
                f"goes from {float(ratios.min()):.3g} to {float(ratios.max()):.3g} over the coordinates; use "
                'operator="exact"'
            )

    def operator(self, rows: Tensor) -> Tensor:
        """Return the code's products, times lambda, which ``pull_back`` multiplies in again."""
        of_loss = super().operator(rows) - self.strength * rows
        return self.strength * ((1 + self.damping) * rows + of_loss / (self.strength + self.offset))


class StepMapSystem(System):
    """``z = Phi(z, theta)`` on ``z = (params, floating-point state)``: the operator is ``(I - dPhi/dz)^T``."""

    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record one step's graph at the end, and measure the first step for scale."""
        self.loop, self.theta, self.start, self.end = loop, theta, start, end
        self.num_params = len(end.params)
        self.z, self.image = _step(loop, theta, start, end)
        z, image = _step(loop, theta, start, start)
        self.first_step = (tree.ravel(image) - tree.ravel(z)).detach().norm(dim=1)
        self.last_step = (tree.ravel(self.image) - tree.ravel(self.z)).detach().norm(dim=1)

    def right_hand_side(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Return the cotangents, with zeros for the state."""
        return tree.ravel([*cotangents, *[torch.zeros_like(x) for x in self.z[self.num_params :]]])

    def operator(self, rows: Tensor) -> Tensor:
        """Return ``(I - dPhi/dz)^T`` times each row."""
        return rows - tree.ravel(self._pull(rows, self.z))

    def pull_back(self, solution: Tensor) -> Theta:
        """Return ``u^T d Phi / d theta``."""
        return dict(zip(self.theta, self._pull(solution, list(self.theta.values())), strict=True))

    def _pull(self, rows: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        pairs = [(y, c) for y, c in zip(self.image, tree.unravel(rows, self.z), strict=True) if y.requires_grad]
        images, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(images, wanted, cotangents, retain_graph=True, materialize_grads=True)

    def stationarity(self) -> Tensor:
        """Return the length of a step at the end against that of the first."""
        noise = self._round_off()
        still = self.last_step <= noise  # False for what is not finite, which is then reported as NaN
        return torch.where(still, 0.0, self.last_step / torch.where(still, 1.0, torch.maximum(self.first_step, noise)))

    def vanishing(self) -> list[str]:
        """Return the meta-parameters whose effect on the step vanishes as the step itself does, as a rate's does.

        Their effect at the end, against that one step after the start, is no larger than the end's own step against
        the step there: the gradient is then within the stationarity error of zero, whatever theta's scale.
        """
        near_start = self.loop.run(tree.detach(self.theta), self.start, 1, Tape.NONE).end
        begun, reference = _step(self.loop, self.theta, self.start, near_start)
        length = (tree.ravel(reference) - tree.ravel(begun)).detach().norm()
        if not length > self._round_off().norm():
            return []  # one step solves the problem: there is no step to compare with
        ratio = (self.last_step + self._round_off()).norm() / length
        near, here = self._effects(reference), self._effects(self.image)
        return sorted(k for k in self.theta if bool((here[k] <= 5 * ratio * near[k]) & (near[k] > 0)))

    def _effects(self, image: list[Tensor]) -> dict[str, Tensor]:
        """Return each meta-parameter's effect on the step map's image, up to a common factor, by random probes."""
        squares = {k: torch.zeros(()) for k in self.theta}
        for probe in range(8):
            directions = _random_like(dict(enumerate(image)), probe)
            pairs = [(x, directions[i]) for i, x in enumerate(image) if x.requires_grad]
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, list(self.theta.values()), cotangents, retain_graph=True, materialize_grads=True
            )
            squares = {k: squares[k] + g.square().sum() for (k, g) in zip(self.theta, found, strict=True)}
        return {k: v.sqrt() for k, v in squares.items()}

    def _round_off(self) -> Tensor:
        """Return the length (num_tasks,) below which a step is not seen."""
        return torch.finfo(self.last_step.dtype).eps * tree.ravel(self.z).detach().norm(dim=1)


def require_solution_moves(loop: InnerLoop, theta: Theta, begun: Carry, system: type[System]) -> None:
    """Check once, before the inner run, that every meta-parameter can move the solution, and that there is one.

    A step map that rests wherever the gradient is zero, as descent does, has the stationary points of the loss as its
    fixed points: what does not move an update there moves no solution. Of other maps only a missing path is certain.

    Raises:
        ValueError: a meta-parameter structurally does not move the solution; the step map depends on a counter.
    """
    key = ("moves", system)
    if key in loop.vetted:
        return
    task_map = TaskMap(1)
    params, state = (tree.detach(task_map.unbatch(tree.narrow(x, 0, 1))) for x in (begun.params, begun.state))
    if system is StepMapSystem:
        _refuse_counter(loop, theta, params, state)
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    with torch.enable_grad():
        moved = _random_like(params, 0)
        params = {k: (p + moved[k]).requires_grad_() for k, p in params.items()}
        if issubclass(system, OptimalitySystem):
            outputs, rests = list(pull(loop.rule, task_map, leaves, params, create_graph=True).values()), True
        else:
            _, settled = tree.detach(_step_without_loss(loop, leaves, params, state))  # flags have settled there
            image = _step_without_loss(loop, leaves, params, settled)
            outputs = [x for x in tree.leaves(image) if x.is_floating_point()]
            rests = all(map(torch.equal, tree.leaves(image), tree.leaves((params, settled))))
        directions = _random_like(dict(enumerate(outputs)), 1)
        terms = [(x * directions[i]).sum() for i, x in enumerate(outputs) if x.requires_grad]
        found = torch.autograd.grad(terms, list(leaves.values()), allow_unused=True) if terms else [None] * len(leaves)
    still = sorted(k for k, g in zip(leaves, found, strict=True) if g is None or (rests and not g.any()))
    if still:
        raise ValueError(does_not_move(still, "the update at zero gradient does not depend on it"))
    loop.vetted[key] = True


def _step_without_loss(
    loop: InnerLoop, theta: Theta, params: tree.Params, state: tree.Tree
) -> tuple[tree.Params, tree.Tree]:
    """Take one task's step as if the loss were flat: the regularizer alone pulls, where there is one."""
    if loop.rule.has_regularizer:
        pulls = pull(loop.rule, TaskMap(1), theta, params, create_graph=True)
    else:
        pulls = {k: torch.zeros_like(p) for k, p in params.items()}
    return loop.move(TaskMap(1), theta, pulls, state, params, next(iter(params.values())).new_zeros(()))


def _refuse_counter(loop: InnerLoop, theta: Theta, params: tree.Params, state: tree.Tree) -> None:
    """Refuse a state that goes on by the same amount at every update, though nothing moves: a counter."""
    task_map, zeros, seen = TaskMap(1), {k: torch.zeros_like(p) for k, p in params.items()}, [tree.leaves(state)]
    with torch.no_grad():
        for _ in range(2):
            _, state = loop.move(task_map, theta, zeros, state, params, next(iter(zeros.values())).new_zeros(()))
            seen.append(tree.leaves(state))
    for before, between, after in zip(*seen, strict=True):
        if before.dtype is torch.bool:  # a flag
            continue
        step = between - before
        if step.any() and torch.equal(after - between, step):
            raise ValueError(
                f"{type(loop.rule).__name__} counts its steps, and a step that depends on a counter has no fixed point "
                "to differentiate; give the rule a regularizer, so that the optimality condition defines the "
                "solution, or use an unrolled estimator"
            )


def does_not_move(names: Sequence[str], why: str) -> str:
    """Return the message for meta-parameters that do not move the solution."""
    return (
        f"the meta-parameters {list(names)} do not move the solution of the inner problem ({why}), so an implicit "
        "meta-gradient of them is zero; fix them, or use an unrolled estimator, which sees the path"
    )


def _random_like(tensors: dict, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for k, x in tensors.items()}


def _last_batch(loop: InnerLoop, start: Carry, end: Carry) -> tree.Tree:
    """Return the train batch that the last step saw: the one that the solution is a solution of."""
    return loop.batch(end.tasks, max(end.step - 1, start.step), "train")


def _step(loop: InnerLoop, theta: Theta, start: Carry, at: Carry) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``z`` as leaves and ``Phi(z, theta)`` with its graph, each (num_tasks, ...), without integer states."""
    task_map = TaskMap(tree.size(at.params))
    with torch.enable_grad():
        flat, rebuild = tree.flatten((at.params, at.state))
        flat = [x.detach().requires_grad_(x.is_floating_point()) for x in flat]
        params, state = task_map.unbatch(rebuild(flat))
        batch = task_map.unbatch(_last_batch(loop, start, at))
        loss, grads, params = loop.gradient(task_map, theta, params, batch, Tape.FULL)
        image = tree.leaves(task_map.rebatch(loop.move(task_map, theta, grads, state, params, loss)))
    kept = [i for i, x in enumerate(flat) if x.is_floating_point()]
    return [flat[i] for i in kept], [image[i] for i in kept]
