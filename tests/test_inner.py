"""The inner loop: values against a plain loop, graphs as the tape says, batches and steps where they belong."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from oracles import relative_error, walk, worst
from problems import (
    FLOAT,
    Anchored,
    Quadratic,
    Skewed,
    TanhMLP,
    generic_theta,
    imaml_loop,
    one_by_one,
    sample,
    template,
)
from torch import Tensor

from learnedopt import (
    Carry,
    Execution,
    FinalLoss,
    InnerLoop,
    Rollout,
    Tape,
    Theta,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core import tree

pytestmark = pytest.mark.usefixtures("float64")

FAMILY = Quadratic()


def loop_of(name: str, execution: Execution = Execution()) -> InnerLoop:  # noqa: B008
    """Return the loop of a rule, or of MAML's rule on a proximal inner objective."""
    if name == "imaml":
        return imaml_loop(FAMILY, execution)
    own = {"anchored": Anchored, "skewed": Skewed}
    rule = own[name]() if name in own else optimizers.example(name, template(FAMILY))
    return InnerLoop(FAMILY, rule, execution, horizon=20)


@pytest.mark.parametrize("chunk_size", [1, 2, 9])
@pytest.mark.parametrize("name", [*optimizers.names(), "anchored", "skewed", "imaml"])
def test_the_loop_is_a_plain_loop(name: str, chunk_size: int) -> None:
    loop, tasks = loop_of(name, Execution(chunk_size)), sample(FAMILY, 3)
    theta = generic_theta(loop)
    expected = [walk(loop, theta, task, 6, full=False) for task in one_by_one(tasks)]
    rollout = loop.run(theta, loop.start(tasks), 6, Tape.NONE)
    assert rollout.losses.shape == (6, 3) and rollout.end.step == 6
    torch.testing.assert_close(
        rollout.losses, torch.stack([torch.stack(p.losses) for p in expected], dim=1), rtol=1e-12, atol=1e-13
    )
    for i, path in enumerate(expected):
        assert relative_error({k: p[i] for k, p in rollout.end.params.items()}, path.points[-1][0]) < 1e-12
        state = path.points[-1][1] or ()
        pairs = zip(tree.leaves(rollout.end.state), tree.leaves(tree.arrange(state, rollout.end.state)), strict=True)
        assert worst([0.0, *(float((a[i].to(FLOAT) - b.detach().to(FLOAT)).abs().max()) for a, b in pairs)]) < 1e-12


@pytest.mark.parametrize("name", ["adam", "lstm", "imaml", "anchored"])
def test_a_run_cut_anywhere_is_the_same_run(name: str) -> None:
    loop = loop_of(name)
    theta = generic_theta(loop)
    carry = loop.start(sample(FAMILY, 2))
    whole = loop.run(theta, carry, 7, Tape.NONE)
    first = loop.run(theta, carry, 3, Tape.NONE)
    second = loop.run(theta, first.end, 4, Tape.NONE)
    assert torch.equal(torch.cat([first.losses, second.losses]), whole.losses)
    assert second.end.step == 7 and second.start.step == 3
    pairs = zip(tree.leaves(second.end[1:3]), tree.leaves(whole.end[1:3]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["lstm", "meta-sgd", "imaml", "anchored"])
def test_the_tape_changes_the_graph_and_not_the_values(name: str) -> None:
    loop, tasks = loop_of(name), sample(FAMILY, 2)
    theta = {k: v.requires_grad_() for k, v in generic_theta(loop).items()}
    found = {tape: loop.run(theta, loop.start(tasks), 3, tape) for tape in Tape}
    for rollout in found.values():
        assert torch.equal(rollout.losses, found[Tape.NONE].losses)
        assert all(torch.equal(p, found[Tape.NONE].end.params[k]) for k, p in rollout.end.params.items())
    none = found[Tape.NONE]
    assert not any(x.requires_grad for x in tree.leaves((none.start[:3], none.end[:3], none.losses)))
    for tape in (Tape.FULL, Tape.FIRST_ORDER):
        assert all(p.requires_grad for p in found[tape].end.params.values())
        assert found[tape].losses.requires_grad
    assert all(v.grad is None for v in theta.values())


def test_nothing_of_the_optimizees_second_derivatives_is_on_a_first_order_tape() -> None:
    """One step: x' = x - lr g(x), so that dx'/dx is I - lr H on the full tape and I on the detached one."""
    rule = optimizers.make("maml", template=template(FAMILY), lr=0.1)
    tasks = sample(FAMILY, 1)
    for tape, factor in ((Tape.FULL, 0.1), (Tape.FIRST_ORDER, 0.0)):
        loop, theta = InnerLoop(FAMILY, rule), {k: v.requires_grad_() for k, v in generic_theta(rule).items()}
        end = loop.run(theta, loop.start(tasks), 1, tape).end.params
        x = torch.cat([end["w"].reshape(-1), end["b"].reshape(-1)])
        rows = [torch.autograd.grad(xi, list(theta.values()), retain_graph=True) for xi in x]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        torch.testing.assert_close(jacobian, torch.eye(5, dtype=FLOAT) - factor * tasks["hessian"][0])


def test_begin_applies_the_learned_start_once() -> None:
    loop = loop_of("learned-init")
    theta = generic_theta(loop)
    fresh = loop.start(sample(FAMILY, 2))
    assert fresh.state is None and fresh.step == 0
    assert relative_error(fresh.params, FAMILY.init_params(fresh.tasks)) == 0
    begun = loop.begin(theta, fresh)
    assert (
        relative_error({k: p[1] for k, p in begun.params.items()}, {k: theta[f"init/{k}"] for k in fresh.params}) == 0
    )
    assert loop.begin(theta, begun) is begun
    moved = loop.run(theta, begun, 2, Tape.NONE).end
    assert loop.begin(theta, moved) is moved


class Recorder(Quadratic):
    """Remembers which batches were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, str]] = []

    def batch(self, tasks, step, split):
        self.asked.append((step, split))
        return super().batch(tasks, step, split)


def test_each_step_sees_its_own_batch() -> None:
    family = Recorder()
    loop = InnerLoop(family, optimizers.make("sgd"))
    theta, carry = generic_theta(loop.rule), loop.start(sample(family, 1))
    end = loop.run(theta, carry, 3, Tape.NONE).end
    assert family.asked == [(0, "train"), (0, "train"), (1, "train"), (2, "train")]  # the first is the check
    family.asked.clear()
    again = loop.run(theta, end, 2, Tape.NONE).end
    loop.losses(theta, again, "valid")
    loop.outputs(again, "train")
    assert family.asked == [(3, "train"), (4, "train"), (5, "valid"), (5, "train")]


@pytest.mark.parametrize("chunk_size", [1, 2, 9])
def test_losses_outputs_and_metrics_come_back_batched(chunk_size: int) -> None:
    loop = InnerLoop(FAMILY, optimizers.make("sgd"), Execution(chunk_size))
    theta = generic_theta(loop.rule)
    carry = loop.begin(theta, loop.start(sample(FAMILY, 3)))
    assert loop.losses(theta, carry, "train").shape == (3,)
    assert loop.outputs(carry, "valid").shape == (3, 2, 3)
    lengths = torch.stack(
        [torch.cat([carry.params["w"][i].reshape(-1), carry.params["b"][i]]).norm() for i in range(3)]
    )
    torch.testing.assert_close(loop.metrics(carry, "train")["length"], lengths)
    bare = InnerLoop(TanhMLP(), loop.rule)
    assert bare.metrics(bare.begin(generic_theta(loop.rule), bare.start(sample(TanhMLP()))), "train") == {}


def test_execution_casts_parameters_and_batches_and_nothing_else() -> None:
    family = TanhMLP()
    loop = InnerLoop(family, optimizers.make("sgd"), Execution(2, "cpu", torch.float32))
    carry = loop.start(sample(family, 3))
    assert {p.dtype for p in carry.params.values()} == {torch.float32}
    batch = loop.batch(carry.tasks, 0, "train")
    assert batch["x"].dtype == torch.float32 and batch["y"].dtype == torch.int64
    rollout = loop.run(generic_theta(loop.rule), carry, 2, Tape.NONE)
    assert rollout.losses.dtype == torch.float32 and rollout.end.params["w1"].dtype == torch.float32


class Averages(NamedTuple):
    """A state with fields."""

    fast: dict[str, Tensor]
    count: Tensor


class WithNamedState(UpdateRule):
    """Momentum with a named tuple as its state, which counts in integers."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.05, dtype=FLOAT)}

    def init(self, theta, params):
        return params, Averages({k: torch.zeros_like(p) for k, p in params.items()}, torch.tensor(0))

    def update(self, theta, grads, state, params, loss):
        fast = {k: 0.5 * state.fast[k] + g for k, g in grads.items()}
        rate = theta["lr"] / (1 + state.count)
        return {k: -rate * fast[k] for k in grads}, Averages(fast, state.count + 1)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("segment", [None, 2])
def test_a_named_tuple_that_counts_is_a_state(chunk_size: int, segment: int | None) -> None:
    rule = WithNamedState()
    loop, theta, tasks = InnerLoop(FAMILY, rule, Execution(chunk_size)), generic_theta(rule), sample(FAMILY, 3)
    end = loop.run(theta, loop.start(tasks), 4, Tape.NONE).end
    assert isinstance(end.state, Averages) and end.state.count.tolist() == [4, 4, 4]
    slope = (end_value(loop, theta, tasks, 1e-4) - end_value(loop, theta, tasks, -1e-4)) / 2e-4
    found = Unrolled(4, segment=segment).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    assert float(found.grads["lr"]) == pytest.approx(slope, rel=1e-6)


def end_value(loop: InnerLoop, theta: Theta, tasks, change: float) -> float:
    rollout = loop.run({"lr": theta["lr"] + change}, loop.start(tasks), 4, Tape.NONE)
    return float(FinalLoss()(loop, theta, rollout))


def test_a_state_that_changes_its_structure_is_refused() -> None:
    class Growing(WithNamedState):
        def init(self, theta, params):
            return params, {}

        def update(self, theta, grads, state, params, loss):
            return {k: -theta["lr"] * g for k, g in grads.items()}, {"new": torch.zeros(())}

    loop = InnerLoop(FAMILY, Growing())
    with pytest.raises(ValueError, match=r"Growing\.update must return a state of the same structure"):
        loop.run(generic_theta(loop.rule), loop.start(sample(FAMILY)), 2, Tape.NONE)


def test_an_update_that_forgets_a_parameter_is_refused() -> None:
    class Forgetful(WithNamedState):
        def update(self, theta, grads, state, params, loss):
            return {"w": -grads["w"]}, state

    loop = InnerLoop(FAMILY, Forgetful())
    with pytest.raises(ValueError, match=r"one delta of the same shape per parameter: .*got \{'w': \(2, 2\)\}"):
        loop.run(generic_theta(loop.rule), loop.start(sample(FAMILY)), 1, Tape.NONE)


def test_a_run_leaves_its_inputs_alone() -> None:
    loop = InnerLoop(FAMILY, optimizers.make("adam"), Execution(2))
    theta, carry = generic_theta(loop.rule), loop.start(sample(FAMILY, 3))
    first = loop.run(theta, carry, 2, Tape.NONE).end
    before = [x.clone() for x in tree.leaves((theta, first[:3]))]
    Unrolled(3, segment=2).estimate(loop, theta, FinalLoss(), first)
    loop.run(theta, first, 3, Tape.FULL)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((theta, first[:3])), strict=True))
    assert not any(x.requires_grad for x in tree.leaves((theta, first[:3])) if x.is_floating_point())


def test_the_engine_draws_no_global_random_numbers() -> None:
    loop = InnerLoop(FAMILY, optimizers.make("lstm"))
    before = torch.get_rng_state()
    Unrolled(2).estimate(loop, generic_theta(loop.rule), FinalLoss(), loop.start(sample(FAMILY)))
    assert torch.equal(before, torch.get_rng_state())


def test_an_outer_no_grad_does_not_matter() -> None:
    loop = InnerLoop(FAMILY, optimizers.make("momentum"))
    theta, carry = generic_theta(loop.rule), loop.start(sample(FAMILY))
    expected = Unrolled(3).estimate(loop, theta, FinalLoss(), carry)
    with torch.no_grad():
        found = Unrolled(3).estimate(loop, theta, FinalLoss(), carry)
        values = loop.run(theta, carry, 3, Tape.NONE)
    assert relative_error(found.grads, expected.grads) == 0
    assert isinstance(values, Rollout) and isinstance(values.end, Carry)
