"""An average of theta, and the way back to it when a meta-training diverges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import held_out, quadratic_loop, scripted

from learnedopt import FinalLoss, MetaTrainer, TrainingDiverged, Unrolled
from learnedopt.training.steadying import PACE

pytestmark = pytest.mark.usefixtures("float64")
NAN, INF = math.nan, math.inf


def trained(folder: Path, last: int = 6, **options: Any) -> Any:
    trainer = MetaTrainer(
        quadratic_loop("momentum", lr=0.003), Unrolled(4), FinalLoss(), lambda p: torch.optim.Adam(p, 0.02), None,
        num_tasks=2, checkpoint=folder / "checkpoint.pt", **options,
    )  # fmt: skip
    return trainer, trainer.run(last)


def test_the_average_is_the_stated_one_and_what_is_returned() -> None:
    trainer, script, recorder = scripted(1.0, -2.0, 0.5, average=0.25)
    assert trainer.run(3).theta == {"lr": torch.tensor(0.25 * 0.5 + 0.75 * (0.25 * 1.0 + 0.75 * 0.25 * -1.0))}
    assert script.thetas == [0.0, -1.0, 1.0] and float(trainer.theta["lr"].detach()) == 0.5  # theta itself as without
    assert all("rollbacks" not in row for row in recorder.rows)


def test_the_path_of_theta_is_the_same_with_an_average(tmp_path: Path) -> None:
    plain, result = trained(tmp_path / "plain")
    averaged, smooth = trained(tmp_path / "averaged", average=0.3)
    for k, v in plain.theta.items():
        assert torch.equal(v, averaged.theta[k]) and torch.equal(v.detach(), result.theta[k])
        assert not torch.equal(smooth.theta[k], result.theta[k])
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("plain", "averaged")]
    assert "steadied" not in saved[0] and saved[1].keys() - saved[0].keys() == {"steadied"}


def test_the_average_is_what_is_validated_and_the_best_one_is_kept() -> None:
    validation = held_out(FinalLoss(), num_steps=3, every=1)
    trainer, _, recorder = scripted(-0.01, -0.03, -0.2, average=0.5, validation=validation)
    result = trainer.run(3)
    average, theta, values = 0.0, 0.0, [validation.measure({"lr": torch.tensor(0.0)})]
    for step in (0.01, 0.03, 0.2):
        theta += step
        average += 0.5 * (theta - average)
        values.append(validation.measure({"lr": torch.tensor(average)}))
    assert [row["validation"] for row in recorder.rows] == pytest.approx(values, rel=1e-14)
    assert result.best_value == min(row["validation"] for row in recorder.rows)
    assert validation.measure(result.best_theta) == result.best_value


@pytest.mark.parametrize(
    "bad",
    [(1.0, 3.0), (1.0, NAN), (1.0, INF), (NAN, 1.0), (INF, 1.0)],
    ids=["too high", "nan loss", "infinite loss", "nan gradient", "infinite gradient"],
)
def test_what_diverges_goes_back_to_the_average(bad: tuple[float, float]) -> None:
    trainer, script, recorder = scripted((-1.0, 2.0), (-1.0, 1.0), bad, (-1.0, 1.0), average=0.5, rollback_above=0.9)
    result = trainer.run(4)
    # 0, 1, 2, whose average is 0.5 + 0.5 (2 - 0.5); from there on another step.
    assert script.thetas == [0.0, 1.0, 2.0, 1.25]
    assert float(trainer.theta["lr"].detach()) == 2.25 and float(result.theta["lr"]) == 1.25 + 0.5
    assert [row["rollbacks"] for row in recorder.rows] == [0, 0, 1, 1] and result.num_skipped == 1
    assert [carry.step for carry in script.carries] == [0, 1, 2, 0]  # the episode was dropped


def test_too_high_is_above_the_lowest_running_mean() -> None:
    mean = 2.0 + PACE * (1.0 - 2.0)
    for loss, back in ((mean + 0.89, 0), (mean + 0.91, 1)):
        trainer, _, recorder = scripted((0.0, 2.0), (0.0, 1.0), (0.0, loss), average=0.5, rollback_above=0.9)
        trainer.run(3)
        assert recorder.rows[-1]["rollbacks"] == back
    # The first loss is above nothing.
    trainer, _, recorder = scripted((0.0, 1e9), average=0.5, rollback_above=0.9)
    trainer.run(1)
    assert recorder.rows[-1]["rollbacks"] == 0


def test_going_back_forgets_the_momenta_and_keeps_the_schedule() -> None:
    trainer, script, _ = scripted(
        (-1.0, 1.0), (-1.0, 9.0), (-1.0, 1.0), average=1.0, rollback_above=1.0,
        meta_optimizer=lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )  # fmt: skip
    trainer.run(3)
    # The second step is not taken, nor does the schedule go on; the third is one of .5, without the first's momentum.
    assert script.thetas == [0.0, 1.0, 1.0] and float(trainer.theta["lr"].detach()) == 1.5
    assert trainer.meta_optimizer.param_groups[0]["lr"] == 0.25


def test_going_back_again_and_again_is_an_error() -> None:
    trainer, *_ = scripted((-1.0, 1.0), *[(-1.0, 5.0)] * 5, average=0.5, rollback_above=1.0, max_skips_in_a_row=3)
    with pytest.raises(TrainingDiverged, match=r"were not finite, or of too high a loss \(meta-step 4, 3 sk"):
        trainer.run(6)


def test_an_average_belongs_to_the_training(tmp_path: Path) -> None:
    trained(tmp_path / "plain", 2)
    with pytest.raises(ValueError, match=r"another training, with average None instead of 0\.3"):
        trained(tmp_path / "plain", 4, average=0.3)
    trained(tmp_path / "averaged", 2, average=0.3)
    with pytest.raises(ValueError, match=r"another training, with average 0\.3 instead of None"):
        trained(tmp_path / "averaged", 4)


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"average": 0.0}, ValueError, r"average=0\.0 is the share of the newest theta"),
        ({"average": 1.5}, ValueError, r"average=1\.5 is the share"),
        ({"average": NAN}, ValueError, "average=nan is the share"),
        ({"average": True}, TypeError, "average=True is a bool"),
        ({"average": 0.1, "rollback_above": "1"}, TypeError, "rollback_above='1' is a str"),
        ({"average": 0.1, "rollback_above": 0.0}, ValueError, r"rollback_above=0\.0 says how far"),
        ({"average": 0.1, "rollback_above": INF}, ValueError, "rollback_above=inf says how far"),
        ({"rollback_above": 1.0}, ValueError, "goes back to the average of theta, and there is none"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        scripted(1.0, **options)
