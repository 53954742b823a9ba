"""Objectives that read theta themselves: every estimator adds that partial derivative, and the paths count it in.

The oracle is the product rule: of ``final loss x factor(theta)`` with the final loss's own meta-gradient, which other
tests hold to differences; and differences of the whole, where a run without a graph shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import difference_error, relative_error
from problems import FLOAT, Quadratic, generic_theta, imaml_loop, sample, template
from torch import Tensor

from learnedopt import (
    GMRES,
    L2,
    ConjugateGradient,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    Neumann,
    Rollout,
    Tape,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.carry import Carry
from learnedopt.core.objective import TaskMean
from learnedopt.core.tree import Params
from learnedopt.execution import programs
from learnedopt.execution.coordinatewise import reason_against

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Priced(TaskMean):
    """The final loss times one and the cubes of what is read."""

    reads_theta: tuple[str, ...]

    end_only = True

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return FinalLoss()(loop, theta, rollout) * self.factor(theta)

    def factor(self, theta: Theta) -> Tensor:
        names = [k for k in theta if any(k == p or (p[-1] == "*" and k.startswith(p[:-1])) for p in self.reads_theta)]
        return 1 + torch.stack([theta[k].pow(3).sum() for k in names]).sum()

    def product_rule(self, theta: Theta, loss: Tensor, grads: Theta) -> Theta:
        """Return the gradient, given the final loss and its own gradient (absent where that has none)."""
        leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
        found = torch.autograd.grad(self.factor(leaves), list(leaves.values()), materialize_grads=True)
        factor = self.factor(theta)
        zero = torch.zeros((), dtype=FLOAT)
        return {k: loss * g + factor * grads.get(k, zero) for (k, g) in zip(leaves, found, strict=True)}


class WithRadius(UpdateRule):
    """Descent, with a number in theta that no update reads."""

    coordinatewise = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.06, dtype=FLOAT), "radius": torch.tensor(0.7, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: -theta["lr"] * g for k, g in grads.items()}, state


READS = Priced(("lr", "radius"))


def estimates(estimator: GradientEstimator, loop: InnerLoop, theta: Theta, objective: Any, number: int) -> list[Any]:
    found, carry = [], loop.start(sample(loop.family, 3))
    for _ in range(number):
        found.append(estimator.estimate(loop, theta, objective, carry))
        carry = found[-1].carry
    return found


def check(estimator: GradientEstimator, execution: Execution, number: int = 1) -> None:
    loop, plain = (InnerLoop(Quadratic(), rule, execution) for rule in (WithRadius(), optimizers.make("sgd", lr=0.06)))
    theta = WithRadius().init_theta(torch.Generator())
    found = estimates(estimator, loop, theta, READS, number)
    expected = estimates(estimator, plain, {"lr": theta["lr"]}, FinalLoss(), number)
    for mine, final in zip(found, expected, strict=True):
        assert relative_error(mine.grads, READS.product_rule(theta, final.loss, final.grads)) < 1e-12
        assert "zero_gradient" not in mine.info


@pytest.mark.parametrize(
    ("estimator", "number"),
    [
        (Unrolled(3), 1),
        (FirstOrder(3), 1),  # by the coordinatewise adjoint
        (Unrolled(4, segment=2), 1),
        (Truncated(2, 8), 3),
        (Truncated(2, 8, Tape.FULL), 3),
        (TruncatedBackprop(4, 2), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_back_propagation_adds_what_is_read_directly(
    estimator: GradientEstimator, number: int, chunk_size: int
) -> None:
    check(estimator, Execution(chunk_size), number)


@pytest.mark.parametrize("estimator", [Unrolled(2), FirstOrder(2)], ids=str)
def test_compiled_programs_add_it_as_well(estimator: GradientEstimator, monkeypatch: pytest.MonkeyPatch) -> None:
    records = []  # what is recorded is run as it is, which is quick; a CompileWarning would be an error
    monkeypatch.setattr(programs, "backend", lambda record, example: records.append(record) or record)
    check(estimator, Execution(2, compile=True))
    assert records


def test_the_coordinatewise_adjoint_is_what_serves_the_first_order_tape() -> None:
    loop, theta = InnerLoop(Quadratic(), WithRadius()), WithRadius().init_theta(torch.Generator())
    assert reason_against(loop, theta, template(loop.family), Tape.FIRST_ORDER) is None


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_against_differences(num_steps: int) -> None:
    loop, theta = InnerLoop(Quadratic(), WithRadius()), WithRadius().init_theta(torch.Generator())
    carry = loop.start(sample(loop.family, 3))

    def value(theta: Theta) -> float:
        return float(READS(loop, theta, loop.run(theta, carry, num_steps, Tape.NONE)))

    found = Unrolled(num_steps).estimate(loop, theta, READS, carry)
    assert difference_error(value, theta, found.grads) < 1e-7


# A start that lies behind


@pytest.mark.parametrize(("reads", "silent"), [(("init/*",), []), (("init/w",), ["init/b"])])
def test_what_is_read_has_a_gradient_in_later_windows_too(reads: tuple[str, ...], silent: Sequence[str]) -> None:
    family = Quadratic()
    loop = InnerLoop(family, optimizers.make("maml", template=template(family), lr=0.05))
    theta, objective = generic_theta(loop), Priced(reads)
    found = estimates(Truncated(2, 8, Tape.FULL), loop, theta, objective, 2)[1]
    final = estimates(Truncated(2, 8, Tape.FULL), loop, theta, FinalLoss(), 2)[1]
    assert final.info["zero_gradient"] == ["init/b", "init/w"] and not any(g.any() for g in final.grads.values())
    assert found.info.get("zero_gradient", []) == silent
    assert relative_error(found.grads, objective.product_rule(theta, final.loss, final.grads)) < 1e-12
    assert found.grads["init/w"].any()


# The implicit gradient


@pytest.mark.parametrize("solver", [ConjugateGradient(5), Neumann(300), GMRES(10)], ids=lambda s: type(s).__name__)
def test_the_implicit_gradient_adds_it(solver: Any) -> None:
    loop = imaml_loop(Quadratic(0.0), lr=0.2, learn=True)
    theta, objective = generic_theta(loop), Priced(("strength", "init/b"))
    carry = loop.start(sample(loop.family, 3))
    found = Implicit(200, solver).estimate(loop, theta, objective, carry)
    final = Implicit(200, solver).estimate(loop, theta, FinalLoss(), carry)
    assert relative_error(found.grads, objective.product_rule(theta, final.loss, final.grads)) < 1e-12

    def value(theta: Theta) -> float:
        return float(objective(loop, theta, loop.run(theta, carry, 200, Tape.NONE)))

    assert difference_error(value, theta, found.grads) < 1e-7


@pytest.mark.parametrize("solver", [ConjugateGradient(5), GMRES(20)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_a_rate_that_moves_no_solution_may_be_read_all_the_same(name: str, solver: Any) -> None:
    like = template(Quadratic(0.0))
    options: list[dict[str, Any]] = [{}, {"learn": ()}]
    loops = [
        InnerLoop(Quadratic(0.0), optimizers.make(name, lr=0.2, **each), inner_objective=L2(like, 0.5, learn=True))
        for each in options
    ]
    thetas = [loop.init_theta(torch.Generator().manual_seed(0)) for loop in loops]
    carry = loops[0].start(sample(loops[0].family, 3))
    objective = Priced(tuple(k for k in thetas[0] if k not in thetas[1]))
    assert len(objective.reads_theta) == {"sgd": 1, "momentum": 2}[name]
    final = Implicit(300, solver).estimate(loops[1], thetas[1], FinalLoss(), carry)
    for _ in range(2):  # what was found out of the loop is used the second time
        found = Implicit(300, solver).estimate(loops[0], thetas[0], objective, carry)
        assert relative_error(found.grads, objective.product_rule(thetas[0], final.loss, final.grads)) < 1e-9
        with pytest.raises(ValueError, match="do not move the solution"):
            Implicit(300, solver).estimate(loops[0], thetas[0], FinalLoss(), carry)


# What is declared wrongly


@pytest.mark.parametrize("estimator", [Unrolled(2), Truncated(2, 8), Implicit(20)], ids=lambda e: type(e).__name__)
def test_a_name_that_matches_nothing_is_refused(estimator: GradientEstimator) -> None:
    loop = imaml_loop(Quadratic(0.0), learn=True)
    with pytest.raises(ValueError, match=r"Priced\.reads_theta names 'strenght', which matches none .*'strength'\?"):
        estimator.estimate(loop, generic_theta(loop), Priced(("init/*", "strenght")), loop.start(sample(loop.family)))


@pytest.mark.parametrize("estimator", [Unrolled(2), FirstOrder(2)], ids=str)
def test_what_is_declared_and_not_read_is_no_silent_zero(estimator: GradientEstimator) -> None:
    @dataclass(frozen=True)
    class Idle(TaskMean):
        reads_theta = ("radius",)

        def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
            return loop.losses(theta, rollout.end, "valid").mean()

    loop, theta = InnerLoop(Quadratic(), WithRadius()), WithRadius().init_theta(torch.Generator())
    with pytest.raises(ValueError, match=r"\['radius'\] have no path to the objective through the objective Idle"):
        estimator.estimate(loop, theta, Idle(), loop.start(sample(loop.family)))


def test_what_is_read_without_being_declared_is_refused_and_says_how_to_declare_it() -> None:
    loop, theta = InnerLoop(Quadratic(), WithRadius()), WithRadius().init_theta(torch.Generator())
    with pytest.raises(ValueError, match=r"\['radius'\] have no path .*says so in reads_theta"):
        Unrolled(2).estimate(loop, theta, Priced(("lr",)), loop.start(sample(loop.family)))


def test_an_objectives_own_check_is_asked_once_and_before_the_first_step() -> None:
    asked = []

    @dataclass(frozen=True)
    class Asking(TaskMean):
        def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
            asked.append((num_steps, carry.step, carry.state))
            if len(asked) == 1:
                raise ValueError("not of this loop")

        def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
            assert len(asked) == 2
            return loop.losses(theta, rollout.end, "valid").mean()

    loop, objective = InnerLoop(Quadratic(), optimizers.make("sgd")), Asking()
    carry = loop.start(sample(loop.family))
    with pytest.raises(ValueError, match="not of this loop"):
        Unrolled(2).estimate(loop, generic_theta(loop), objective, carry)
    for _ in range(2):
        Unrolled(2).estimate(loop, generic_theta(loop), objective, carry)
    assert asked == [(2, 0, None)] * 2
