"""Forward mode: exact in whole episodes, blocks and windows, flat in memory, and refused by name where torch errs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import difference_error, relative_error
from problems import FLOAT, Quadratic, Sensitive, TanhMLP, generic_theta, sample, template
from test_combinations import OBJECTIVES, RULES, loop_of
from test_mixed_mode import FRAME, GENERIC, UNTRUSTED, linalg
from test_mixed_mode_models import KINDS, Kind
from test_resume import LAST, killed_and_resumed, rows, same, trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from turns import by_turns

from learnedopt import (
    BootstrappedTarget,
    Carry,
    Estimate,
    Execution,
    FinalLoss,
    ForwardMode,
    Found,
    GradientEstimator,
    InnerLoop,
    MeanLogLoss,
    ModuleFamily,
    SumOfLosses,
    Tape,
    Target,
    TargetMatching,
    TaskFamily,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.carry import detach
from learnedopt.core.tree import Params
from learnedopt.estimators.forward import ForwardCarry
from learnedopt.execution.forward import MOST_BYTES, ForwardRun
from learnedopt.execution.tangents import directions

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning"),
]


def momentum_loop(execution: Execution = Execution(), family: TaskFamily | None = None) -> InnerLoop:  # noqa: B008
    """Return descent with momentum, at a rate so small that theta acts long after a window is over."""
    family = Quadratic() if family is None else family
    return InnerLoop(family, optimizers.make("momentum", lr=0.02, momentum=0.8, learn=("lr", "momentum")), execution)


def windows(
    estimator: GradientEstimator, loop: InnerLoop, thetas: list[Theta], objective: Any, tasks: Tasks
) -> list[Estimate]:
    """Take estimates in a row, each at a theta of its own."""
    carry, found = estimator.start(loop, thetas[0], tasks, torch.Generator()), []
    for theta in thetas:
        found.append(estimator.estimate(loop, theta, objective, carry))
        carry = found[-1].carry
    return found


# Windows


class Origin(Target):
    """Zero, where training goes on as well."""

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        zeros = end._replace(params={k: torch.zeros_like(p) for k, p in end.params.items()})
        return Found(detach(zeros), detach(zeros))


def test_windows_are_exact_where_truncation_is_far_off() -> None:
    loop, horizon, tasks = momentum_loop(), 12, sample(Quadratic(), 3)
    theta = generic_theta(loop)
    whole = Unrolled(horizon).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    forward = windows(ForwardMode(3, horizon), loop, [theta] * 4, FinalLoss(), tasks)
    cut = windows(Truncated(3, horizon, Tape.FULL), loop, [theta] * 4, FinalLoss(), tasks)
    assert forward[-1].carry is None and all(isinstance(x.carry, ForwardCarry) for x in forward[:-1])
    assert relative_error(forward[-1].grads, whole.grads) < 1e-12
    assert relative_error(cut[-1].grads, whole.grads) > 0.2
    torch.testing.assert_close(forward[-1].loss, whole.loss, rtol=1e-12, atol=0)


def test_the_windows_of_a_sum_add_up_to_the_whole_horizons_gradient() -> None:
    loop, tasks = momentum_loop(), sample(Quadratic(), 2)
    theta = generic_theta(loop)
    whole = Unrolled(8).estimate(loop, theta, SumOfLosses(), loop.start(tasks)).grads

    def total(estimator: GradientEstimator) -> Theta:
        found = windows(estimator, loop, [theta] * 4, SumOfLosses(), tasks)
        return {k: torch.stack([x.grads[k] for x in found]).sum(0) for k in theta}

    assert relative_error(total(ForwardMode(2, 8)), whole) < 1e-12
    assert relative_error(total(Truncated(2, 8, Tape.FULL)), whole) > 0.2


def test_where_theta_moves_between_windows_the_gradient_is_that_of_a_common_shift() -> None:
    loop, tasks = momentum_loop(), sample(Quadratic(), 2)
    first = generic_theta(loop)
    second = {k: 1.1 * v for k, v in first.items()}
    found = windows(ForwardMode(2, 4), loop, [first, second], FinalLoss(), tasks)

    def value(shifted: Theta) -> float:
        shift = {k: shifted[k] - v for k, v in second.items()}
        ahead = loop.run({k: v + shift[k] for k, v in first.items()}, loop.start(tasks), 2, Tape.NONE)
        end = loop.run(shifted, ahead.end, 2, Tape.NONE).end
        return float(loop.losses(shifted, end, "valid").mean())

    assert difference_error(value, second, found[1].grads) < 1e-7


@pytest.mark.parametrize("block_size", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("objective", ["final loss", "bootstrapped"])
def test_windows_in_blocks_equal_windows_all_at_once(block_size: int, objective: str) -> None:
    loop = loop_of("learned-init", "task-loss")
    theta, tasks = generic_theta(loop), sample(loop.family, 3)
    at_once = windows(ForwardMode(1, 30), loop, [theta] * 3, OBJECTIVES[objective], tasks)
    blocks = windows(ForwardMode(1, 30, block_size), loop, [theta] * 3, OBJECTIVES[objective], tasks)
    for a, b in zip(at_once, blocks, strict=True):
        assert relative_error(b.grads, a.grads) < 1e-13
    passes = -(-sum(v.numel() for v in theta.values()) // block_size)
    further = 0 if objective == "final loss" else OBJECTIVES[objective].target.rule_steps
    assert [x.info["inner_steps"] for x in blocks] == [3 * passes * (1 + further)] * 3


def test_windows_go_on_where_an_objective_says_if_the_rules_own_steps_come_to_it() -> None:
    loop, tasks = momentum_loop(), sample(Quadratic(), 2)
    theta, objective = generic_theta(loop), BootstrappedTarget(3, 0.2)
    found = windows(ForwardMode(1, 6), loop, [theta] * 2, objective, tasks)
    truncated = windows(Truncated(1, 6), loop, [theta] * 2, objective, tasks)
    assert found[0].carry.inner.step == truncated[0].carry.step == 3 and found[1].carry is None
    with pytest.raises(ValueError, match="goes on from a carry at step 1 that 1 steps of the rule do not come to"):
        windows(ForwardMode(1, 6), loop, [theta], TargetMatching(Origin()), tasks)
    rollout = TargetMatching(Origin(), continue_from="rollout")
    assert windows(ForwardMode(1, 6), loop, [theta] * 2, rollout, tasks)[1].carry.inner.step == 2


def test_a_begun_carry_is_a_fixed_start() -> None:
    loop, tasks = momentum_loop(), sample(Quadratic(), 2)
    theta = generic_theta(loop)
    carry = loop.run(theta, loop.start(tasks), 3, Tape.NONE).end
    expected = Unrolled(2).estimate(loop, theta, FinalLoss(), carry).grads
    for estimator in (ForwardMode(2), ForwardMode(2, 20)):
        assert relative_error(estimator.estimate(loop, theta, FinalLoss(), carry).grads, expected) < 1e-13
    start = loop_of("learned-init", "task-loss")
    begun = start.run(generic_theta(start), start.start(tasks), 1, Tape.NONE).end
    info = ForwardMode(2, 20).estimate(start, generic_theta(start), FinalLoss(), begun).info
    assert info["zero_gradient"] == ["init/b", "init/w"]


# Whole episodes


ALL_RULES = sorted({*optimizers.names(), *RULES} - {"lstm", "recurrent-hyperparameters"})


@pytest.mark.parametrize(("rule", "num_blocks"), by_turns(product(ALL_RULES), [(2,), (5,)]))
def test_blocks_equal_all_at_once(rule: str, num_blocks: int) -> None:
    """The last block is shorter, where theta allows."""
    loop = loop_of(rule, "l2" if rule in RULES and rule not in optimizers.names() else "task-loss")
    theta, tasks = generic_theta(loop), sample(loop.family)
    count = sum(v.numel() for v in theta.values())
    block_size = -(-count // num_blocks)
    at_once = ForwardMode(3).estimate(loop, theta, SumOfLosses(), loop.start(tasks))
    blocks = ForwardMode(3, block_size=block_size).estimate(loop, theta, SumOfLosses(), loop.start(tasks))
    assert relative_error(blocks.grads, at_once.grads) < 1e-13
    assert at_once.info["inner_steps"] == 2 * 3 and blocks.info["inner_steps"] == 6 * -(-count // block_size)


def test_an_episode_goes_on_where_unrolled_would() -> None:
    for rule in ("momentum", "maml"):
        loop = loop_of(rule, "task-loss")
        theta, tasks, objective = generic_theta(loop), sample(loop.family), BootstrappedTarget(3, 0.2)
        carries = [e.estimate(loop, theta, objective, loop.start(tasks)).carry for e in (ForwardMode(2), Unrolled(2))]
        assert (carries[0] is None) == (carries[1] is None) == (rule == "maml")
        if rule == "momentum":
            assert carries[0].step == 4
            assert relative_error(carries[0].params, carries[1].params) < 1e-13


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_tasks_together_in_uneven_chunks_and_a_rule_that_reads_the_loss(chunk_size: int) -> None:
    for objective in (MeanLogLoss(), FinalLoss()):
        loop = InnerLoop(Quadratic(), Sensitive(), Execution(chunk_size))
        theta, tasks = generic_theta(loop), sample(Quadratic(), 5)
        expected = Unrolled(3).estimate(loop, theta, objective, loop.start(tasks))
        found = ForwardMode(3).estimate(loop, theta, objective, loop.start(tasks))
        assert relative_error(found.grads, expected.grads) < 1e-12
        torch.testing.assert_close(found.info["losses"], expected.info["losses"], rtol=1e-12, atol=0)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)


def test_the_start_as_an_objective_reads_it_has_tangents_too() -> None:
    def progress(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        moved = [(rollout.end.params[k] - p).flatten(1).square().sum(1) for k, p in rollout.start.params.items()]
        return torch.stack(moved).sum(0).mean() + rollout.losses.mean()

    loop, tasks = loop_of("learned-init", "task-loss"), sample(Quadratic())
    theta = generic_theta(loop)
    expected = Unrolled(2).estimate(loop, theta, progress, loop.start(tasks)).grads
    assert relative_error(ForwardMode(2).estimate(loop, theta, progress, loop.start(tasks)).grads, expected) < 1e-12


def test_float32() -> None:
    family = ModuleFamily(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), functional.mse_loss, data)
    loop = InnerLoop(family, optimizers.make("adam", learn=("lr", "beta1")), Execution(dtype=torch.float32))
    theta = {k: v.float() for k, v in loop.init_theta(torch.Generator()).items()}
    tasks = family.sample(2, torch.Generator().manual_seed(1))
    expected = Unrolled(4).estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads
    found = ForwardMode(4).estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads
    assert all(g.dtype is torch.float32 for g in found.values())
    assert relative_error(found, expected) < 1e-4


def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed((seed + 1000 * step + (split == "valid")) % 2**32)
    x = torch.randn(4, 3, generator=generator)
    return x, x.sum(1, keepdim=True)


# Memory


def bytes_alive() -> int:
    # By exact type: what torch's compiler leaves behind (fake tensors) has no memory that could be asked for.
    alive = [x.untyped_storage() for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({x.data_ptr(): x.nbytes() for x in alive}.values())


class Watched(TanhMLP):
    """Notes at every batch how many bytes of tensors are alive."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        self.seen.append(bytes_alive())
        return super().batch(tasks, step, split)


def test_what_is_alive_does_not_grow_with_the_steps() -> None:
    def most(num_steps: int) -> int:
        loop = InnerLoop(Watched(), rule, Execution(vet=False))
        for steps in (1, num_steps):  # what is asked and kept once is there after the first
            loop.family.seen.clear()
            gc.collect()
            before = bytes_alive()
            ForwardMode(steps).estimate(loop, theta, FinalLoss(), loop.start(tasks))
        return max(loop.family.seen) - before

    rule, tasks = optimizers.example("learned-init", template(TanhMLP())), sample(TanhMLP(), 1)
    theta = generic_theta(rule)
    short, long = most(5), most(40)
    count, params = (sum(x.numel() for x in tensors.values()) for tensors in (theta, template(TanhMLP())))
    # One number a step and direction stays, that of the losses; the tangents of a step would be hundreds.
    allowed = 8 * 35 * (count + 1) + 0.1 * short
    assert 0 < long - short <= allowed < 0.1 * (8 * 35 * count * 2 * params)


def test_tangents_of_a_block_stay_below_the_stated_size() -> None:
    loop = loop_of("maml", "task-loss")
    wide = {"init/w": torch.zeros(3000, 2000), "init/b": torch.zeros(7)}
    begun = Carry({}, {"w": torch.zeros(1, 3000, 2000), "b": torch.zeros(1, 7)}, (), 0)
    run = ForwardRun(loop, wide, FinalLoss(), 1, None, False)
    first, second = next(iter(run.blocks(begun)))
    assert (first, second) == (0, 1)  # one direction is more than that already
    small = {"lr": torch.zeros(5000)}
    blocks = [*run._replace(theta=small).blocks(begun._replace(params={"w": torch.zeros(1, 5000)}))]
    assert blocks[0] == (0, MOST_BYTES // (8 * 10000)) and blocks[-1][1] == 5000
    assert all(a[1] == b[0] for a, b in pairwise(blocks))


def test_directions_are_the_unit_vectors_of_theta_in_order() -> None:
    theta = {"a": torch.zeros(2, 2), "b": torch.zeros(()), "c": torch.zeros(3)}
    rows = []
    for start, stop in ((0, 3), (3, 6), (6, 8)):
        found = directions(theta, start, stop)
        full = [found.get(k, torch.zeros(stop - start, *v.shape)).reshape(stop - start, -1) for k, v in theta.items()]
        rows.append(torch.cat(full, 1))
        assert all(x.any() for x in found.values())
    assert torch.equal(torch.cat(rows), torch.eye(8))


# Resume


def test_windows_killed_after_any_meta_step_end_where_they_would_have(tmp_path: Path) -> None:
    family = ModuleFamily(lambda: nn.Linear(3, 1), functional.mse_loss, data)
    lstm = {"name": "lstm", "options": {"hidden_size": 2}}
    make = trainer(family, "learned-init", ForwardMode(2, 6), SumOfLosses(), rule_options={"rule": lstm})
    expected = make(tmp_path / "whole").run(LAST)
    for kills in ([2], [3], [5], [3, 3, 6, 7]):
        folder = tmp_path / f"killed-{kills}"
        assert same(killed_and_resumed(make, folder, kills), expected)
        assert same(rows(folder), rows(tmp_path / "whole"))


# Nets, and operations that torch cannot go through or gets wrong


def of_images(kind: Kind) -> tuple[TaskFamily, Theta, InnerLoop]:
    def images(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * (seed % 1000) + 10 * step + (split == "valid"))
        return torch.randn(kind.shape, generator=generator), torch.randint(3, kind.shape[:1], generator=generator)

    family = ModuleFamily(kind.build, kind.loss, images)
    loop = InnerLoop(family, optimizers.example("maml", template(family)))
    return family, generic_theta(loop.rule), loop


NETS = ("tanh", "silu", "gelu", "mse", "mse, summed", "group norm", "batch norm", "layer norm", "LSTM", "attention")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_nets_of_a_users_own_equal_the_plain_tape(name: str, chunk_size: int) -> None:
    kind = KINDS[name]
    if chunk_size not in kind.chunks:
        return
    family, theta, loop = of_images(kind)
    loop = InnerLoop(family, loop.rule, Execution(chunk_size))
    tasks = family.sample(3, torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH):
        expected, found = (
            e.estimate(loop, theta, SumOfLosses(), loop.start(tasks)).grads
            for e in (Unrolled(2), ForwardMode(2, block_size=40))
        )
    # A bias before a normalisation has none but rounding's gradient: relative to the largest.
    largest = max(float(g.abs().max()) for g in expected.values())
    assert max(float((found[k] - g).abs().max()) for k, g in expected.items()) <= 1e-12 * largest


class OfMatrix(TaskFamily):
    """A scalar function of a matrix (3, 3), and the square of its distance to a fixed one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {"a": GENERIC + 0.2 * torch.randn(num_tasks, 3, 3, generator=generator, dtype=FLOAT)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"a": tasks["a"]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return tasks["a"]

    def loss(self, params: Params, batch: Any) -> Tensor:
        return self.function(params["a"]) + (params["a"] - batch).square().sum()


def matrix_estimates(function: Callable[[Tensor], Tensor], chunk_size: int, *estimators: Any) -> list[Theta]:
    family = OfMatrix(function)
    loop = InnerLoop(family, optimizers.make("sgd", lr=0.01), Execution(chunk_size))
    theta, tasks = generic_theta(loop), sample(family, 3, seed=1)
    return [e.estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads for e in estimators]


def symmetric(a: Tensor) -> Tensor:
    return a @ a.mT + torch.eye(3)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "LinalgDet": UNTRUSTED["LinalgDet"][0],
    "LinalgSolveEx": UNTRUSTED["LinalgSolveEx"][0],
    "Prod": UNTRUSTED["Prod"][0],
    "Cumprod": UNTRUSTED["Cumprod"][0],
    "logdet": lambda a: torch.logdet(symmetric(a)),
    "inv": lambda a: (FRAME * linalg.inv(a)).sum(),
    "cholesky": lambda a: (FRAME * linalg.cholesky(symmetric(a))).sum(),
    "eigh": lambda a: (linalg.eigvalsh(symmetric(a)) * FRAME[0]).sum(),
    "svd": lambda a: linalg.svdvals(a).sum(),
    "qr": lambda a: (linalg.qr(a)[1] * FRAME).sum(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_linear_algebra_that_forward_mode_goes_through_is_exact(name: str) -> None:
    expected, found = matrix_estimates(RIGHT[name], 1, Unrolled(3), ForwardMode(3))
    assert relative_error(found, expected) < 1e-12


def huber(a: Tensor) -> Tensor:
    return functional.huber_loss(a, FRAME)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "huber_loss_backward": (huber, 1, "no forward derivative of it .HuberLoss.*huber_loss_backward.*torch.where"),
    "LinalgVectorNorm": (UNTRUSTED["LinalgVectorNorm"][0], 1, "LinalgVectorNorm has silently wrong.*square.*sum"),
    "Norm": (UNTRUSTED["Norm"][0], 1, "Norm has silently wrong tangents at special points"),
    "Dist": (UNTRUSTED["Dist"][0], 1, "Dist has silently wrong"),
    "Sinc": (UNTRUSTED["Sinc"][0], 1, "Sinc has silently wrong"),
    "LinalgPinv": (UNTRUSTED["LinalgPinv"][0], 1, "LinalgPinv has silently wrong"),
    "TriangularSolve": (UNTRUSTED["TriangularSolve"][0], 1, "parameter 'a' are not those.*TriangularSolve wrong"),
    "CholeskyInverse": (UNTRUSTED["CholeskyInverse"][0], 1, "parameter 'a' are not those.*CholeskyInverse wrong"),
    "ScatterReduce": (UNTRUSTED["ScatterReduce"][0], 1, "parameter 'a' are not those.*ScatterReduce wrong"),
    "LinalgDet, together": (UNTRUSTED["LinalgDet"][0], 3, "LinalgDet wrong; for several tasks.*chunk_size=1"),
    "LinalgSolveEx, together": (UNTRUSTED["LinalgSolveEx"][0], 3, "LinalgSolveEx wrong; for several tasks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_forward_mode_cannot_do_is_refused_by_name_before_the_first_step(name: str) -> None:
    function, chunk_size, reason = REFUSED[name]
    matrix_estimates(function, chunk_size, Unrolled(3))  # which can
    with pytest.raises(ValueError, match=f"(?s)ForwardMode cannot go through a step of SGD.*{reason}.*Unrolled"):
        matrix_estimates(function, chunk_size, ForwardMode(3))


class Sine(torch.autograd.Function):
    """Without a forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class OldSine(torch.autograd.Function):
    """As functions were written before ``torch.func``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class WrongSine(Sine):
    """With a wrong one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * ctx.saved_tensors[0].sin()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Sine, "no forward derivative of it .Sine"),
        (OldSine, "no forward derivative of it .OldSine"),
        (WrongSine, "the tangents of the outer loss are not those of reverse mode.*WrongSine"),
    ],
    ids=["without", "old", "wrong"],
)
def test_a_custom_function_without_a_right_forward_derivative_is_named(function: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)ForwardMode cannot.*{reason}.*Unrolled"):
        matrix_estimates(lambda a: function.apply(a).sum(), 1, ForwardMode(2))


class SineDescent(UpdateRule):
    """Descent whose update goes through a custom function."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: -theta["lr"] * Sine.apply(g) for k, g in grads.items()}, state


def test_a_custom_function_of_a_rule_is_named_too() -> None:
    loop = InnerLoop(Quadratic(), SineDescent())
    with pytest.raises(ValueError, match=r"(?s)a step of SineDescent.*no forward derivative of it .Sine"):
        ForwardMode(2).estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(Quadratic())))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_steps": -1}, "num_steps=-1 is not a count"),
        ({"num_steps": 2.0}, "num_steps=2.0 is not a count"),
        ({"num_steps": 0, "horizon": 4}, "num_steps=0 is not a count; pass an integer of at least 1"),
        ({"num_steps": 2, "horizon": 0}, "horizon=0 is not a count"),
        ({"num_steps": 3, "horizon": 20}, "horizon=20 is not a multiple of the window num_steps=3.*use 18 or 21"),
        ({"num_steps": 2, "block_size": 0}, "block_size=0 is not a count"),
    ],
    ids=["negative", "no integer", "empty window", "no horizon", "cut short", "empty block"],
)
def test_bad_counts_are_refused_when_it_is_made(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ForwardMode(**arguments)


def test_bad_thetas_and_carries_are_refused_before_the_first_step() -> None:
    loop, tasks = momentum_loop(), sample(Quadratic())
    theta = generic_theta(loop)
    first = windows(ForwardMode(2, 8), loop, [theta], FinalLoss(), tasks)[0].carry
    estimate = ForwardMode(2, 8).estimate
    whole = {k: v.round().long() for k, v in theta.items()}
    with pytest.raises(ValueError, match=r"int64.*floating-point"):
        estimate(loop, whole, FinalLoss(), loop.start(tasks))
    other = first._replace(sizes={"lr": 3})
    with pytest.raises(ValueError, match=r"tangents are along .*'lr': 3.*another theta.*begin a new episode"):
        estimate(loop, theta, FinalLoss(), other)
    narrow = first._replace(params={k: p[:, :1] for k, p in first.params.items()})
    with pytest.raises(ValueError, match=r"tangents have the shapes .* need "):
        estimate(loop, theta, FinalLoss(), narrow)
    with pytest.raises(ValueError, match="holds the tangents of windows, but ForwardMode without a horizon"):
        ForwardMode(2).estimate(loop, theta, FinalLoss(), first)
    with pytest.raises(TypeError, match="goes on from a Carry or a ForwardCarry, got a dict"):
        estimate(loop, theta, FinalLoss(), {})


def test_theta_without_a_way_to_the_objective_is_refused_as_unrolled_refuses_it() -> None:
    loop = loop_of("descent", "a user's own")

    def end_of_w(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        return rollout.end.params["w"].mean()

    class Blind(UpdateRule):
        def init_theta(self, generator: torch.Generator) -> Theta:
            return {"of_w": torch.tensor(0.1), "of_b": torch.tensor(0.1)}

        def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
            return params, ()

        def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
            return {"w": -theta["of_w"] * torch.ones_like(params["w"]), "b": theta["of_b"] * params["b"]}, state

    loop = InnerLoop(Quadratic(), Blind())
    theta, carry = generic_theta(loop), loop.start(sample(Quadratic()))
    for estimator in (Unrolled(2), ForwardMode(2), ForwardMode(2, 8)):
        with pytest.raises(
            ValueError, match=r"\['of_b'\] have no path to the objective through the objective end_of_w"
        ):
            estimator.estimate(loop, theta, end_of_w, carry)


def test_it_is_the_trainers_estimator_by_name_and_records_nothing() -> None:
    from learnedopt.config import INTERCHANGEABLE

    assert any(ForwardMode in kinds for kinds in INTERCHANGEABLE)
    assert ForwardMode(2).recording is None and ForwardMode(2).takes_second_derivatives
