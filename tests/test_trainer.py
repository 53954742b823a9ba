"""The outer loop: it improves what it is told to, keeps the best, clips, skips what is not finite, and says so."""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler, ReduceLROnPlateau

from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, SumOfLosses, Truncated, Unrolled, Validation
from learnedopt import optimizers as rules
from learnedopt import tasks as families
from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout
from learnedopt.core.clipping import clip, norm_of
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import Metrics, NullTracker
from learnedopt.training.trainer import TrainingDiverged, TrainingResult

pytestmark = pytest.mark.usefixtures("float64")

MetaOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def quadratic_loop(rule: str = "sgd", split: str = "train", **options: Any) -> InnerLoop:
    """Return an inner loop on three-dimensional quadratics, all tasks at once."""
    family = families.make("quadratic", dim=3, meta_split=split)
    return InnerLoop(family, rules.make(rule, **options), Execution(chunk_size=64))


class Recorder(NullTracker):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.exit_codes: list[int] = []

    def start(self, config: dict[str, Any]) -> None:
        self.calls.append(f"start {config}")

    def log(self, metrics: Metrics, step: int) -> None:
        self.rows.append({"step": step, **metrics})

    def figure(self, name: str, path: Path) -> None:
        self.calls.append(f"figure {name}")

    def finish(self, exit_code: int = 0) -> None:
        self.calls.append("finish")
        self.exit_codes.append(exit_code)


class Script(GradientEstimator):
    """An estimator that returns the given gradients of ``sgd``'s lr, and losses, one after the other.

    It goes on for ever: each carry is one step further. What it was given is kept.
    """

    def __init__(self, *grads: float | tuple[float, float]) -> None:
        self.script = [g if isinstance(g, tuple) else (g, 1.0) for g in grads]
        self.thetas: list[float] = []
        self.carries: list[Carry] = []

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        grad, loss = self.script[len(self.thetas)]
        self.thetas.append(float(theta["lr"].detach()))
        self.carries.append(carry)
        onward = carry._replace(state=(), step=carry.step + 1)
        return Estimate(torch.tensor(loss), {"lr": torch.tensor(grad)}, onward, {})


def plain_sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def scripted(*grads: float | tuple[float, float], **options: Any) -> tuple[MetaTrainer, Script, Recorder]:
    """Return a trainer of one number that starts at 0 and follows the scripted gradients by steps of size 1."""
    script, recorder = Script(*grads), Recorder()
    options = {"theta": {"lr": torch.tensor(0.0)}, "meta_optimizer": plain_sgd, **options}
    return MetaTrainer(quadratic_loop(), script, FinalLoss(), tracker=recorder, **options), script, recorder


def held_out(objective: MetaObjective, **options: Any) -> Validation:
    return Validation(quadratic_loop(split="valid"), objective, **{"num_steps": 0, "num_tasks": 1, **options})


# What it is for


def test_meta_training_improves_what_is_held_out() -> None:
    validation = Validation(quadratic_loop("momentum", "valid"), FinalLoss(), num_steps=8, num_tasks=64, every=5)
    recorder = Recorder()
    trainer = MetaTrainer(
        quadratic_loop("momentum", lr=0.003),
        Unrolled(8),
        FinalLoss(),
        lambda params: torch.optim.Adam(params, 0.02),
        recorder,
        num_tasks=8,
        validation=validation,
    )
    start = validation.measure(trainer.theta)
    result = trainer.run(40)
    assert result.best_value < 0.6 * start
    assert result.best_value == validation.measure(result.best_theta)
    assert [row["step"] for row in recorder.rows if "validation" in row] == [*range(0, 41, 5)]
    assert recorder.rows[0] == {"step": 0, "validation": start, "best_validation": start}
    assert result.best_value == min(row["validation"] for row in recorder.rows if "validation" in row)
    assert recorder.rows[-1]["best_validation"] == result.best_value
    assert [row["step"] for row in recorder.rows] == [*range(41)] and result.meta_step == 40
    assert all(len(row["inner_loss"]) == 8 and row["step_ms"] > 0 for row in recorder.rows[1:])


def test_validation_reads_what_it_will_read_from_the_first_on() -> None:
    sizes: list[torch.Size] = []

    def tenth(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        sizes.append(rollout.losses.shape)
        return rollout.losses[10].mean()

    trainer, _, _ = scripted(1.0, validation=held_out(tenth, num_steps=11, num_tasks=5, every=1))
    trainer.run(1)
    assert sizes == [(11, 2), (11, 5), (11, 5)]  # the vetting, the start, the end


def test_bad_validation_is_refused_before_the_first_meta_step() -> None:
    def fail(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        raise ValueError("no such measure")

    for validation in (
        held_out(fail, num_steps=3, every=100),
        Validation(InnerLoop(families.make("image-folder", root="nowhere"), rules.make("sgd")), FinalLoss(), 1),
    ):
        trainer, _, recorder = scripted(1.0, 1.0, validation=validation)
        with pytest.raises((ValueError, FileNotFoundError), match=r"no such measure|not a folder"):
            trainer.run(2)
        assert trainer.progress.meta_step == 0 and not recorder.rows and not recorder.calls


@pytest.mark.parametrize(("every", "best"), [(1, -3.0), (2, -4.0), (5, -5.0), (100, -6.0)])
def test_the_best_theta_is_kept(every: int, best: float) -> None:
    def distance(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return (theta["lr"] + 3.2).abs()

    trainer, _, _ = scripted(*[1.0] * 6, validation=held_out(distance, every=every))
    result = trainer.run(6)
    assert result.theta["lr"] == -6.0
    assert result.best_theta["lr"] == best and result.best_value == pytest.approx(abs(best + 3.2))


@pytest.mark.parametrize("num_meta_steps", [0, 1, 4])
def test_the_best_is_never_worse_than_the_start_however_short_the_run(num_meta_steps: int) -> None:
    def distance(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return 1.69 + theta["lr"].square()

    trainer, _, recorder = scripted(*[2.0] * 4, validation=held_out(distance, every=100))
    result = trainer.run(num_meta_steps)
    assert result.best_theta["lr"] == 0.0 and result.best_value == 1.69
    assert result.theta["lr"] == -2.0 * num_meta_steps
    measured = {row["step"]: row["validation"] for row in recorder.rows if "validation" in row}
    assert measured == {0: 1.69, num_meta_steps: 1.69 + 4 * num_meta_steps**2}


def test_a_training_that_goes_on_does_not_measure_its_start_again() -> None:
    validation = held_out(FinalLoss(), every=3)
    trainer, _, recorder = scripted(*[1.0] * 6, validation=validation)
    trainer.run(2)
    trainer.run(6)
    assert [row["step"] for row in recorder.rows if "validation" in row] == [0, 2, 3, 6]


def test_without_validation_the_last_theta_is_the_best_known() -> None:
    trainer, _, recorder = scripted(1.0, 1.0)
    result = trainer.run(2)
    assert result.best_theta["lr"] == result.theta["lr"] == -2.0 and result.best_value == math.inf
    assert [row["step"] for row in recorder.rows] == [1, 2]


def test_a_validation_that_is_not_finite_is_never_the_best() -> None:
    def root(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return (2.5 + theta["lr"]).sqrt()  # NaN from the third step on

    result = scripted(*[1.0] * 4, validation=held_out(root, every=1))[0].run(4)
    assert result.best_theta["lr"] == -2.0 and result.best_value == pytest.approx(math.sqrt(0.5))


OPTIMIZERS: dict[str, MetaOptimizer] = {
    "SGD": lambda params: torch.optim.SGD(params, 1e-5, momentum=0.9, nesterov=True),
    "Adam": lambda params: torch.optim.Adam(params, 0.01, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, 0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, 0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, 1e-5),
    "Adamax": lambda params: torch.optim.Adamax(params, 0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, 0.01),
    "Adadelta": lambda params: torch.optim.Adadelta(params, 0.5),
    "RMSprop": lambda params: torch.optim.RMSprop(params, 0.01, centered=True, momentum=0.5),
    "ASGD": lambda params: torch.optim.ASGD(params, 1e-5, t0=2),
    "Rprop": lambda params: torch.optim.Rprop(params, 0.01),
    "groups": lambda params: torch.optim.Adam([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], 0.01),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "steps": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20),
    "sequence": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [ConstantLR(optimizer, 0.5, 2), ExponentialLR(optimizer, 0.8)], [2]
    ),
}
MIXED = [(name, "cosine") for name in OPTIMIZERS] + [("Adam", name) for name in SCHEDULERS]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning:torch")  # of SequentialLR, 2.6
@pytest.mark.parametrize(("optimizer", "scheduler"), MIXED)
def test_theta_follows_any_optimizer_and_scheduler_exactly(optimizer: str, scheduler: str) -> None:
    options: dict[str, Any] = {"lr": 0.02, "learn": ("lr", "momentum")}
    estimator, objective = Truncated(2, horizon=6), SumOfLosses()
    trainer = MetaTrainer(
        quadratic_loop("momentum", **options),
        estimator,
        objective,
        OPTIMIZERS[optimizer],
        num_tasks=2,
        scheduler=SCHEDULERS[scheduler],
    )
    loop = quadratic_loop("momentum", **options)
    theta = {k: v.detach().clone().requires_grad_() for k, v in trainer.theta.items()}
    outer = OPTIMIZERS[optimizer](list(theta.values()))
    schedule = SCHEDULERS[scheduler](outer)
    rates, carry = [], None
    for step in range(8):  # the third episode is cut short
        if carry is None:
            carry = trainer._fresh_carry()
        estimate = estimator.estimate(loop, theta, objective, carry)
        carry = estimate.carry
        assert (carry is None) == (step % 3 == 2)
        for k, p in theta.items():
            p.grad = estimate.grads[k]
        outer.step()
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    trainer.progress.episode = 0
    assert tree.leaves(trainer.run(8).theta) == [p.detach() for p in theta.values()]
    assert len(set(rates)) > 1


# Clipping


@pytest.mark.parametrize(("limit", "length"), [(None, 5.0), (7.0, 5.0), (5.0, 5.0), (2.0, 2.0)])
def test_a_long_meta_gradient_is_scaled_down_and_its_own_norm_is_logged(limit: float | None, length: float) -> None:
    class Pair(GradientEstimator):
        def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
            grads = {"lr": torch.tensor(3.0), "momentum": torch.tensor(-4.0)}
            return Estimate(torch.tensor(1.0), grads, None, {})

    recorder = Recorder()
    loop = quadratic_loop("momentum", learn=("lr", "momentum"))
    theta = {"lr": torch.tensor(1.0), "momentum": torch.tensor(1.0)}
    trainer = MetaTrainer(loop, Pair(), FinalLoss(), plain_sgd, recorder, theta=theta, max_grad_norm=limit)
    moved = trainer.run(1).theta
    assert recorder.rows[0]["grad_norm"] == 5.0
    assert moved["lr"] == pytest.approx(1 - 3 * length / 5, rel=1e-15)
    assert moved["momentum"] == pytest.approx(1 + 4 * length / 5, rel=1e-15)
    assert theta["lr"] == 1.0  # the caller's own is left alone


class Steep(GradientEstimator):
    """Its gradients of the given theta are ``size`` times 3 and -4."""

    def __init__(self, size: float) -> None:
        self.size = size

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        grads = {k: torch.full_like(v, self.size * d) for (k, v), d in zip(theta.items(), (3.0, -4.0), strict=True)}
        return Estimate(torch.tensor(1.0), grads, None, {})


SIZES = [
    (torch.float64, 1e200), (torch.float64, 4e307), (torch.float64, 1.0), (torch.float64, 1e-200),
    (torch.float32, 1e25), (torch.float32, 8e37), (torch.float32, 1e-30), (torch.bfloat16, 1e25),
    (torch.bfloat16, 8e37), (torch.bfloat16, 1e-30), (torch.float16, 1e4), (torch.float16, 1e-4),
]  # fmt: skip


@pytest.mark.parametrize("limit", [None, 1e-3, 7.0])
@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_every_finite_meta_gradient_has_a_length_and_can_be_scaled_down(
    dtype: torch.dtype, size: float, limit: float | None
) -> None:
    recorder, theta = Recorder(), {k: torch.zeros((), dtype=dtype) for k in ("lr", "momentum")}
    loop, given = quadratic_loop("momentum", learn=("lr", "momentum")), Steep(size)
    trainer = MetaTrainer(loop, given, FinalLoss(), plain_sgd, recorder, theta=theta, max_grad_norm=limit)
    moved = trainer.run(1).theta
    eps = torch.finfo(dtype).eps
    assert recorder.rows[0]["skipped"] == 0 and recorder.rows[0]["grad_norm"] == pytest.approx(5 * size, rel=2 * eps)
    fifth = min(size, (limit or math.inf) / 5)  # of the length, which may exceed every float
    smallest = torch.finfo(dtype).smallest_normal * eps
    assert float(moved["lr"]) == pytest.approx(-3 * fifth, rel=3 * eps, abs=smallest)
    assert float(moved["momentum"]) == pytest.approx(4 * fifth, rel=3 * eps, abs=smallest)


def test_a_length_beyond_all_floats_is_scaled_down_all_the_same() -> None:
    grads = {"w": torch.full((1_000_000,), 1.5e308), "b": torch.tensor(-1e308)}
    norm = norm_of(grads)
    clipped = clip(grads, norm, 2.0)
    assert norm.value == math.inf and math.isfinite(norm.mantissa)
    assert clipped["w"][0] == pytest.approx(2e-3, rel=1e-6) and clipped["b"] == pytest.approx(-2e-3 / 1.5, rel=1e-6)
    assert norm_of({"w": torch.zeros(3), "none": torch.zeros(0)}).value == 0.0
    for bad in (math.nan, math.inf):
        for order in (["bad", "good"], ["good", "bad"]):
            found = norm_of({k: {"bad": torch.tensor([1.0, bad]), "good": torch.tensor(math.inf)}[k] for k in order})
            assert not math.isfinite(found.mantissa) and (found.value == math.inf) == (bad == math.inf)


# What is not finite

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bad", [NAN, INF, -INF, (1.0, NAN), (1.0, INF)])
def test_a_meta_gradient_that_is_not_finite_is_skipped_and_its_episode_dropped(bad: Any) -> None:
    def halved(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return ExponentialLR(optimizer, 0.5)

    trainer, script, recorder = scripted(bad, 1.0, 1.0, bad, bad, 1.0, scheduler=halved)
    result = trainer.run(6)
    # Skipped steps move neither theta nor the schedule: the applied steps have sizes 1, 1/2 and 1/4.
    assert script.thetas == [0.0, 0.0, -1.0, -1.5, -1.5, -1.5] and result.theta["lr"] == -1.75
    assert [row["skipped"] for row in recorder.rows] == [1, 1, 1, 2, 3, 3] and result.num_skipped == 3
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4, 5, 6] and result.meta_step == 6
    assert not math.isfinite(recorder.rows[0]["grad_norm"]) or not math.isfinite(recorder.rows[0]["meta_loss"])
    # Every skip begins a new episode, on new tasks; a finite step goes on.
    assert [carry.step for carry in script.carries] == [0, 0, 1, 2, 0, 0]
    assert [carry.state is None for carry in script.carries] == [True, True, False, False, True, True]
    episodes = {float(carry.tasks["W"].sum()) for carry in script.carries}
    assert len(episodes) == trainer.progress.episode == 4


def test_a_skip_leaves_the_meta_optimizers_memory_alone() -> None:
    def adam(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, 0.1)

    with_skips, without = (scripted(*g, meta_optimizer=adam)[0] for g in ([1.0, NAN, -2.0, INF, 3.0], [1.0, -2.0, 3.0]))
    assert with_skips.run(5).theta["lr"] == without.run(3).theta["lr"]
    assert with_skips.meta_optimizer.state_dict() == without.meta_optimizer.state_dict()


def test_training_ends_after_the_set_number_of_skips_in_a_row(tmp_path: Path) -> None:
    trainer, script, recorder = scripted(
        NAN, NAN, 1.0, NAN, NAN, NAN, 1.0, max_skips_in_a_row=3, checkpoint=tmp_path / "checkpoint.pt"
    )
    with pytest.raises(TrainingDiverged, match=r"3 meta-gradients in a row were not finite \(meta-step 6, 5 skipped"):
        trainer.run(7)
    assert len(script.thetas) == 6 and [row["skipped"] for row in recorder.rows] == [1, 2, 2, 3, 4, 5]
    assert recorder.exit_codes == [1]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["meta_step"] == 6 and saved["theta"]["lr"] == -1.0 and saved["carry"] is None


def test_an_inner_loop_that_overflows_is_skipped_reported_and_ends() -> None:
    recorder = Recorder()
    loop = quadratic_loop("sgd", lr=1e200)  # so large that the loss after one step is infinite
    trainer = MetaTrainer(loop, Truncated(2, horizon=20), SumOfLosses(), tracker=recorder, max_skips_in_a_row=4)
    with pytest.raises(TrainingDiverged, match="Lower the meta-learning rate"):
        trainer.run(100)
    assert [row["skipped"] for row in recorder.rows] == [1, 2, 3, 4] and float(trainer.theta["lr"].detach()) == 1e200


# Tasks


class Watching(GradientEstimator):
    """Keeps the tasks that it is given."""

    def __init__(self) -> None:
        self.tasks: list[Tensor] = []

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        self.tasks.append(carry.tasks["W"].clone())
        return Estimate(torch.tensor(1.0), {"lr": torch.tensor(0.0)}, None, {})


def drawn(seed: int, num_meta_steps: int = 30) -> list[bytes]:
    watching = Watching()
    MetaTrainer(quadratic_loop(), watching, FinalLoss(), num_tasks=4, seed=seed).run(num_meta_steps)
    return [task.numpy().tobytes() for batch in watching.tasks for task in batch]


def test_no_task_is_met_twice_whatever_the_seed_and_validation_is_held_out() -> None:
    seen: list[bytes] = []

    def look(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        seen.extend(task.numpy().tobytes() for task in rollout.end.tasks["W"])
        return torch.tensor(0.0)

    for seed in (0, 1, 2, 2**32 - 1):
        seen += drawn(seed)
        for _ in range(2):
            held_out(look, num_tasks=16, seed=seed).measure({"lr": torch.tensor(0.1)})
        # Validation draws the same tasks every time, and training never draws them.
        assert seen[-32:-16] == seen[-16:]
        del seen[-16:]
    assert len(set(seen)) == len(seen) == 4 * (4 * 30 + 16)


def test_a_seed_decides_everything_and_global_randomness_nothing() -> None:
    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    assert drawn(3) == first
    a, b = (MetaTrainer(quadratic_loop("lstm", hidden_size=2), Unrolled(1), FinalLoss(), seed=s).theta for s in (3, 4))
    expected = rules.make("lstm", hidden_size=2).init_theta(torch.Generator().manual_seed(3))
    assert all(torch.equal(a[k], v) and not torch.equal(b[k], v) for k, v in expected.items())


# What surrounds it


def test_the_report_comes_last_but_before_the_end_of_the_tracker() -> None:
    def report(result: TrainingResult, tracker: Any) -> None:
        assert result.theta["lr"] == -2.0
        tracker.figure("curve", Path("curve.png"))

    trainer, _, recorder = scripted(1.0, 1.0, report=report, config={"a": 1})
    trainer.run(2)
    assert recorder.calls == ["start {'a': 1, 'num_meta_steps': 2}", "figure curve", "finish"]
    assert recorder.exit_codes == [0]


def test_progress_is_told_by_default_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def train(**options: Any) -> tuple[str, str]:
        theta = {"lr": torch.tensor(0.0)}
        MetaTrainer(quadratic_loop(), Script(*[1.0] * 3), FinalLoss(), plain_sgd, theta=theta, **options).run(3)
        return capsys.readouterr()

    out, err = train()
    assert out == ""
    first, *_, last, end = err.splitlines()
    assert first == "Meta-training starts with num_meta_steps=3."
    assert re.fullmatch(r"Meta-step 3 of 3 \(\S+ meta-steps/s, 0 s left\): meta-loss 1, .*", last)
    assert end == "Meta-training ended after meta-step 3."
    assert train(tracker=None) == ("", "")
    recorder = Recorder()
    assert train(tracker=lambda: recorder) == ("", "") and len(recorder.rows) == 3


def test_a_tracker_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Recorder):
        def log(self, metrics: Metrics, step: int) -> None:
            raise OSError("no space left")

    script = Script(1.0, 1.0)
    theta = {"lr": torch.tensor(0.0)}
    trainer = MetaTrainer(quadratic_loop(), script, FinalLoss(), plain_sgd, Full(), theta=theta)
    assert trainer.run(2).theta["lr"] == -2.0
    assert caplog.text.count("no space left") == 1


def test_an_error_in_the_middle_ends_the_tracker_with_code_1() -> None:
    trainer, _, recorder = scripted(1.0)
    with pytest.raises(IndexError):  # the script is over
        trainer.run(2)
    assert recorder.exit_codes == [1] and len(recorder.rows) == 1


def test_metrics_reach_the_record(tmp_path: Path) -> None:
    record = JsonLinesTracker(tmp_path / "metrics.jsonl")
    theta = {"lr": torch.tensor(0.0)}
    MetaTrainer(quadratic_loop(), Script(1.0, NAN), FinalLoss(), plain_sgd, record, theta=theta).run(2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1] and math.isnan(rows[1]["grad_norm"])


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, SystemExit, 143)]
)
def test_a_signal_ends_the_meta_step_and_leaves_a_checkpoint(
    number: signal.Signals, error: type[BaseException], code: int, tmp_path: Path
) -> None:
    class Interrupted(Script):
        def estimate(self, *args: Any) -> Estimate:
            if len(self.thetas) == 2:
                os.kill(os.getpid(), number)
            return super().estimate(*args)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    recorder, path = Recorder(), tmp_path / "checkpoint.pt"
    options: dict[str, Any] = {"theta": {"lr": torch.tensor(0.0)}, "checkpoint": path}
    trainer = MetaTrainer(quadratic_loop(), Interrupted(*[1.0] * 9), FinalLoss(), plain_sgd, recorder, **options)
    with pytest.raises(error) as caught:
        trainer.run(9)
    assert getattr(caught.value, "code", 130) == code == recorder.exit_codes[0]
    saved = torch.load(path, weights_only=True)
    assert saved["meta_step"] == 3 and saved["theta"]["lr"] == -3.0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    class Impatient(Script):
        def estimate(self, *args: Any) -> Estimate:
            if len(self.thetas) == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail("the second Ctrl-C came too late")
            return super().estimate(*args)

    recorder, path = Recorder(), tmp_path / "checkpoint.pt"
    options: dict[str, Any] = {"theta": {"lr": torch.tensor(0.0)}, "checkpoint": path, "checkpoint_every": 2}
    trainer = MetaTrainer(quadratic_loop(), Impatient(*[1.0] * 9), FinalLoss(), plain_sgd, recorder, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(9)
    assert recorder.exit_codes == [130]
    assert torch.load(path, weights_only=True)["meta_step"] == 2  # the last whole one


def test_a_signal_during_the_report_does_not_wait() -> None:
    def report(result: TrainingResult, tracker: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM came too late")

    trainer, _, recorder = scripted(1.0, report=report)
    with pytest.raises(SystemExit) as caught:
        trainer.run(1)
    assert caught.value.code == 143 and recorder.exit_codes == [143]


def test_it_runs_outside_the_main_thread() -> None:
    trainer, _, _ = scripted(1.0, 1.0)
    found: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: found.append(trainer.run(2)))
    thread.start()
    thread.join()
    assert found[0].theta["lr"] == -2.0


# Bad input


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_tasks": 0}, "num_tasks=0 is not a count"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"max_skips_in_a_row": 0}, "max_skips_in_a_row=0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0 must be positive"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan must be positive"),
        ({"seed": -1}, "seed=-1 is not a count"),
        ({"seed": 2**32}, "seed=4294967296 is too large"),
        ({"theta": {}}, "theta is empty: neither rule nor inner objective"),
        ({"meta_optimizer": lambda params: torch.optim.LBFGS(params)}, r"LBFGS\.step needs closure"),
        ({"scheduler": lambda o: ReduceLROnPlateau(o)}, "needs metrics"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        scripted(1.0, **options)


def test_a_state_that_no_checkpoint_could_keep_is_refused_before_the_work(tmp_path: Path) -> None:
    def adam(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, np.float64(0.1))

    scripted(1.0, meta_optimizer=adam)
    with pytest.raises(TypeError, match=r"cannot keep the state of the meta-optimizer Adam.*float\(\)"):
        scripted(1.0, meta_optimizer=adam, checkpoint=tmp_path / "checkpoint.pt")


def test_an_unknown_setting_is_refused_and_the_known_ones_are_in_the_signature() -> None:
    with pytest.raises(TypeError, match="max_norm"):
        scripted(1.0, max_norm=1.0)
    parameters = inspect.signature(MetaTrainer).parameters.values()
    assert {"num_tasks", "seed", "validation"} < {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert not [p for p in parameters if p.kind is p.VAR_KEYWORD]


@dataclass
class Pair:
    """A dataclass, which a carry may hold."""

    first: Any
    second: Any


STRANGE: dict[str, tuple[Any, str]] = {
    "an object": (object(), "a object at carry, "),
    "a generator": ({"noise": torch.Generator()}, r'a torch._C.Generator at carry\["noise"\].*get_state\(\)'),
    "a string": ([0, (1.0, "up")], r'a str "up" at carry\[1\]\[1\]'),
    "a NumPy number": ({"a": {7: np.float64(0.5)}}, r'a numpy.float64 .* at carry\["a"\]\[7\].*float\(\)'),
    "a NumPy array": (np.zeros(2), "a numpy.ndarray at carry, "),
    "a set": (Pair(1, {2}), r"a set at carry\.second"),
    "a dict of strange keys": ({"a": {(1, 2): 3.0}}, r'a dict with the keys \[\(1, 2\)\] at carry\["a"\]'),
    "a class": ({"kind": Pair}, r'a type at carry\["kind"\]'),
    "a complex number": (Carry({}, {}, 1j), r"a complex at carry\.state"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_carry_that_no_checkpoint_could_keep_is_refused_before_the_first_step(kind: str) -> None:
    strange, told = STRANGE[kind]

    class Odd(Script):
        def start(self, *args: Any) -> Any:
            return strange

    odd, recorder = Odd(1.0), Recorder()
    trainer = MetaTrainer(quadratic_loop(), odd, FinalLoss(), plain_sgd, recorder, theta={"lr": torch.tensor(0.0)})
    with pytest.raises(TypeError, match=f"the carry of Odd has {told}".replace('"', "['\"]")):
        trainer.run(1)
    assert not odd.thetas and not recorder.calls and trainer.progress.meta_step == 0


def test_a_carry_that_turns_strange_is_refused_at_that_step(tmp_path: Path) -> None:
    class Turning(Script):
        def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
            return super().estimate(loop, theta, objective, carry)._replace(carry=self.later)

        later: Any = None

    for later, told, options in (
        ({"noise": "red"}, r"a str 'red' at carry\['noise'\]", {}),
        (Pair(1, 2), r"holds \['.*:Pair'\], which are not in what Turning\.start", {"checkpoint": tmp_path / "a.pt"}),
    ):
        turning = Turning(1.0, 1.0)
        turning.later = later
        trainer = MetaTrainer(quadratic_loop(), turning, FinalLoss(), tracker=None, **options)
        with pytest.raises(TypeError, match=told):
            trainer.run(2)
        assert len(turning.thetas) == 1 and trainer.progress.meta_step == 0


def test_what_an_estimator_keeps_of_theta_does_not_move_with_it() -> None:
    class Keeper(GradientEstimator):
        def start(self, loop: InnerLoop, theta: Theta, tasks: Any, generator: torch.Generator) -> Any:
            return [theta["lr"]]

        def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
            kept.append([float(x) for x in carry])
            return Estimate(torch.tensor(1.0), {"lr": torch.tensor(1.0)}, [*carry, theta["lr"].detach()], {})

    kept: list[list[float]] = []
    theta = {"lr": torch.tensor(0.0)}
    MetaTrainer(quadratic_loop(), Keeper(), FinalLoss(), plain_sgd, None, theta=theta).run(3)
    assert kept == [[0.0], [0.0, 0.0], [0.0, 0.0, -1.0]]


def test_a_rule_without_meta_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="neither rule nor inner objective has meta-parameters"):
        MetaTrainer(quadratic_loop("sgd", learn=()), Unrolled(1), FinalLoss())


def test_theta_of_another_rule_is_refused_before_the_first_inner_step() -> None:
    with pytest.raises(ValueError, match="this theta is not one of LSTM"):
        MetaTrainer(quadratic_loop("lstm"), Unrolled(1), FinalLoss(), theta={"lr": torch.tensor(0.1)})


@pytest.mark.parametrize("setting", ["num_steps", "num_tasks", "every", "seed"])
def test_validation_refuses_what_is_no_count(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=-1 is not a count"):
        held_out(FinalLoss(), **{setting: -1})


def test_a_validation_objective_must_be_a_scalar() -> None:
    def per_task(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return loop.losses(theta, rollout.end, "valid")

    trainer, _, _ = scripted(1.0, validation=held_out(per_task, num_tasks=2, every=1))
    with pytest.raises(ValueError, match=r"must return a scalar tensor, got a tensor of shape \(2,\)"):
        trainer.run(1)


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_the_number_of_meta_steps_is_a_count(count: Any) -> None:
    with pytest.raises(ValueError, match="num_meta_steps="):
        scripted(1.0)[0].run(count)
