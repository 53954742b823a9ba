"""The two linear systems of implicit differentiation: the optimality condition's, and the step map's.

Each is built once at the inner solution, with one retained graph from which every product is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_gradient import StepGradient, step_gradient
from learnedopt.core.tree import Theta
from learnedopt.estimators.solution import random_like


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

    def of_start(self, solution: Tensor, cotangents: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the cotangents of the start's parameters, each (num_tasks, ...); None where no start counts."""
        return None

    def vanishing(self) -> list[str]:
        """Return the meta-parameters that do not move the solution, as far as the end shows; none by default."""
        return []


class OptimalitySystem(System):
    """``grad(inner objective) = 0``: the operator is the Hessian, symmetric."""

    symmetric = True
    theta: Theta
    params: list[Tensor]
    grads: list[Tensor]
    term_grads: list[Tensor]
    scale: Tensor

    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record the gradient's graph; without a penalty, measure the gradient at the start for scale."""
        self.end = end
        self.theta = theta
        self.params, found = _gradient(loop, theta, start, end)
        self.grads = list(found.grads.values())
        if found.penalty is None:
            _, first = _gradient(loop, tree.detach(theta), start, start, Tape.NONE)
            self.scale = _norm(list(first.grads.values()))
        else:
            self.term_grads = list(found.penalty.values())
            of_loss = [g.detach() - t.detach() for g, t in zip(self.grads, self.term_grads, strict=True)]
            self.scale = _norm(of_loss) + _norm(self.term_grads)

    def right_hand_side(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Return the cotangents as they are."""
        return tree.ravel(cotangents)

    def operator(self, rows: Tensor) -> Tensor:
        """Return Hessian-vector products, by reverse over reverse."""
        return tree.ravel(self._cotangents(rows, self.params))

    def pull_back(self, solution: Tensor) -> Theta:
        """Return ``-u^T d grad / d theta``."""
        return dict(zip(self.theta, self._cotangents(-solution, list(self.theta.values())), strict=True))

    def _cotangents(self, rows: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        cotangents = tree.unravel(rows, self.params)
        return torch.autograd.grad(self.grads, wanted, cotangents, retain_graph=True, materialize_grads=True)

    def stationarity(self) -> Tensor:
        """Return ``|grad(loss + penalty)| / (|grad loss| + |grad penalty|)``; without one, against the start's."""
        total = _norm(self.grads)
        # Compared with ==, so that what is not finite is reported as NaN and not as solved.
        return torch.where(total == 0, 0.0, total / torch.where(total == 0, 1.0, self.scale))


class PublishedSystem(OptimalitySystem):
    """``OptimalitySystem`` with the operator of iMAML's published code in place of the Hessian.

    With H the Hessian of the loss alone and lambda the penalty's weight, the exact gradient of the start is
    ``(I + H/lambda)^-1 v``, ``v = d objective/d params``; the code solves ``(1 + 1) I + H/(lambda + 10)`` instead.

    Raises:
        ValueError: the penalty is not ``lambda/2 |params - start|^2`` with one lambda for all coordinates.
    """

    damping: float = 1.0
    offset: float = 10.0
    strength: Tensor

    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record the gradient's graph, and read lambda off the penalty."""
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
                "the published operator is for a proximal term with one strength, but this penalty's curvature "
                f"goes from {float(ratios.min()):.3g} to {float(ratios.max()):.3g} over the coordinates; use "
                'operator="exact"'
            )

    def operator(self, rows: Tensor) -> Tensor:
        """Return the code's products, times lambda, which ``pull_back`` multiplies in again."""
        of_loss = super().operator(rows) - self.strength * rows
        return self.strength * ((1 + self.damping) * rows + of_loss / (self.strength + self.offset))


class StepMapSystem(System):
    """``z = Phi(z, theta)`` on ``z = (params, floating-point state)``: the operator is ``(I - dPhi/dz)^T``.

    A coordinate of the parameters that no step moves, such as a body of which the head alone adapts, is no unknown: it
    is the start itself, and its cotangent goes to whatever the start depends on.
    """

    loop: InnerLoop
    theta: Theta
    start: Carry
    num_params: int
    z: list[Tensor]
    image: list[Tensor]
    first_step: Tensor
    last_step: Tensor
    free: Tensor
    all_free: bool

    def __init__(self, loop: InnerLoop, theta: Theta, start: Carry, end: Carry) -> None:
        """Record one step's graph at the end, and measure the first step for scale."""
        self.loop, self.theta, self.start = loop, theta, start
        self.end = end
        self.num_params = len(end.params)
        self.z, self.image = _step(loop, theta, start, end)
        z, image = _step(loop, theta, start, start)
        self.first_step = tree.row_lengths((tree.ravel(image) - tree.ravel(z)).detach())
        self.last_step = tree.row_lengths((tree.ravel(self.image) - tree.ravel(self.z)).detach())
        params = zip(start.params.values(), end.params.values(), self.image, strict=False)
        moved = [(first != last) | (image != last) for first, last, image in params]
        whole = [torch.ones_like(x, dtype=torch.bool) for x in self.z[self.num_params :]]
        self.free = tree.ravel([*moved, *whole])
        if not self.free.all():  # it may as well have started where it ends: what stays wherever it is put is still
            self.free = self.free | ~self._stays()
        self.all_free = bool(self.free.all())

    def _stays(self) -> Tensor:
        """Return which coordinates a step leaves where a small move has put them."""
        moves = random_like(self.end.params, 5)
        params = {k: p + moves[k] * (1 + p.abs()) * 1e-2 for k, p in self.end.params.items()}
        z, image = _step(self.loop, tree.detach(self.theta), self.start, self.end._replace(params=params))
        return tree.ravel(image) == tree.ravel(z)

    def right_hand_side(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Return the cotangents of what moves, with zeros for the state."""
        return self._only_free(tree.ravel([*cotangents, *[torch.zeros_like(x) for x in self.z[self.num_params :]]]))

    def operator(self, rows: Tensor) -> Tensor:
        """Return ``(I - dPhi/dz)^T`` times each row, the identity for what does not move."""
        rows_of_free = self._only_free(rows)
        return rows - self._only_free(tree.ravel(self._cotangents(rows_of_free, self.z)))

    def pull_back(self, solution: Tensor) -> Theta:
        """Return ``u^T d Phi / d theta``."""
        return dict(zip(self.theta, self._cotangents(solution, list(self.theta.values())), strict=True))

    def of_start(self, solution: Tensor, cotangents: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the cotangents of what has not moved, for those of the parameters and the system's solution."""
        if self.all_free:
            return None
        through = tree.ravel(self._cotangents(solution, self.z[: self.num_params]))
        still = ~self.free[:, : through.shape[1]]
        rows = torch.where(still, through + tree.ravel(cotangents), 0.0)
        return tree.unravel(rows, self.z[: self.num_params])

    def _only_free(self, rows: Tensor) -> Tensor:
        return rows if self.all_free else torch.where(self.free, rows, 0.0)

    def _cotangents(self, rows: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        pairs = [(y, c) for y, c in zip(self.image, tree.unravel(rows, self.z), strict=True) if y.requires_grad]
        images, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(images, wanted, cotangents, retain_graph=True, materialize_grads=True)

    def stationarity(self) -> Tensor:
        """Return the length of a step at the end against that of the first."""
        noise = self._round_off()
        still = self.last_step <= noise  # False for what is not finite, which is then reported as NaN
        return torch.where(still, 0.0, self.last_step / torch.where(still, 1.0, torch.maximum(self.first_step, noise)))

    def constrained(self) -> bool:
        """Whether some coordinate is held where it is: a small move of the parameters either way leaves its image."""
        held = torch.ones_like(self.free)
        moves = random_like(self.end.params, 0)
        for sign in (1.0, -1.0):
            eps = torch.finfo(self.z[0].dtype).eps ** 0.5
            params = {k: p + sign * eps * (1 + p.abs()) * moves[k] for k, p in self.end.params.items()}
            _, image = _step(self.loop, tree.detach(self.theta), self.start, self.end._replace(params=params))
            held &= tree.ravel(image) == tree.ravel(self.image)
        return bool(held[:, : self._num_coordinates()].any())

    def _num_coordinates(self) -> int:
        return sum(x[0].numel() for x in self.z[: self.num_params])

    def vanishing(self) -> list[str]:
        """Return the meta-parameters whose effect on the step vanishes as the step itself does, as a rate's does.

        Their effect at the end, against that one step after the start, is no larger than the end's own step against
        the step there: the gradient is then within the stationarity error of zero, whatever theta's scale.
        """
        if self.constrained():
            return []  # theta may move the solution in other tasks, where this coordinate is free
        near_start = self.loop.run(tree.detach(self.theta), self.start, 1, Tape.NONE).end
        begun, reference = _step(self.loop, self.theta, self.start, near_start)
        length = tree.length((tree.ravel(reference) - tree.ravel(begun)).detach())
        if not length > tree.length(self._round_off()):
            return []  # one step solves the problem: there is no step to compare with
        ratio = tree.length(self.last_step + self._round_off()) / length
        near, here = self._effects(reference), self._effects(self.image)
        return sorted(k for k in self.theta if bool((here[k] <= 5 * ratio * near[k]) & (near[k] > 0)))

    def _effects(self, image: list[Tensor]) -> dict[str, Tensor]:
        """Return each meta-parameter's effect on the step map's image, up to a common factor, by random probes."""
        squares = {k: torch.zeros(()) for k in self.theta}
        for probe in range(8):
            directions = random_like(dict(enumerate(image)), probe)
            pairs = [(x, directions[i]) for i, x in enumerate(image) if x.requires_grad]
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, list(self.theta.values()), cotangents, retain_graph=True, materialize_grads=True
            )
            squares = {k: squares[k] + g.square().sum() for (k, g) in zip(self.theta, found, strict=True)}
        return {k: v.sqrt() for k, v in squares.items()}

    def _round_off(self) -> Tensor:
        """Return the length (num_tasks,) below which a step is not seen."""
        return torch.finfo(self.last_step.dtype).eps * tree.row_lengths(tree.ravel(self.z).detach())


def _last_batch(loop: InnerLoop, start: Carry, end: Carry) -> tree.Tree:
    """Return the train batch that the last step saw: the one that the solution is a solution of."""
    return loop.batch(end.tasks, max(end.step - 1, start.step), "train")


def _gradient(
    loop: InnerLoop, theta: Theta, start: Carry, at: Carry, tape: Tape = Tape.FULL
) -> tuple[list[Tensor], StepGradient]:
    """Return the parameters at ``at`` as leaves, and what is descended there; gradients are (num_tasks, ...)."""
    task_map = TaskMap(tree.size(at.params))
    batch = task_map.unbatch(_last_batch(loop, start, at))
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in at.params.values()]
        params = task_map.unbatch(dict(zip(at.params, leaves, strict=True)))
        found = step_gradient(loop.family, loop.inner_objective, task_map, theta, params, batch, tape)
        penalty = None if found.penalty is None else task_map.rebatch(found.penalty)
        return leaves, found._replace(grads=task_map.rebatch(found.grads), penalty=penalty)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return each task's norm (num_tasks,)."""
    return tree.row_lengths(tree.ravel(tensors).detach())


def _step(loop: InnerLoop, theta: Theta, start: Carry, at: Carry) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``z`` as leaves and ``Phi(z, theta)`` with its graph, each (num_tasks, ...), without integer states."""
    task_map = TaskMap(tree.size(at.params))
    with torch.enable_grad():
        flat, rebuild = tree.flatten((at.params, at.state))
        flat = [x.detach().requires_grad_(x.is_floating_point()) for x in flat]
        params, state = task_map.unbatch(rebuild(flat))
        batch = task_map.unbatch(_last_batch(loop, start, at))
        found = loop.gradient(task_map, theta, params, batch, Tape.FULL)
        image = tree.leaves(task_map.rebatch(loop.move(task_map, theta, found.grads, state, found.params, found.loss)))
    kept = [i for i, x in enumerate(flat) if x.is_floating_point()]
    return [flat[i] for i in kept], [image[i] for i in kept]
