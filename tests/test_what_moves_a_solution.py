"""What of theta moves an inner solution, judged over the whole meta-batch and over what is free to move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implicit_oracle import implicit_gradient
from oracles import relative_error
from problems import FLOAT, Both, FromStart, Quadratic, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    GMRES,
    L2,
    ConjugateGradient,
    Execution,
    FinalLoss,
    Implicit,
    InnerLoop,
    LinearSolver,
    Neumann,
    Tasks,
    Theta,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.tree import Params

pytestmark = pytest.mark.usefixtures("float64")

STILL = Quadratic(drift=0.0)
SOLVERS: list[LinearSolver] = [ConjugateGradient(5), GMRES(), Neumann(400)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
every_chunk = pytest.mark.parametrize("chunk_size", [1, 2, 3])


# Where only the head moves


def head_only(chunk_size: int, **options: Any) -> InnerLoop:
    rule = optimizers.make("anil", template=template(STILL), head="b", lr=0.3, **options)
    return InnerLoop(STILL, rule, Execution(chunk_size))


@every_solver
@every_chunk
@pytest.mark.parametrize("num_steps", [200, 400])
def test_a_body_that_stays_is_the_start_itself(solver: LinearSolver, chunk_size: int, num_steps: int) -> None:
    loop, tasks = head_only(chunk_size), sample(STILL, 3)
    theta = generic_theta(loop)
    found = Implicit(num_steps, solver).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    path = Unrolled(num_steps).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    dense = implicit_gradient(loop, theta, FinalLoss(), tasks, num_steps, step_map=True)
    assert relative_error({"w": found.grads["init/w"]}, {"w": path.grads["init/w"]}) < 1e-10
    assert relative_error(found.grads, dense) < 1e-10
    # The head forgets where it began: said, and not a reason to refuse what the body gets.
    assert found.info["zero_gradient"] == ["init/b"] and not found.grads["init/b"].any()
    assert path.grads["init/b"].abs().max() < 1e-12 < path.grads["init/w"].abs().min()


@every_solver
def test_the_heads_rate_moves_nothing(solver: LinearSolver) -> None:
    loop = head_only(1, learn_lr=True)
    theta = {**generic_theta(loop), "lr": torch.tensor(0.3)}
    with pytest.raises(ValueError, match=r"\['lr'\] do not move the solution"):
        Implicit(200, solver).estimate(loop, theta, FinalLoss(), loop.start(sample(STILL)))


@every_solver
def test_a_start_that_lies_behind_moves_nothing(solver: LinearSolver) -> None:
    loop = head_only(1)
    theta = generic_theta(loop)
    begun = loop.begin(theta, loop.start(sample(STILL)))
    with pytest.raises(ValueError, match=r"\['init/b', 'init/w'\] do not move the solution"):
        Implicit(200, solver).estimate(loop, theta, FinalLoss(), begun)


# Where a constraint is active in some tasks alone


class Projected(UpdateRule):
    """Gradient descent with weight decay, projected onto ``x >= bound``; both are learned."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.tensor(0.3, dtype=FLOAT), "bound": torch.tensor(0.05, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        moved = {k: p - 0.3 * (grads[k] + theta["decay"] * p) for k, p in params.items()}
        return {k: torch.maximum(moved[k], theta["bound"]) - p for k, p in params.items()}, state


class FixedBound(Projected):
    """The same with a bound that is not learned."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.tensor(0.3, dtype=FLOAT)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return super().update({**theta, "bound": torch.tensor(0.05, dtype=FLOAT)}, grads, state, params, loss)


def tasks_with(active: tuple[str, ...]) -> Tasks:
    """Return tasks whose constraint is active in "all" coordinates, in "some" or in "none"."""
    tasks = sample(STILL, len(active), seed=8)
    inside = torch.linspace(1.0, 2.0, 5, dtype=FLOAT)
    at = {"all": -4 * torch.ones(5, dtype=FLOAT), "some": inside * torch.tensor([1.0, -3.0, 1.0, 1.0, -3.0])}
    c = tasks["c"].clone()
    for i, kind in enumerate(active):
        hessian = tasks["hessian"][i]
        c[i, 0] = at["all"] if kind == "all" else hessian @ at.get(kind, inside)
    return {**tasks, "c": c}


CASES = [("all", "none"), ("none", "all"), ("all", "none", "some"), ("all", "all", "none"), ("some", "none"), ("some",)]


@pytest.mark.parametrize("rule", [Projected(), FixedBound()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("active", CASES, ids="-".join)
@every_chunk
def test_a_constraint_that_is_active_in_some_tasks_is_no_reason(
    rule: UpdateRule, active: tuple[str, ...], chunk_size: int
) -> None:
    loop, tasks = InnerLoop(STILL, rule, Execution(chunk_size)), tasks_with(active)
    theta = rule.init_theta(torch.Generator())
    path = Unrolled(300).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    end = loop.run(theta, loop.start(tasks), 300).end.params
    held = torch.cat([(p == 0.05).flatten(1) for p in end.values()], dim=1).sum(1)
    assert [5 if kind == "all" else 0 if kind == "none" else int(n) for kind, n in zip(active, held, strict=True)] == (
        held.tolist()
    )
    assert all(0 < n < 5 for kind, n in zip(active, held.tolist(), strict=True) if kind == "some")
    for solver in (GMRES(), Neumann(400)):
        found = Implicit(300, solver).estimate(loop, theta, FinalLoss(), loop.start(tasks))
        assert relative_error(found.grads, path.grads) < 1e-9
        assert all(g.any() for g in path.grads.values()) or ("bound" in theta and set(active) == {"none"})


@every_chunk
def test_where_it_is_active_in_every_task_the_decay_has_the_zero_that_the_unrolled_gradient_has(
    chunk_size: int,
) -> None:
    loop, tasks = InnerLoop(STILL, Projected(), Execution(chunk_size)), tasks_with(("all", "all"))
    theta = loop.init_theta(torch.Generator())
    path = Unrolled(300).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    found = Implicit(300, GMRES()).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    assert relative_error(found.grads, path.grads) < 1e-10
    assert not path.grads["decay"].any() and path.grads["bound"].abs() > 1e-2


class Shrinking(Projected):
    """Descent with a decay of what lies beyond 1, and of nothing else."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.tensor(0.3, dtype=FLOAT)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: -0.3 * (grads[k] + theta["decay"] * (p - 1).relu()) for k, p in params.items()}, state


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1)], ids=str)
@every_chunk
def test_what_moves_the_solution_of_one_task_alone_does_move_solutions(order: tuple[int, ...], chunk_size: int) -> None:
    """In the first kind of task the decay acts on the way, and not at the end; in the second it acts there too."""
    tasks = sample(STILL, len(order), seed=8)
    ends = [0.5 * torch.ones(5, dtype=FLOAT), 3 * torch.ones(5, dtype=FLOAT)]
    c = torch.stack([hessian @ ends[kind] for hessian, kind in zip(tasks["hessian"], order, strict=True)])
    tasks = {**tasks, "c": torch.stack([c, tasks["c"][:, 1]], dim=1), "x": torch.full((len(order), 5), 4.0)}
    loop = InnerLoop(STILL, Shrinking(), Execution(chunk_size))
    theta = loop.init_theta(torch.Generator())
    path = Unrolled(300).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    for solver in (GMRES(), Neumann(400)):
        found = Implicit(300, solver).estimate(loop, theta, FinalLoss(), loop.start(tasks))
        assert path.grads["decay"].abs() > 1e-3 and relative_error(found.grads, path.grads) < 1e-9
    of_the_first_kind = {k: v[[i for i, kind in enumerate(order) if kind == 0]] for k, v in tasks.items()}
    with pytest.raises(ValueError, match=r"\['decay'\] do not move the solution"):
        alone = InnerLoop(STILL, Shrinking(), Execution(chunk_size))
        Implicit(300, GMRES()).estimate(alone, theta, FinalLoss(), alone.start(of_the_first_kind))


# With an inner objective of one's own


@pytest.mark.parametrize("inner", [L2(template(STILL), 0.4), Both()], ids=lambda x: type(x).__name__)
@every_chunk
def test_a_rate_is_refused_at_the_solution_of_an_inner_objective_too(inner: Any, chunk_size: int) -> None:
    rule = optimizers.make("momentum", lr=0.1, momentum=0.5)
    loop = InnerLoop(STILL, rule, Execution(chunk_size), inner)
    theta, carry = {**generic_theta(loop), "lr": torch.tensor(0.1), "momentum": torch.tensor(0.5)}, None
    for solver in SOLVERS:
        carry = loop.start(sample(STILL, 3))
        with pytest.raises(ValueError, match=r"\['lr', 'momentum'\] do not move the solution"):
            Implicit(400, solver).estimate(loop, theta, FinalLoss(), carry)


@every_solver
@every_chunk
def test_a_learned_start_is_refused_where_the_inner_objective_does_not_know_it(
    solver: LinearSolver, chunk_size: int
) -> None:
    loop = InnerLoop(STILL, FromStart(template(STILL)), Execution(chunk_size), Both())
    with pytest.raises(ValueError, match=r"\['start/b', 'start/w'\] do not move the solution"):
        Implicit(200, solver).estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(STILL, 3)))
