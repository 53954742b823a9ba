"""Trainings whose tasks fail: they go on over the others, resume exactly, keep the best theta, and say what was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_tasks import Failing
from problems import FLOAT, Mix, Quadratic, TanhMLP, newcomers
from test_trainer import Recorder
from torch import Tensor

from learnedopt import (
    EvolutionStrategies,
    FinalLoss,
    Implicit,
    InnerLoop,
    MetaTrainer,
    PersistentES,
    SumOfLosses,
    TaskByTask,
    TrainingDiverged,
    Truncated,
    Unrolled,
    Validation,
    optimizers,
)
from learnedopt.checkpoint import load_checkpoint
from learnedopt.config import override
from learnedopt.core.clipping import norm_of
from learnedopt.estimators.registry import ESTIMATORS as REGISTERED
from learnedopt.training.failures import Failures
from learnedopt.training.faults import Fault
from learnedopt.training.isolation import Failure
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.ranks import Ranks
from learnedopt.training.tracking import Tracking
from learnedopt.training.validation import Judgement

pytestmark = pytest.mark.usefixtures("float64")
ESTIMATORS = {
    "unrolled": Unrolled(3),
    "truncated": Truncated(2, horizon=6),
    "es": EvolutionStrategies(3, num_pairs=2, sigma=0.02),
    "pes": PersistentES(2, horizon=6, num_pairs=3, sigma=0.02),
    "task by task": TaskByTask(Unrolled(3)),
}
OF_OTHER_TESTS = ("TruncatedBackprop", "Implicit", "ForwardMode", "Combined")
ESTIMATORS |= newcomers(REGISTERED, ESTIMATORS.values(), 3, besides=OF_OTHER_TESTS)


def trainer(family: Any, estimator: Any, tracker: Any = None, **options: Any) -> MetaTrainer:
    loop = InnerLoop(family, optimizers.make("momentum", lr=0.05))
    options = {"num_tasks": 8, "seed": 3, **options}
    return MetaTrainer(loop, estimator, SumOfLosses(), lambda p: torch.optim.Adam(p, 0.01), tracker, **options)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_tasks_that_fail_with_a_chance_of_a_fifth_train_to_the_end(name: str) -> None:
    recorder = Recorder()
    made = trainer(Failing(0.2, at=1), ESTIMATORS[name], recorder)
    before = made.loop.init_theta(torch.Generator())
    result = made.run(30)
    assert result.meta_step == 30 and result.num_skipped <= 1
    assert all(v.isfinite().all() and not torch.equal(v, before[k]) for k, v in result.theta.items())
    failed = [row for row in recorder.rows if "failed_tasks" in row]
    assert len(failed) > 15 and all(math.isfinite(row["meta_loss"]) for row in recorder.rows if not row["skipped"])
    named = [row["failed"] for row in failed if "failed" in row]
    assert all("batch['c'] at inner step" in words and "(task seed " in words for words in named) and len(named) > 4


def test_a_start_at_which_tasks_fail_is_no_reason_not_to_train() -> None:
    for seed in range(4):
        result = trainer(Failing(0.3, at=0), Unrolled(2), seed=seed, max_failed_share=0.9).run(3)
        assert result.num_skipped == 0
    with pytest.raises(ValueError, match="is not finite at the start"):
        trainer(Failing(1.0, at=0), Unrolled(2)).run(3)


def test_the_loss_of_a_training_is_that_of_its_finite_tasks() -> None:
    recorder = Recorder()
    trainer(Failing(at=1, listed=(2, 3)), Unrolled(2), recorder, max_failed_share=0.25).run(2)
    others = Recorder()
    trainer(Failing(at=1, listed=()), Unrolled(2), others, max_failed_share=0.0).run(2)
    assert recorder.rows[0]["failed_tasks"] == 2 and "failed_tasks" not in others.rows[0]
    assert recorder.rows[0]["meta_loss"] != others.rows[0]["meta_loss"]
    assert recorder.rows[1]["failed"].startswith("task 2 of episode 1: batch['c'] at inner step 1 (task seed ")
    assert recorder.rows[1]["failed"].count("; task 3 of episode 1: ") == 1


def test_more_failures_than_the_stated_share_skip_a_meta_step_and_then_end_the_training() -> None:
    for share, listed in ((0.2, (0, 1)), (0.0, (0,)), (0.9, tuple(range(8)))):
        recorder = Recorder()
        made = trainer(
            Failing(at=1, listed=listed), Unrolled(2), recorder, max_failed_share=share, max_skips_in_a_row=3
        )
        with pytest.raises(TrainingDiverged, match=r"3 meta-gradients in a row.*\(meta-step 3, 3 skipped") as raised:
            made.run(9)
        assert torch.equal(raised.value.result.theta["lr"], torch.tensor(0.05, dtype=FLOAT))
        assert recorder.rows[-1]["skipped"] == 3
        names = "(task 0 of episode 2: batch['c'] at inner step 1 (task seed "
        assert (names in str(raised.value)) == (share > 0)
        assert ("2 of 8 tasks had failed (max_failed_share=0.2)" in str(raised.value)) == (share == 0.2)
        assert ("; and 3 more)" in str(raised.value)) == (share == 0.9)


def test_a_share_of_none_skips_a_meta_step_also_where_the_estimator_leaves_a_task_out() -> None:
    for estimator in (TaskByTask(Unrolled(2)), EvolutionStrategies(2, 2, 0.02)):
        made = trainer(Failing(at=1, listed=(0,)), estimator, max_failed_share=0.0, max_skips_in_a_row=2)
        with pytest.raises(TrainingDiverged, match=r"1 of 8 tasks had failed \(max_failed_share=0.0\)"):
            made.run(3)


def test_one_process_alone_warns_of_the_first_failures(caplog: pytest.LogCaptureFixture) -> None:
    failures = [Failure(3, Fault("loss", 2, 7))]
    for warns in (False, True):
        caplog.clear()
        made = Failures(warns=warns)
        for _ in range(2):
            told = made.told(failures, 1, 4)
        assert told == {"failed_tasks": 1, "failed": "task 3 of episode 4: loss at inner step 2 (task seed 7)"}
        assert [record.levelname for record in caplog.records] == ["WARNING"] * warns


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_hyperparameter_that_has_left_its_range_is_named(share: float, caplog: pytest.LogCaptureFixture) -> None:
    rule = optimizers.Clip(optimizers.Adam(lr=0.1, learn=("lr", "beta2")), 1.0)
    outside = {"rule/lr": torch.tensor(0.1), "rule/beta2": torch.tensor(1.25)}
    options: dict[str, Any] = {"tracker": None, "num_tasks": 4, "max_skips_in_a_row": 2, "max_failed_share": share}
    with pytest.raises(TrainingDiverged, match=r"Theta had left its range: rule/beta2 is 1\.25 and must be at least 0"):
        MetaTrainer(InnerLoop(Failing(0.0), rule), Unrolled(3), SumOfLosses(), theta=outside, **options).run(3)
    assert ("Theta has left its range: rule/beta2 is 1.25 and" in caplog.text) == (share > 0)
    with pytest.raises(TrainingDiverged, match="Lower the meta-learning rate") as raised:
        MetaTrainer(InnerLoop(Failing(1.0, at=1), rule), Unrolled(3), SumOfLosses(), **options).run(3)
    assert "range" not in str(raised.value)


def test_rules_hand_on_which_hyperparameters_have_left_their_range() -> None:
    momentum = optimizers.Momentum(lr=0.1, momentum=0.5)
    on_scales = optimizers.Reparametrized(momentum, {"momentum": "logit"})
    rule = optimizers.Partition({"a": ("a*", momentum), "b": ("*", on_scales)})
    theta = {"a/lr": -0.5, "a/momentum": -1.0, "b/rule/lr": -2.0, "b/rule/momentum": -3.0}
    assert rule.theta_faults({k: torch.tensor(v) for k, v in theta.items()}) == {
        "a/lr": "is -0.5 and must be at least 0 and finite",
        "a/momentum": "is -1 and must be at least 0 and finite",
        "b/rule/lr": "is -2 and must be at least 0 and finite",
    }


def test_tasks_that_the_estimator_draws_are_of_no_episode_that_is_counted() -> None:
    fault = Failure(3, Fault("loss", 2, 7))
    told = Failures(PersistentES(2, 4, 2, 0.1).renews_tasks, warns=False).told([fault], 1, 0)
    assert told == {"failed_tasks": 1, "failed": "task 3: loss at inner step 2 (task seed 7)"}


def test_an_episode_that_loses_too_many_tasks_is_given_up() -> None:
    class Dwindling(Failing):
        """One task after the other fails, at the steps 1, 3, 5, ..."""

        def batch(self, tasks: Any, step: int, split: Any) -> Any:
            batch = Quadratic.batch(self, tasks, step, split)
            failing = tasks["seed"] < step / 2
            return {**batch, "c": torch.where(failing[:, None], torch.nan, batch["c"])}

        def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
            return {**super().sample(num_tasks, generator), "seed": torch.arange(num_tasks)}

    recorder = Recorder()
    trainer(Dwindling(), Truncated(2, horizon=None), recorder, num_tasks=6, max_failed_share=0.5).run(8)
    # Three of six may be missing; with the fourth the episode is over, and another begins.
    assert [row.get("failed_tasks", 0) for row in recorder.rows] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [row["skipped"] for row in recorder.rows] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert recorder.rows[2]["failed"].startswith("task 2 of episode 0: batch['c'] at inner step 5 (task seed 2)")


@pytest.mark.parametrize("name", ["truncated", "pes", "task by task"])
def test_a_training_over_what_is_left_of_a_meta_batch_resumes_exactly(name: str, tmp_path: Path) -> None:
    def made(path: str) -> MetaTrainer:
        family = Failing(0.3, at=2) if name != "task by task" else Mix(Failing(0.3, at=2), TanhMLP())
        return trainer(family, ESTIMATORS[name], JsonLinesTracker(tmp_path / f"{path}.jsonl"),
                       checkpoint=tmp_path / path, checkpoint_every=1)  # fmt: skip

    whole = made("whole").run(7)
    for stop in range(1, 8):
        parts = made("parts").run(stop)
    torch.testing.assert_close(parts.theta, whole.theta, rtol=0, atol=0)
    rows = [
        [{k: v for k, v in row.items() if k != "step_ms"} for row in read_metrics(tmp_path / f"{path}.jsonl")]
        for path in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and sum("failed" in row for row in rows[0]) > 1


@pytest.mark.parametrize("name", ["unrolled", "truncated", "implicit", "es", "pes", "task by task"])
def test_micro_batches_train_as_all_tasks_at_once(name: str) -> None:
    def thetas(micro_batch: int | None) -> dict[str, Tensor]:
        if name != "implicit":
            return trainer(Quadratic(), ESTIMATORS[name], micro_batch=micro_batch, num_tasks=5).run(4).theta
        from test_shares import problem

        loop, objective = problem("implicit")
        estimator = Implicit(200)
        return MetaTrainer(
            loop, estimator, objective, lambda p: torch.optim.SGD(p, 0.01), None, num_tasks=5, micro_batch=micro_batch
        ).run(4).theta  # fmt: skip

    whole = thetas(None)
    for micro_batch in (1, 2, 4):
        torch.testing.assert_close(thetas(micro_batch), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(thetas(5), whole, rtol=0, atol=0)


def test_micro_batches_run_so_many_tasks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    estimate = Unrolled.estimate

    def watched(self: Unrolled, loop: Any, theta: Any, objective: Any, carry: Any) -> Any:
        sizes.append(len(carry.params["b"]))
        return estimate(self, loop, theta, objective, carry)

    monkeypatch.setattr(Unrolled, "estimate", watched)
    trainer(Quadratic(), Unrolled(2), num_tasks=8, micro_batch=3).run(1)
    assert sizes == [3, 3, 2]
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"micro_batch=.*is not a count"):
            trainer(Quadratic(), Unrolled(2), micro_batch=wrong)
    for wrong in (1.0, -0.1, True, math.nan, "all"):
        with pytest.raises(ValueError, match=r"max_failed_share=.*is no share of the tasks"):
            trainer(Quadratic(), Unrolled(2), max_failed_share=wrong)


class Ends(Quadratic):
    """Held-out tasks, of which each fails where lr exceeds its limit; the larger lr is, the better are the others."""

    def __init__(self, *limits: float) -> None:
        super().__init__()
        self.limits = torch.tensor(limits, dtype=FLOAT)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        ends = {"limit": self.limits[:num_tasks], "value": torch.arange(num_tasks, dtype=FLOAT) + 3}
        return {**super().sample(num_tasks, generator), **ends}


def held_out(*limits: float) -> Validation:
    loop = InnerLoop(Ends(*limits), optimizers.make("sgd", lr=0.1))

    def objective(loop: InnerLoop, theta: Any, rollout: Any) -> Tensor:
        tasks = rollout.end.tasks
        return torch.where(theta["lr"] > tasks["limit"], torch.nan, tasks["value"] - theta["lr"]).mean()

    return Validation(loop, objective, num_steps=1, num_tasks=len(limits))


def test_a_theta_that_lets_held_out_tasks_fail_beats_none_that_does_not() -> None:
    validation = held_out(9.0, 9.0, 0.5, 0.2)
    judged = {lr: validation.judge({"lr": torch.tensor(lr, dtype=FLOAT)}) for lr in (0.1, 0.15, 0.3, 0.6, 10.0)}
    assert [found.num_failed for found in judged.values()] == [0, 0, 1, 2, 4]
    assert judged[0.1].beats(None) and judged[0.15].beats(judged[0.1]) and not judged[0.1].beats(judged[0.15])
    # The more tasks fail the better the mean of the others is, here: it must not count.
    assert judged[0.6].value < judged[0.3].value < judged[0.1].value
    for low, high in ((0.1, 0.3), (0.3, 0.6), (0.1, 0.6), (0.1, 10.0)):
        assert judged[low].beats(judged[high]) and not judged[high].beats(judged[low])
    assert not judged[10.0].beats(None) and math.isnan(judged[10.0].value)
    assert judged[0.6].value == pytest.approx((3 + 4) / 2 - 0.6)  # of the finite ones alone
    assert (
        math.isnan(validation.measure({"lr": torch.tensor(0.3)})) and validation.measure({"lr": torch.tensor(0.1)}) < 9
    )


def test_a_held_out_task_that_always_fails_hides_no_best_theta(tmp_path: Path) -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("momentum", lr=0.01))
    bad = InnerLoop(Failing(at=1, listed=(1,)), optimizers.make("momentum", lr=0.01))

    def made(recorder: Recorder, path: str) -> MetaTrainer:
        return MetaTrainer(
            loop, Unrolled(4), FinalLoss(), lambda p: torch.optim.Adam(p, 0.02), recorder, num_tasks=4,
            validation=Validation(bad, FinalLoss(), 4, num_tasks=4, every=1), checkpoint=tmp_path / path,
            checkpoint_every=1,
        )  # fmt: skip

    recorder = Recorder()
    result = made(recorder, "whole").run(5)
    values = [row["validation"] for row in recorder.rows]
    assert all(map(math.isfinite, values)) and result.best_value == min(values) < values[0]
    assert [row["validation_failed"] for row in recorder.rows] == [1] * 6
    made(Recorder(), "parts").run(2)
    resumed = made(Recorder(), "parts")
    assert resumed.run(5).best_value == result.best_value and resumed.progress.best_failed == 1
    assert Judgement(result.best_value, 1).beats(Judgement(values[0], 1))


def test_a_step_that_leaves_theta_not_finite_is_undone_and_told() -> None:
    class Overflowing(torch.optim.SGD):
        """Its second step leaves an infinite entry, as a step in float16 may."""

        def step(self, closure: Any = None) -> Any:
            result, group = super().step(closure), self.param_groups[0]
            group["steps"] = group.get("steps", 0) + 1
            if group["steps"] == 2:
                with torch.no_grad():
                    group["params"][0].fill_(torch.inf)
            return result

    recorder = Recorder()
    loop = InnerLoop(Quadratic(), optimizers.make("momentum", lr=0.05))
    made = MetaTrainer(loop, Unrolled(2), FinalLoss(), lambda p: Overflowing(p, 1e-3), recorder, num_tasks=2)
    first = {k: v.clone() for k, v in made.run(1).theta.items()}
    second = made.run(2)
    torch.testing.assert_close(second.theta, first, rtol=0, atol=0)
    assert second.num_skipped == 1 and made.run(3).num_skipped == 1
    assert all(v.isfinite().all() for v in made.theta.values())


def test_a_theta_in_float16_that_adam_makes_nan_ends_the_training_and_is_not_kept() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("momentum", lr=0.05))
    theta = {k: v.to(torch.float16) for k, v in loop.init_theta(torch.Generator()).items()}
    made = MetaTrainer(
        loop, Unrolled(2), SumOfLosses(), lambda p: torch.optim.Adam(p, 0.01, eps=0.0), None, num_tasks=2, theta=theta,
        max_skips_in_a_row=2,
    )  # fmt: skip
    made._update.gradients = lambda grads: _vanishing(made, grads)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TrainingDiverged, match=r"theta \(torch.float16\) was not finite after it.*float32") as raised:
        made.run(9)
    assert raised.value.result.meta_step == 2
    torch.testing.assert_close(raised.value.result.best_theta, theta, rtol=0, atol=0)


def _vanishing(made: MetaTrainer, grads: Any) -> Any:
    """Return zeros, as small gradients are in float16, of which Adam without eps makes 0 / 0."""
    found = {k: torch.zeros_like(g) for k, g in grads.items()}
    return found, norm_of(found)


def test_the_best_theta_of_a_training_that_diverged_is_written_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from learnedopt import recipes, run

    recipe = override(
        recipes.make("tensor-gru-quadratic"),
        [
            "num_meta_steps=30",
            "num_tasks=4",
            "validation.every=1",
            "validation.num_tasks=4",
            "validation.num_steps=10",
            "estimator.num_steps=5",
            "estimator.horizon=10",
        ],
    )
    steps = iter(range(10**9))
    estimate = type(recipe.estimator).estimate

    def failing_from_third(*given: Any) -> Any:
        found = estimate(*given)
        return found if next(steps) < 3 else found._replace(loss=found.loss * torch.nan)

    monkeypatch.setattr(type(recipe.estimator), "estimate", failing_from_third)
    with pytest.raises(
        TrainingDiverged, match=r"The best theta so far \(validation [\d.]+\) is in .*theta.safetensors"
    ):
        run.train(recipe, tmp_path / "run", Tracking("disabled"))
    saved = load_checkpoint(tmp_path / "run" / "theta.safetensors")
    _, validation = run.build(recipe)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation" in row]
    best = min(row["validation"] for row in rows)
    assert (
        validation.measure(saved.theta) == pytest.approx(best, rel=1e-6) and saved.metadata["best_validation"] == best
    )
    assert not (tmp_path / "run" / "training.png").exists()  # that is of finished trainings


def test_the_memory_that_is_told_is_of_the_tasks_that_are_estimated_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    from learnedopt import recipes, run

    few = ["estimator.num_steps=3", "estimator.horizon=6", "execution.chunk_size=8"]

    def said(ranks: Ranks, *sets: str) -> str:
        recipe = override(recipes.make("tensor-gru-quadratic"), [*few, *sets])
        loop, _ = run.build(recipe)
        run.say_memory(recipe, loop, loop.init_theta(torch.Generator().manual_seed(0)), ranks)
        return capsys.readouterr().out

    four = said(Ranks(), "num_tasks=4")
    assert four == said(Ranks(), "num_tasks=8", "meta.micro_batch=4") == said(Ranks(0, 2), "num_tasks=8")
    assert four != said(Ranks(), "num_tasks=8")
