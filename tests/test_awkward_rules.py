"""Rules and inputs that are allowed and easily forgotten: odd states, mixed dtypes, theta that changes a system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from problems import sample
from torch import Tensor

from learnedopt import (
    ConjugateGradient,
    Execution,
    FinalLoss,
    Implicit,
    InnerLoop,
    LearnedOptimizer,
    MetaTrainer,
    Tape,
    TaskFamily,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import pull
from learnedopt.optimizers import IMAML, SGD, Partition
from learnedopt.optimizers.bases.wrapper import Wrapper

pytestmark = pytest.mark.usefixtures("float64")


class Scaled(TaskFamily):
    """A vector and a scalar parameter; a loss of two terms."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw centres."""
        return {"center": torch.randn(num_tasks, 3, generator=generator).to(self.dtype)}

    def init_params(self, tasks: Any) -> dict[str, Tensor]:
        """Start off the optimum."""
        center = tasks["center"]
        return {"w": 0.5 * center + 1, "log_scale": torch.full((len(center),), 0.3, dtype=self.dtype)}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        """Return the centre, moved on the other split."""
        return {"center": tasks["center"] + 0.1 * (split == "valid")}

    def loss(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        """Return a distance plus a penalty."""
        distance = (params["w"] * params["log_scale"].exp() - batch["center"]).square().mean()
        return distance + 0.1 * params["w"].square().sum() + 0.05 * params["log_scale"].square()


class Descent(UpdateRule):
    """Gradient descent that keeps whatever state it is made with."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rate."""
        return {"lr": torch.tensor(0.1)}

    def init(self, theta: Any, params: Any) -> Any:
        """Start where the task does."""
        return params, self.state

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        """Descend."""
        return {k: -theta["lr"] * g for k, g in grads.items()}, state


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize(
    "state", [None, (), {}, torch.zeros(()), torch.zeros(2), {"a": {}, "b": torch.ones(1)}], ids=repr
)
def test_any_tree_of_tensors_is_a_state(state: Any, chunk_size: int) -> None:
    loop = InnerLoop(Scaled(), Descent(state), Execution(chunk_size))
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(sample(loop.family, 3))
    found = Unrolled(3).estimate(loop, theta, FinalLoss(), carry)
    expected = Unrolled(3).estimate(InnerLoop(Scaled(), Descent()), theta, FinalLoss(), carry)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-12, atol=0)
    begun = loop.begin(theta, carry)
    half = loop.run(theta, loop.run(theta, begun, 2, Tape.NONE).end, 1, Tape.NONE).end
    torch.testing.assert_close(half.params, loop.run(theta, begun, 3, Tape.NONE).end.params, rtol=0, atol=0)


def test_a_state_of_numbers_is_refused_by_the_plug_in_and_the_engine() -> None:
    loop = InnerLoop(Scaled(), Descent({"t": 0}))
    with pytest.raises(ValueError, match=r"state with .*int.* as leaves"):
        loop.run({"lr": torch.tensor(0.1)}, loop.start(sample(loop.family)), 1)


def test_a_wider_theta_does_not_change_the_parameters_dtype() -> None:
    loop = InnerLoop(Scaled(torch.float32), Descent())
    end = loop.run({"lr": torch.tensor(0.1, dtype=torch.float64)}, loop.start(sample(loop.family)), 2, Tape.NONE).end
    assert {k: p.dtype for k, p in end.params.items()} == {"w": torch.float32, "log_scale": torch.float32}


def test_deltas_that_would_merely_broadcast_are_refused() -> None:
    class Broadcasts(Descent):
        def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
            return dict.fromkeys(grads, -theta["lr"]), state

    loop = InnerLoop(Scaled(), Broadcasts())
    with pytest.raises(ValueError, match="one delta of the same shape per parameter"):
        loop.run({"lr": torch.tensor(0.1)}, loop.start(sample(loop.family)), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plug_in_takes_the_engines_step_to_the_bit_with_a_regularizer_too(dtype: torch.dtype) -> None:
    family = Scaled(dtype)
    tasks = sample(family, 1)
    own = {k: p[0].clone() for k, p in family.init_params(tasks).items()}
    rule = optimizers.make("imaml", template={k: 0.9 * p for k, p in own.items()}, lr=0.07, strength=0.3)
    theta = rule.init_theta(torch.Generator())
    loop = InnerLoop(family, rule)
    params = {k: torch.nn.Parameter(p) for k, p in own.items()}
    plug_in = LearnedOptimizer(params.items(), (rule, theta), adopt_start=True)
    for step in range(5):
        plug_in.zero_grad()
        family.loss(params, {k: v[0] for k, v in family.batch(tasks, step, "train").items()}).backward()
        plug_in.step()
    end = loop.run(theta, loop.start(tasks), 5, Tape.NONE).end
    assert all(torch.equal(params[k], p[0]) for k, p in end.params.items())


class Network(UpdateRule):
    """A step map ``x -> W tanh(x) + b`` that does not look at the loss."""

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return W = 0, at which one step solves the problem and the system is symmetric."""
        return {"W": torch.zeros(2, 2), "b": torch.tensor([0.3, -0.2])}

    def init(self, theta: Any, params: Any) -> Any:
        """Start where the task does."""
        return params, ()

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        """Move to the image."""
        return {"x": theta["W"] @ params["x"].tanh() + theta["b"] - params["x"]}, state


class Bowl(TaskFamily):
    """A two-dimensional bowl."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw centres."""
        return {"center": torch.randn(num_tasks, 2, generator=generator)}

    def init_params(self, tasks: Any) -> dict[str, Tensor]:
        """Start at zero."""
        return {"x": torch.zeros_like(tasks["center"])}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        """Return the centre."""
        return tasks

    def loss(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        """Return the squared distance."""
        return (params["x"] - batch["center"]).square().sum()


def test_a_step_map_that_one_step_solves_has_an_implicit_gradient() -> None:
    loop = InnerLoop(Bowl(), Network())
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(sample(loop.family))
    implicit = Implicit(20, ConjugateGradient(2)).estimate(loop, theta, FinalLoss(), carry)
    unrolled = Unrolled(20).estimate(loop, theta, FinalLoss(), carry)
    torch.testing.assert_close(implicit.grads, unrolled.grads, rtol=1e-12, atol=1e-14)


def test_symmetry_is_looked_at_for_every_theta() -> None:
    loop = InnerLoop(Bowl(), Network())
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(sample(loop.family))
    Implicit(40, ConjugateGradient(2)).estimate(loop, theta, FinalLoss(), carry)  # symmetric here
    skewed = {**theta, "W": torch.tensor([[0.1, 0.5], [-0.3, 0.2]])}
    with pytest.raises(ValueError, match="not"):
        Implicit(40, ConjugateGradient(2)).estimate(loop, skewed, FinalLoss(), carry)


def test_what_cannot_work_is_said_before_the_first_step() -> None:
    loop = InnerLoop(Scaled(), Descent())
    carry = loop.start(sample(loop.family))
    with pytest.raises(ValueError, match="not floating-point"):
        loop.run({"lr": torch.tensor(1)}, carry, 1)
    with pytest.raises(ValueError, match="no tasks"):
        loop.start({"center": torch.zeros(0, 3)})
    with pytest.raises(TypeError, match=r"learnedopt\.optimizers\.make"):
        InnerLoop(Scaled(), "adam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as FinalLoss\(\)"):
        Unrolled(1).estimate(loop, {"lr": torch.tensor(0.1)}, FinalLoss, carry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither 'train' nor 'valid'"):
        loop.losses({}, loop.begin({"lr": torch.tensor(0.1)}, carry), "test")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="number_of_tasks"):
        MetaTrainer(loop, Unrolled(1), FinalLoss(), number_of_tasks=3)


class Backwards(Descent):
    """Descent with a step in another order, in float64 whatever the parameters are."""

    def init(self, theta: Any, params: Any) -> Any:
        return params, ()

    def step(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        return {k: params[k] - theta["lr"].double() * grads[k].double() for k in reversed(list(params))}, state


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_step_changes_neither_the_order_nor_the_dtype_of_parameters(chunk_size: int) -> None:
    family = Scaled(torch.float32)
    loop = InnerLoop(family, Backwards(), Execution(chunk_size))
    theta, carry = {"lr": torch.tensor(0.1)}, loop.start(sample(family, 3))
    whole, pieces = (Unrolled(4, segment=n).estimate(loop, theta, FinalLoss(), carry) for n in (None, 1))
    torch.testing.assert_close(pieces.grads["lr"], whole.grads["lr"], rtol=1e-5, atol=0)
    end = loop.run(theta, carry, 4, Tape.NONE).end
    assert [(k, p.dtype) for k, p in end.params.items()] == [("w", torch.float32), ("log_scale", torch.float32)]


class Pulled(Wrapper):
    """Adds an L2 penalty to the wrapped rule's regularizer, if any."""

    has_regularizer = True

    def regularizer(self, theta: Any, params: Any) -> Tensor:
        own = sum((p.square().sum() for p in params.values()), torch.zeros(()))
        return own + (super().regularizer(theta, params) if self.rule.has_regularizer else 0.0)


@final
@dataclass(frozen=True)
class Backward(SGD):
    """Climbs."""

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        deltas, state = super().update(theta, grads, state, params, loss)
        return {k: -d for k, d in deltas.items()}, state


def test_who_overrides_a_method_loses_the_shortcut_to_it() -> None:
    family = Scaled()
    tasks = sample(family, 1)
    own = {k: p[0] for k, p in family.init_params(tasks).items()}
    for inside in (SGD(0.1), optimizers.make("imaml", template=own)):
        rule = Pulled(inside)
        theta = rule.init_theta(torch.Generator())
        moved = {k: p + 0.1 for k, p in own.items()}
        found = pull(rule, TaskMap(1), theta, moved, create_graph=False)
        expected = torch.func.grad(lambda at, rule=rule, theta=theta: rule.regularizer(theta, at))(moved)
        torch.testing.assert_close(found, expected)
    loop = InnerLoop(family, Backward(0.1))
    rollout = loop.run(loop.rule.init_theta(torch.Generator()), loop.start(tasks), 3, Tape.NONE)
    assert (rollout.losses[1:] > rollout.losses[:-1]).all()


@pytest.mark.parametrize("own", [True, False], ids=["without a closed form", "of a partition"])
def test_regularizers_go_with_offloaded_segments(own: bool) -> None:
    family = Scaled()
    template = {k: 0.9 * p[0] for k, p in family.init_params(sample(family, 1)).items()}
    groups = {"w": ("w", IMAML({"w": template["w"]}, lr=0.1)), "rest": ("*", SGD(0.1))}
    rule = Pulled(SGD(0.1)) if own else Partition(groups)
    loop, theta = InnerLoop(family, rule), rule.init_theta(torch.Generator())
    carry = loop.start(sample(family, 2))
    whole = Unrolled(4).estimate(loop, theta, FinalLoss(), carry)
    pieces = Unrolled(4, segment=2, offload=True).estimate(loop, theta, FinalLoss(), carry)
    torch.testing.assert_close(pieces.grads, whole.grads, rtol=1e-12, atol=1e-14)


def test_a_pull_of_another_shape_is_refused() -> None:
    class Broadcasts(Descent):
        def init(self, theta: Any, params: Any) -> Any:
            return params, ()

        def regularizer(self, theta: Any, params: Any) -> Tensor:
            return params["w"].sum()

        def regularizer_gradient(self, theta: Any, params: Any) -> Any:
            return {k: torch.ones(1) for k in params}

    loop = InnerLoop(Scaled(), Broadcasts())
    with pytest.raises(ValueError, match="regularizer_gradient must return one gradient of the same shape"):
        loop.run({"lr": torch.tensor(0.1)}, loop.start(sample(loop.family)), 1)
