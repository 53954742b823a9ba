"""Meta-trainings that several processes share: the same meta-gradients, resumed on other numbers, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rank_processes import (
    KINDS,
    NUM_META_STEPS,
    PATIENCE,
    SIZES,
    Case,
    commanded,
    differing,
    diverging,
    goes_on,
    joins,
    more_than_pairs,
    more_than_tasks,
    of_no_shares,
    of_ranks_of_pairs,
    one_dies,
    one_fails,
    one_sleeps,
    side_by_side,
    stopped,
    trained,
)

import learnedopt
from learnedopt.training.json_tracker import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
DIFFERENCES = {
    "seed": r"seed is '5\.0' on rank 1, '0\.0' on rank 0",
    "torch": r"torch is '1\.0' on rank 1",
    "estimator": r"estimator is 'Unrolled",
    "rule": r"; rule is 'Clip|: rule is 'Clip",
    "recipe": r"config\.meta\.lr is '0\.1' on rank 1, '0\.2' on rank 0",
}


def cases(folder: Path) -> list[Case]:
    """Return all that processes do together in these tests."""
    found = [Case(f"{kind} {dtype} {size}", size, trained, (kind, dtype)) for kind, dtype, size in EXACT]
    found += [Case(f"{kind} {size}", size, trained, (kind, "float64")) for kind in PARTS for size in (1, *PARTS[kind])]
    found += [Case("more than pairs", 4, more_than_pairs, ()), Case("ranks of pairs", 2, of_ranks_of_pairs, ())]
    for kind in RESUMED:
        path = folder / f"{kind}.pt"
        found += [Case(f"{kind} to {steps}", size, goes_on, (kind, path, steps)) for size, steps in RESUMED_AT]
        found += [Case(f"{kind} at once", 1, goes_on, (kind, folder / f"{kind} at once.pt", NUM_META_STEPS))]
    for at, number in ((2, signal.SIGTERM), (1, signal.SIGINT)):
        found += [Case(f"stopped by {number.name}", 2, stopped, (folder, number, at))]
    found += [Case("after the stop", 1, goes_on, ("truncated", folder / "stopped.pt", NUM_META_STEPS))]
    found += [Case(f"another {what}", 2, differing, (what,)) for what in DIFFERENCES]
    found += [Case("diverging", 2, diverging, ()), Case("more than tasks", 3, more_than_tasks, ())]
    found += [Case("no shares", 2, of_no_shares, ()), Case("no shares, alone", 1, of_no_shares, (folder / "one.pt",))]
    found += [Case("no shares, from one", 2, of_no_shares, (folder / "one.pt",))]
    found += [Case(f"backend {name}", 2, joins, (name, None)) for name in ("mpi", "nccl", "gloo")]
    found += [Case("late", 3, joins, (None, None, PATIENCE, True))]
    found += [Case(f"commanded {size}", size, commanded, (command(folder / str(size)),)) for size in (1, 2)]
    found += [Case("commanded, another", 2, commanded, ([*command(folder / "2"), "--set", "seed=3"],))]
    found += [Case("a study", 2, commanded, (["fmrl-convex", "--runs", str(folder)],))]
    found += [Case("one fails", 3, one_fails, ()), Case("one sleeps", 3, one_sleeps, ())]
    return [*found, Case("one dies", 4, one_dies, ())]


def command(runs: Path) -> list[str]:
    """Return the arguments of a small meta-training."""
    sets = ["num_meta_steps=3", "num_tasks=3", "estimator.num_steps=2", "estimator.horizon=4"]
    sets += ["validation.num_tasks=2", "validation.num_steps=2", "validation.every=1"]
    return [
        "lstm-quadratic",
        "--runs",
        str(runs),
        "--wandb",
        "disabled",
        *(x for each in sets for x in ("--set", each)),
    ]


PARTS = {
    "es of one task": (2, 3),
    "es in windows": (3, 4),
    "pes of one task": (2, 3),
    "pes of two tasks": (3, 4),
    "es, high": (2, 3),
    "pes, high": (2, 3),
    "es, failing": (4,),
}
"""Of fewer tasks than these numbers of processes: their pairs are shared."""
SHARED = [kind for kind in KINDS if kind not in PARTS]
# In float32 three are enough: what differs is rounding.
EXACT = [(kind, "float64", size) for kind in SHARED for size in SIZES] + [
    (kind, "float32", size) for kind in SHARED for size in (1, 3) if not KINDS[kind].fails
]
RESUMED = ("truncated", "pes", "es in windows", "pes of two tasks")
RESUMED_AT = ((2, 2), (1, 3), (4, NUM_META_STEPS))
"""Numbers of processes, and up to which meta-step."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where four processes have left what they did; they are started once, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    found = (base if worker_id == "master" else base.parent) / "ranks"
    with FileLock(f"{found}.lock"):
        if not found.is_dir():
            found.mkdir()
            side_by_side(cases(found), found)
    return found


@pytest.fixture(scope="session")
def answers(folder: Path) -> list[dict[str, Any]]:
    """Return what each process has found."""
    return [torch.load(folder / f"answers{rank}.pt") for rank in range(max(SIZES))]


def found(answers: list[dict[str, Any]], name: str, size: int) -> list[Any]:
    return [answers[rank][name] for rank in range(size)]


@pytest.mark.parametrize(("kind", "dtype", "size"), [each for each in EXACT if each[2] > 1])
def test_any_number_of_processes_has_the_meta_gradients_of_one(
    answers: list[dict[str, Any]], kind: str, dtype: str, size: int
) -> None:
    (expected,) = found(answers, f"{kind} {dtype} 1", 1)
    assert not isinstance(expected, str), expected
    for rank, each in enumerate(found(answers, f"{kind} {dtype} {size}", size)):
        assert not isinstance(each, str), each
        distance = (each["grads"] - expected["grads"]).norm(dim=1) / expected["grads"].norm(dim=1)
        assert len(distance) == NUM_META_STEPS
        assert distance.max() <= TOLERANCE[dtype]
        torch.testing.assert_close(each["theta"], expected["theta"], rtol=0, atol=TOLERANCE[dtype])
        assert each["best"] == pytest.approx(expected["best"], rel=TOLERANCE[dtype])
        assert bool(each["rows"]) == (rank == 0)
    told = answers[0][f"{kind} {dtype} {size}"]["rows"]
    assert [row["step"] for row in told] == [*range(NUM_META_STEPS + 1)]
    # Of a share with nothing finite its inner steps are not told.
    aside = {"step_ms", "gradient_variance"} | ({"inner_steps"} if kind == "failing pes" else set())
    for row, like in zip(told, expected["rows"], strict=True):
        for k in like.keys() - aside:
            assert row[k] == (like[k] if isinstance(like[k], str) else pytest.approx(like[k], rel=1e-4, abs=1e-6)), k


def test_a_task_that_fails_on_one_rank_is_named_by_the_first(answers: list[dict[str, Any]]) -> None:
    for size in SIZES:
        rows = answers[0][f"failing float64 {size}"]["rows"]
        assert [row.get("failed_tasks", 0) for row in rows] == [0, 0, 1, 1, 0]
        assert rows[2]["failed"].startswith("task 2 of episode 0")
        rows = answers[0][f"failing pes float64 {size}"]["rows"]
        assert [row.get("failed_tasks", 0) for row in rows] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind in PARTS for size in PARTS[kind]])
def test_fewer_tasks_than_processes_share_their_pairs(answers: list[dict[str, Any]], kind: str, size: int) -> None:
    expected = answers[0][f"{kind} 1"]
    assert not isinstance(expected, str), expected
    for each in found(answers, f"{kind} {size}", size):
        assert not isinstance(each, str), each
        assert each["grads"].shape == expected["grads"].shape
        distance = (each["grads"] - expected["grads"]).norm(dim=1) / expected["grads"].norm(dim=1)
        assert distance.max() <= 1e-12
        torch.testing.assert_close(each["theta"], expected["theta"], rtol=0, atol=1e-12)
    told = {"meta_loss", "not_finite", "failed_tasks", "skipped", "inner_loss"}
    for row, like in zip(answers[0][f"{kind} {size}"]["rows"], expected["rows"], strict=True):
        none = like.get("not_finite") == 3  # of nothing there is no mean
        for k in (told & like.keys()) - ({"meta_loss", "inner_loss"} if none else set()):
            assert row[k] == pytest.approx(like[k], rel=1e-12), k


def test_pairs_that_are_not_finite_on_one_rank_cost_no_other(answers: list[dict[str, Any]]) -> None:
    rows = answers[0]["es, high 3"]["rows"][1:]
    assert [(row["not_finite"], row["skipped"], "failed" in row) for row in rows] == [
        (0, 0, False), (2, 0, False), (3, 1, True), (1, 1, False)
    ]  # fmt: skip
    assert rows[2]["failed"].startswith("task 0 of episode 2")
    rows = answers[0]["pes, high 3"]["rows"][1:]
    assert [(row["not_finite"], row["skipped"]) for row in rows] == [(1, 0), (1, 0), (2, 1), (3, 2)]
    assert [row["failed_tasks"] for row in rows] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert all(row["failed"].startswith("task 0: ") for row in rows)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_training_goes_on_with_other_numbers_of_processes(answers: list[dict[str, Any]], kind: str) -> None:
    expected = answers[0][f"{kind} at once"]
    for size, steps in RESUMED_AT:
        for each in found(answers, f"{kind} to {steps}", size):
            assert not isinstance(each, str), each
    for each in found(answers, f"{kind} to {NUM_META_STEPS}", 4):
        torch.testing.assert_close(each["theta"], expected["theta"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "how"), [("SIGTERM", "SystemExit(143)"), ("SIGINT", "KeyboardInterrupt()")])
def test_a_signal_to_one_stops_all_at_one_meta_step(answers: list[dict[str, Any]], name: str, how: str) -> None:
    one, other = found(answers, f"stopped by {name}", 2)
    assert one == other == {"how": how, "step": one["step"], "saved": True}
    assert 0 < one["step"] < NUM_META_STEPS


def test_what_was_stopped_goes_on(answers: list[dict[str, Any]]) -> None:
    expected = answers[0]["truncated at once"]
    assert not isinstance(answers[0]["after the stop"], str), answers[0]["after the stop"]
    torch.testing.assert_close(answers[0]["after the stop"]["theta"], expected["theta"], rtol=0, atol=1e-12)


def assert_error(answers: list[dict[str, Any]], name: str, size: int, kind: str, *words: str) -> None:
    for each in found(answers, name, size):
        assert isinstance(each, str), each
        assert each.startswith(kind)
        assert all(word in each for word in words), each


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ_are_refused_on_all(answers: list[dict[str, Any]], what: str) -> None:
    for each in found(answers, f"another {what}", 2):
        with pytest.raises(AssertionError, match=DIFFERENCES[what]):
            raise AssertionError(each)


def test_divergence_is_raised_on_all(answers: list[dict[str, Any]]) -> None:
    assert found(answers, "diverging", 2) == [2, 2]


def test_fewer_tasks_than_processes_are_refused(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "more than tasks", 3, "ValueError: num_tasks=2", "3 processes", "start fewer processes")


def test_fewer_pairs_than_processes_are_refused(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "more than pairs", 4, "ValueError: num_tasks=1", "4 processes", "one of the 3 parts", "fewer")


def test_pairs_that_are_ranked_are_refused(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "ranks of pairs", 2, "Indivisible: ", "(ranked=True)", "leave ranked out")


@pytest.mark.parametrize("name", ["no shares", "no shares, from one"])
def test_an_estimator_that_knows_no_shares_is_refused(answers: list[dict[str, Any]], name: str) -> None:
    assert answers[0]["no shares, alone"] is None
    assert_error(answers, name, 2, "Indivisible: a meta-batch of Combined", "in one process")


def test_a_backend_that_is_not_there_is_refused(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "backend mpi", 2, "ValueError: the backend 'mpi'", "is not there", "gloo")
    assert_error(answers, "backend nccl", 2, "ValueError: the backend 'nccl'", "gloo")
    assert found(answers, "backend gloo", 2) == [2, 2]


def test_who_never_comes_is_named(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "late", 2, "RankFailed: ", "rank 2 did not come within 4 s")


def test_an_error_of_one_rank_is_told_by_all(answers: list[dict[str, Any]]) -> None:
    assert_error(
        answers, "one fails", 2, "RankFailed: ", "of meta-step 3", "rank 2 has failed with ValueError: its data"
    )
    assert answers[2]["one fails"].startswith("ValueError: its data are gone")


def test_a_rank_that_hangs_is_named(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "one sleeps", 2, "RankFailed: ", "of meta-step 3", "rank 2 did not come within 4 s")
    assert "RankFailed" in answers[2]["one sleeps"]


def test_a_rank_that_dies_ends_all(answers: list[dict[str, Any]]) -> None:
    assert_error(answers, "one dies", 3, "RankFailed: ", "of meta-step 3", "rank 3 has ended (it came last to: theta")
    assert "one dies" not in answers[3]


def test_the_command_trains_what_one_process_trains(answers: list[dict[str, Any]], folder: Path) -> None:
    assert answers[0]["commanded 1"][0] == 0
    (code, said), other = found(answers, "commanded 2", 2)
    assert code == 0
    assert "Best validation" in said
    assert other == (0, "")  # rank 0 alone says and writes
    one, two = (learnedopt.load(folder / str(size) / "lstm-quadratic")[1] for size in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    one, two = (read_metrics(folder / str(size) / "lstm-quadratic" / "metrics.jsonl") for size in (1, 2))
    assert [row["meta_loss"] for row in two[1:]] == pytest.approx([row["meta_loss"] for row in one[1:]], rel=1e-5)


def test_the_command_says_on_all_ranks_what_cannot_be(answers: list[dict[str, Any]]) -> None:
    for code, said in found(answers, "commanded, another", 2):
        assert code == 2
        assert "holds a run with another configuration (different: seed)" in said
    for code, said in found(answers, "a study", 2):
        assert code == 2
        assert "no meta-batches to share" in said


def test_what_a_dead_rank_has_ended_is_started_again(answers: list[dict[str, Any]], tmp_path: Path) -> None:
    script = [str(ROOT / "tests" / "rank_script.py"), str(tmp_path / "state.pt"), str(tmp_path / "theta.pt")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    told = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], env=told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "RankFailed: rank 0 of 2" in done.stderr
    assert "rank 1 has ended" in done.stderr
    expected = answers[0]["pes at once"]["theta"]
    torch.testing.assert_close(torch.load(tmp_path / "theta.pt"), expected, rtol=0, atol=1e-12)
