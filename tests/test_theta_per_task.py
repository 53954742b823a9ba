"""One theta a task, run together: each task as if it were alone with its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import relative_error
from problems import FLOAT, Both, Labelled, Quadratic, generic_theta, imaml_loop, sample, template, tied_loop
from torch import Tensor

from learnedopt import Execution, InnerLoop, Tape, TaskFamily, Tasks, Theta, optimizers
from learnedopt.core import carry as carries
from learnedopt.core import tree

pytestmark = pytest.mark.usefixtures("float64")

NUM_TASKS = 3


def of(name: str, family: TaskFamily) -> Callable[[Execution], InnerLoop]:
    """Return a function that makes the loop of an example of a rule."""
    return lambda execution: InnerLoop(family, optimizers.example(name, template(family)), execution)


LOOPS: dict[str, Callable[[Execution], InnerLoop]] = {
    "an lstm": of("lstm", Quadratic()),
    "adam, which counts": of("adam", Quadratic()),
    "rates of a start's own": of("meta-sgd", Quadratic()),
    "a penalty and its strength": lambda execution: imaml_loop(Labelled(), execution, learn=True),
    "a strength per coordinate": lambda execution: imaml_loop(Labelled(), execution, learn=True, per="coordinate"),
    "an inner loss of a user's own": lambda execution: tied_loop(Labelled(), execution),
    "theta in both losses": lambda execution: InnerLoop(
        Labelled(), optimizers.make("momentum", lr=0.1), execution, Both()
    ),
}
every_loop = pytest.mark.parametrize("name", LOOPS)
every_chunk = pytest.mark.parametrize("chunk_size", [1, 2, 9])


def posed(name: str, chunk_size: int) -> tuple[InnerLoop, list[Theta], Tasks]:
    """Return a loop, three thetas that differ, and three tasks."""
    loop = LOOPS[name](Execution(chunk_size))
    thetas = [
        {k: v * (1 - 0.1 * i) + 0.01 * i for k, v in generic_theta(loop, seed=3 + i).items()} for i in range(NUM_TASKS)
    ]
    return loop, thetas, sample(loop.family, NUM_TASKS)


def stacked(thetas: list[Theta]) -> Theta:
    return {k: torch.stack([theta[k] for theta in thetas]).clone().requires_grad_() for k in thetas[0]}


def alone(name: str, tasks: Tasks, i: int) -> tuple[InnerLoop, Tasks]:
    return LOOPS[name](Execution(1)), {k: v[i : i + 1] for k, v in tasks.items()}


def value_of(loop: InnerLoop, theta: Theta, tasks: Tasks, tape: Tape, per_task: bool) -> tuple[Tensor, list[Tensor]]:
    """Return each task's sum of what is read of it (num_tasks,), and the leaves of where it ends."""
    first = loop.run(theta, loop.start(tasks), 2, tape, theta_per_task=per_task)
    rollout = loop.run(theta, first.end, 2, tape, theta_per_task=per_task)
    losses = [loop.losses(theta, rollout.end, split, theta_per_task=per_task) for split in ("train", "valid")]
    recorded = torch.cat([first.losses, rollout.losses]).sum(0)
    return recorded + losses[0] + 2 * losses[1], tree.leaves((rollout.end.params, rollout.end.state))


@every_loop
@every_chunk
@pytest.mark.parametrize("tape", Tape, ids=lambda tape: tape.value)
def test_each_task_is_trained_as_if_alone_with_its_own_theta(name: str, chunk_size: int, tape: Tape) -> None:
    loop, thetas, tasks = posed(name, chunk_size)
    together = stacked(thetas)
    values, ends = value_of(loop, together, tasks, tape, per_task=True)
    assert values.shape == (NUM_TASKS,) and values.unique().numel() == NUM_TASKS
    grads: dict[str, Tensor] = {}
    if tape is not Tape.NONE:
        found = torch.autograd.grad(values.sum(), [*together.values()], materialize_grads=True)
        grads = dict(zip(together, found, strict=True))
    for i, theta in enumerate(thetas):
        single, task = alone(name, tasks, i)
        leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
        value, end = value_of(single, leaves, task, tape, per_task=False)
        torch.testing.assert_close(values[i], value[0], rtol=1e-12, atol=1e-13)
        for a, b in zip(ends, end, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-12, atol=1e-13)
        if tape is Tape.NONE:
            assert not any(x.requires_grad for x in ends)
            continue
        expected = torch.autograd.grad(value.sum(), [*leaves.values()], materialize_grads=True)
        own = {k: g[i] for k, g in grads.items()}
        assert relative_error(own, dict(zip(leaves, expected, strict=True))) < 1e-10  # Adam's eps has a tiny one


@every_loop
@every_chunk
def test_it_begins_each_task_at_its_own_start(name: str, chunk_size: int) -> None:
    loop, thetas, tasks = posed(name, chunk_size)
    begun = loop.begin(stacked(thetas), loop.start(tasks), theta_per_task=True)
    for i, theta in enumerate(thetas):
        single, task = alone(name, tasks, i)
        expected = single.begin(theta, single.start(task))
        found = carries.detach(carries.narrow(begun, i, i + 1))
        assert tree.leaves(found[1:3]) and all(
            torch.equal(a, b) for a, b in zip(tree.leaves(found[1:3]), tree.leaves(expected[1:3]), strict=True)
        )
    assert loop.begin(stacked(thetas), begun, theta_per_task=True) is begun


@every_loop
@every_chunk
def test_the_same_theta_for_each_task_is_one_theta(name: str, chunk_size: int) -> None:
    loop, thetas, tasks = posed(name, chunk_size)
    same, _ = value_of(loop, stacked([thetas[0]] * NUM_TASKS), tasks, Tape.NONE, per_task=True)
    one, _ = value_of(loop, thetas[0], tasks, Tape.NONE, per_task=False)
    torch.testing.assert_close(same, one, rtol=1e-12, atol=1e-13)


@every_loop
@every_chunk
def test_a_theta_of_another_leading_size_is_said_to_be_one(name: str, chunk_size: int) -> None:
    loop, thetas, tasks = posed(name, chunk_size)
    carry = loop.start(tasks)
    begun = loop.begin(thetas[0], carry)
    message = rf"for each of {NUM_TASKS} tasks \(theta_per_task=True\): expected"
    for wrong in (stacked(thetas[:2]), stacked([*thetas, thetas[0]]), thetas[0]):
        for call in (
            lambda theta: loop.begin(theta, carry, theta_per_task=True),
            lambda theta: loop.run(theta, carry, 2, Tape.NONE, theta_per_task=True),
            lambda theta: loop.losses(theta, begun, "valid", theta_per_task=True),
        ):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    with pytest.raises(ValueError, match="this theta is not one of"):  # and one a task where one for all is expected
        loop.run(stacked(thetas), carry, 2, Tape.NONE)


def test_a_single_task_has_a_leading_dimension_too() -> None:
    loop, thetas, _ = posed("theta in both losses", 1)
    tasks = sample(loop.family, 1)
    found, _ = value_of(loop, stacked(thetas[:1]), tasks, Tape.NONE, per_task=True)
    expected, _ = value_of(loop, thetas[0], tasks, Tape.NONE, per_task=False)
    assert torch.equal(found, expected) and found.dtype is FLOAT
