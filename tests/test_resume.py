"""Exact resume: a training that was killed anywhere ends bitwise where an uninterrupted one does; bad checkpoints."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_wandb_tracker import records, run_file
from torch import Tensor, nn

import train_meta
from learnedopt import (
    BootstrappedTarget,
    Combined,
    ConjugateGradient,
    DualAveraging,
    EvolutionStrategies,
    Execution,
    FinalLoss,
    FollowTheLeader,
    Implicit,
    InnerLoop,
    MetaTrainer,
    ModuleFamily,
    PerName,
    PersistentES,
    Proximal,
    SumOfLosses,
    TaskByTask,
    TaskFamily,
    TaskLoss,
    Truncated,
    Unrolled,
    Validation,
)
from learnedopt import optimizers as rules
from learnedopt import tasks as families
from learnedopt.core.carry import Rollout, Tape
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.sealed import read_record
from learnedopt.core.task import Split, Tasks
from learnedopt.core.tree import Theta
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import Metrics, NullTracker, Trackers
from learnedopt.training.trainer import TrainingResult

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
Make = Callable[..., MetaTrainer]


def same(a: Any, b: Any) -> bool:
    """Return whether two nested values are equal, tensors bitwise; NaN equals NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the record's metrics without the only ones that no second run repeats."""
    found = read_metrics(folder / "metrics.jsonl")
    assert all(row.pop("step_ms") > 0 for row in found if row["step"] > 0)
    return found


# Killed between any two meta-steps, in one process: many trainings, quickly


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ordinary errors sees it."""


class Killer(NullTracker):
    """Kills the training after meta-step ``at``, before anything can be saved."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def log(self, metrics: Metrics, step: int) -> None:
        if step == self.at:
            raise Killed


def step_dependent() -> TaskFamily:
    """Return linear regressions whose batches differ at every inner step, so that a lost position would show."""

    def data(seed: int, step: int, split: Split) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed + 1000 * step + (split == "valid")) % 2**32)
        x = torch.randn(4, 2, generator=generator)
        return x, x.sum(1, keepdim=True)

    return ModuleFamily(lambda: nn.Linear(2, 1), nn.functional.mse_loss, data)


class Spiky(TaskMean):
    """The final loss, but NaN at about every third state: a deterministic function, so a resumed run agrees."""

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        value = FinalLoss()(loop, theta, rollout)
        return torch.where((1e4 * value).floor() % 3 == 0, torch.nan, value)


class Pair(NamedTuple):
    """Two of something."""

    plus: Any
    minus: Any


@dataclass(frozen=True)
class Noise:
    """Where random numbers come from."""

    seed: int
    scale: float


class Antithetic(GradientEstimator):
    """Differences of the objective at theta plus and minus noise, with a memory that is no ``Carry``.

    In it there are two inner loops in a named tuple, a dataclass, a list that grows, what was None at first, the theta
    that the episode began with, an integer of 64 bits, truth values and floats that are not finite.
    """

    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> Any:
        seed = int(torch.randint(2**62, (), generator=generator))
        return {
            "loops": Pair(loop.start(tasks), loop.start(tasks)),
            "noise": Noise(seed, 1e-2),
            "last": (None, {}),
            "seen": [math.inf],
            "began": theta,
            7: {"over": False, "big": 2**64 + seed},
        }

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
        noise, last = carry["noise"], carry["last"][1]
        generator = torch.Generator().manual_seed(noise.seed % 2**63)
        eps = {k: noise.scale * torch.randn(v.shape, generator=generator) for k, v in theta.items()}
        values, ends = [], []
        for sign, inner in zip((1, -1), carry["loops"], strict=True):
            moved = {k: (v + sign * eps[k]).detach() for k, v in theta.items()}
            rollout = loop.run(moved, inner, 2, Tape.NONE)
            values.append(objective(loop, moved, rollout))
            ends.append(rollout.end)
        slope = (values[0] - values[1]) / (2 * noise.scale**2)
        grads = {k: slope * e + 0.1 * (theta[k].detach() - carry["began"][k]) for k, e in eps.items()}
        grads = {k: g + 0.5 * last[k] if last else g for k, g in grads.items()}
        onward = {
            "loops": Pair(*ends),
            "noise": Noise(noise.seed * 5 % 2**62, noise.scale),
            "last": (slope, grads),
            "seen": [*carry["seen"], float(slope), torch.full((len(carry["seen"]),), float(slope))],
            "began": carry["began"],
            7: {"over": True, "big": carry[7]["big"] + 1},
        }
        over = ends[0].step >= 8
        return Estimate(torch.stack(values).mean(), grads, None if over else onward, {})


def trainer(family: TaskFamily, rule: str, estimator: Any, objective: Any, **options: Any) -> Make:
    """Return a function that makes the trainer anew, as a new process would."""
    rule_options, inner = options.pop("rule_options", {}), options.pop("inner_objective", lambda like: TaskLoss())

    def make(folder: Path, kill_at: int | None = None, **changed: Any) -> MetaTrainer:
        sample = family.sample(1, torch.Generator().manual_seed(0))
        template = {k: p[0] for k, p in family.init_params(sample).items()}
        made = rules.make(rule, template=template, **rule_options)
        loop = InnerLoop(family, made, Execution(chunk_size=8), inner(template))
        settings: dict[str, Any] = {
            "meta_optimizer": lambda params: torch.optim.Adam(params, 1e-2),
            "num_tasks": 2,
            "validation": Validation(loop, FinalLoss(), num_steps=3, num_tasks=2, every=3),
            "checkpoint": folder / "checkpoint.pt",
            "checkpoint_every": 2,
        }
        tracker = Trackers([JsonLinesTracker(folder / "metrics.jsonl"), Killer(kill_at)])
        return MetaTrainer(loop, estimator, objective, tracker=tracker, **{**settings, **options, **changed})

    return make


LSTM = {"name": "lstm", "options": {"hidden_size": 2}}
CASES: dict[str, Make] = {
    "a learned start and a stateful rule in windows": trainer(
        step_dependent(), "learned-init", Truncated(2, horizon=6), SumOfLosses(), rule_options={"rule": LSTM}
    ),
    "bootstrapped, going on from the objective's carry in windows": trainer(
        step_dependent(), "lstm", Truncated(2, horizon=12), BootstrappedTarget(3, 0.05), rule_options=LSTM["options"]
    ),
    "bootstrapped, an episode without end": trainer(
        step_dependent(), "lstm", Unrolled(2), BootstrappedTarget(2, 0.05), rule_options=LSTM["options"]
    ),
    "skipped steps, clipping and a schedule": trainer(
        step_dependent(),
        "momentum",
        Truncated(1, horizon=8),
        Spiky(),
        rule_options={"learn": ("lr", "momentum")},
        max_failed_share=0.0,
        max_grad_norm=0.1,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
    ),
    "implicit": trainer(
        families.make("linear-regression", dim=3, condition_number=2.0),
        "maml",
        Implicit(40, ConjugateGradient(3), tolerance=0.1),
        FinalLoss(),
        inner_objective=lambda like: Proximal(like, learn=True),
        rule_options={"lr": 0.1},
    ),
    "averaged iterates under an online learner, in windows without end": trainer(
        step_dependent(),
        "averaged",
        Truncated(1),
        FinalLoss(),
        rule_options={"rule": {"name": "learned-rates", "options": {"lr": 0.05}}, "weights": "linear"},
        meta_optimizer=lambda params: DualAveraging(params, 0.02, "linear", "last-gradient", "adagrad"),
    ),
    "optimizers of their own for start and rates": trainer(
        step_dependent(),
        "meta-sgd",
        Unrolled(2),
        FinalLoss(),
        rule_options={"lr": 0.05},
        meta_optimizer=PerName(
            {"init/*": lambda p: FollowTheLeader(p, lambda t: t**0.5), "rule/*": lambda p: torch.optim.Adam(p, 1e-2)}
        ),
    ),
    "evolution strategies in windows, from a learned start": trainer(
        step_dependent(),
        "learned-init",
        EvolutionStrategies(2, 3, 0.1, horizon=6),
        SumOfLosses(),
        rule_options={"rule": LSTM},
    ),
    "persistent evolution strategies at three phases": trainer(
        step_dependent(), "learned-init", PersistentES(2, 6, 4, 0.1), SumOfLosses(), rule_options={"rule": LSTM}
    ),
    "noise reuse, fewer pairs than phases": trainer(
        step_dependent(), "momentum", PersistentES(1, 5, 2, 0.01, reuse_noise=True), FinalLoss()
    ),
    "two estimators as one, whose windows end at different times": trainer(
        step_dependent(),
        "learned-init",
        Combined(Truncated(2, horizon=6), EvolutionStrategies(2, 3, 1e-2, horizon=4), 0.7),
        SumOfLosses(),
        rule_options={"rule": LSTM},
    ),
    "two estimators as one, with particles at staggered phases": trainer(
        families.make("quadratic", dim=3),
        "momentum",
        Combined(Unrolled(2), PersistentES(2, 4, 2, 1e-2)),
        SumOfLosses(),
        rule_options={"learn": ("lr", "momentum")},
    ),
    "two estimators as one, of which either may fail": trainer(
        families.make("quadratic", dim=3),
        "momentum",
        Combined(Unrolled(2), EvolutionStrategies(2, 2, 1e-2)),
        Spiky(),
        rule_options={"learn": ("lr", "momentum")},
        max_failed_share=0.0,
    ),
    "tasks of which some fail": trainer(
        step_dependent(),
        "momentum",
        Truncated(1, horizon=8),
        Spiky(),
        rule_options={"learn": ("lr", "momentum")},
        num_tasks=6,
    ),
    "an average of theta, clipping and a schedule": trainer(
        step_dependent(),
        "momentum",
        Truncated(2, horizon=6),
        FinalLoss(),
        rule_options={"learn": ("lr", "momentum")},
        average=0.3,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
    ),
    "skipped steps that go back to the average": trainer(
        step_dependent(),
        "momentum",
        Truncated(1, horizon=8),
        Spiky(),
        rule_options={"learn": ("lr", "momentum")},
        max_failed_share=0.0,
        average=0.3,
        rollback_above=0.5,
    ),
    "task by task, over horizons that are drawn": trainer(
        step_dependent(),
        "momentum",
        TaskByTask(
            Unrolled(2),
            ((1, 0.4), (2, 0.3), (4, 0.3)),
            EvolutionStrategies(2, 2, 1e-2),
            exact_up_to=2,
            max_task_grad_norm=0.5,
        ),
        SumOfLosses(),
        rule_options={"learn": ("lr", "momentum")},
    ),
    "a memory that is no Carry": trainer(
        step_dependent(), "learned-init", Antithetic(), FinalLoss(), rule_options={"rule": LSTM}
    ),
}
LAST = 9


def killed_and_resumed(make: Make, folder: Path, kills: Sequence[int]) -> TrainingResult:
    for kill_at in kills:
        with pytest.raises(Killed):
            make(folder, kill_at).run(LAST)
    return make(folder).run(LAST)


# Before the first checkpoint and right at one, in an episode and at its end, at the last step; and repeatedly.
ONCE, REPEATEDLY = ([1], [2], [3], [5], [9]), [3, 3, 6, 7]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("case", "moments"),
    [pytest.param(case, (ONCE[i % len(ONCE)], REPEATEDLY), id=case) for i, case in enumerate(CASES)]
    + [pytest.param(case, (*ONCE, REPEATEDLY), id=f"{case}, all", marks=pytest.mark.long) for case in CASES],
)
def test_a_training_killed_after_any_meta_step_ends_where_it_would_have(
    case: str, moments: Sequence[list[int]], tmp_path: Path
) -> None:
    make = CASES[case]
    expected = make(tmp_path / "whole").run(LAST)
    for kills in moments:
        folder = tmp_path / f"killed-{kills}"
        assert same(killed_and_resumed(make, folder, kills), expected)
        assert same(rows(folder), rows(tmp_path / "whole"))
        states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, tmp_path / "whole")]
        assert same(*states)
        again = make(folder).run(LAST)  # finished: nothing is left to do
        assert same(again, expected) and same(rows(folder), rows(tmp_path / "whole"))
    if "may fail" not in case:  # how often it does differs between versions of torch
        assert (expected.num_skipped > 1) == ("skipped" in case)
    assert [row["step"] for row in rows(tmp_path / "whole")] == [*range(LAST + 1)] and expected.meta_step == LAST


OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_meta_optimizer_goes_on_exactly(optimizer: str, tmp_path: Path) -> None:
    # Theta in another dtype than the default, in which some optimizers keep part of their state.
    theta = {"lr": torch.tensor(0.01, dtype=torch.float64), "momentum": torch.tensor(0.5, dtype=torch.float64)}
    make = trainer(
        families.make("quadratic", dim=3, dtype="float64"),
        "momentum",
        Truncated(2, horizon=6),
        FinalLoss(),
        rule_options={"learn": ("lr", "momentum")},
        theta=theta,
        validation=None,
        meta_optimizer=lambda params: getattr(torch.optim, optimizer)(params, lr=1e-4),
        scheduler=lambda outer: torch.optim.lr_scheduler.OneCycleLR(outer, 1e-3, 20, cycle_momentum=False),
    )
    expected = make(tmp_path / "whole").run(LAST)
    assert same(killed_and_resumed(make, tmp_path / "killed", [5]), expected)
    assert not same(expected.theta, theta)


LEARNERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "dual averaging": lambda p: DualAveraging(p, 1e-2, "linear", "last-gradient", "adagrad"),
    "follow the leader": lambda p: FollowTheLeader(p, lambda t: t**0.5, lr=1e-2),
    "per name": PerName({"lr": lambda p: DualAveraging(p, 1e-3), "mom*": lambda p: torch.optim.NAdam(p, 1e-2)}),
}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_online_learners_go_on_exactly_in_a_dtype_that_is_not_the_default(
    learner: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theta = {"lr": torch.tensor(0.01, dtype=dtype), "momentum": torch.tensor(0.5, dtype=dtype)}
    make = trainer(
        families.make("quadratic", dim=3, dtype="float64"),
        "momentum",
        Truncated(2),
        FinalLoss(),
        rule_options={"learn": ("lr", "momentum")},
        theta=theta,
        validation=None,
        meta_optimizer=LEARNERS[learner],
        scheduler=lambda outer: torch.optim.lr_scheduler.MultiStepLR(outer, [2, 5]),
    )
    expected = make(tmp_path / "whole").run(LAST)
    assert same(killed_and_resumed(make, tmp_path / "killed", [3, 5]), expected)
    assert not same(expected.theta, theta)
    files = [tmp_path / name / "checkpoint.pt" for name in ("whole", "killed")]
    assert same(*(torch.load(file, weights_only=True) for file in files))


@pytest.mark.parametrize("every", [1, 5])
def test_a_training_that_is_extended_goes_on(every: int, tmp_path: Path) -> None:
    make = CASES["a learned start and a stateful rule in windows"]
    loop = make(tmp_path / "whole").loop
    validation = Validation(loop, FinalLoss(), num_steps=3, num_tasks=2, every=every)
    expected = make(tmp_path / "whole", validation=validation).run(7)
    for first in (0, 3):
        make(tmp_path / f"parts-{first}", validation=validation).run(first)
    continued = make(tmp_path / "object", validation=validation)
    continued.run(4)
    found = [make(tmp_path / f"parts-{first}", validation=validation).run(7) for first in (0, 3)]
    found.append(continued.run(7))
    for result, first, name in zip(found, (0, 3, 4), ("parts-0", "parts-3", "object"), strict=True):
        assert same(result.theta, expected.theta)
        measured = [row["step"] for row in rows(tmp_path / name) if "validation" in row]
        # The end of the first part was measured too: the only thing that can make a difference, to the best theta.
        assert measured == sorted({0, first, 7, *range(every, 8, every)})
        assert result.best_value <= expected.best_value and (every > 1 or same(result, expected))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["training-1.pt", "training-2.pt"])
def test_a_checkpoint_of_before_goes_on_to_where_it_would_have(name: str, tmp_path: Path) -> None:
    family = families.make("quadratic", dim=2)
    template = {k: p[0] for k, p in family.init_params(family.sample(1, torch.Generator().manual_seed(0))).items()}
    inner = {"name": "momentum", "options": {"lr": 0.005, "learn": ["lr", "momentum"]}}
    loop = InnerLoop(family, rules.make("learned-init", template=template, rule=inner), Execution(chunk_size=8))
    trainer = MetaTrainer(
        loop,
        Truncated(2, horizon=8),
        SumOfLosses(),
        lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9),
        tracker=None,
        num_tasks=2,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
        max_grad_norm=1.0,
        validation=Validation(loop, FinalLoss(), num_steps=3, num_tasks=2, every=3),
        checkpoint=shutil.copy(DATA / name, tmp_path),
    )
    result = trainer.run(9)
    expected = json.loads((DATA / "training-1.json").read_text("utf-8"))
    assert result.best_value == pytest.approx(expected["best_value"], rel=1e-12)
    for which, theta in (("theta", result.theta), ("best_theta", result.best_theta)):
        assert theta.keys() == expected[which].keys()
        for k, v in theta.items():
            assert v.tolist() == pytest.approx(expected[which][k], rel=1e-12, abs=0), k
    assert torch.load(tmp_path / name, weights_only=True)["format"] == "learnedopt-training-3"
    before = torch.load(DATA / name, weights_only=True)
    assert before["format"] == f"learnedopt-{name.partition('.')[0]}" and before["carry"] is not None


# A real process, killed by a real signal

TINY = ["family.dim=3", "num_meta_steps=60", "num_tasks=2", "checkpoint_every=4", "validation.num_tasks=3"]
TINY += ["validation.num_steps=6", "validation.every=7", "estimator.num_steps=2", "meta.lr=0.01"]
COMMANDS: dict[str, list[str]] = {
    "learned start": [
        *TINY, "estimator.horizon=6", "rule=learned-init",
        'rule.rule={"name": "lstm", "options": {"hidden_size": 3}}',
    ],
    "bootstrapped": [
        *TINY, "estimator.horizon=12", "rule.hidden_size=3", "objective=BootstrappedTarget",
        "objective.num_target_steps=3", "objective.step_size=0.01",
    ],
    "persistent": [
        *TINY, "estimator=PersistentES", "estimator.horizon=6", "estimator.num_pairs=4", "estimator.sigma=0.01",
        "rule.hidden_size=3",
    ],
}  # fmt: skip


def arguments(case: str, runs: Path, wandb: str = "disabled") -> list[str]:
    sets = [word for assignment in COMMANDS[case] for word in ("--set", assignment)]
    return ["lstm-quadratic", "--runs", str(runs), "--wandb", wandb, *sets]


def started(arguments: list[str], home: Path) -> subprocess.Popen[str]:
    """Start ``train_meta.py`` in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "train_meta.py", *arguments],
        cwd=ROOT,
        env={**kept, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], record: Path, step: int) -> None:
    """Wait until the process has recorded meta-step ``step``."""
    while process.poll() is None:
        steps = re.findall(rb'^\{"step": (\d+)', record.read_bytes(), re.MULTILINE) if record.exists() else []
        if steps and int(steps[-1]) >= step:
            return
        time.sleep(0.002)
    pytest.fail(f"ended with code {process.returncode} before meta-step {step}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of the uninterrupted run of a command."""
    done: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in done:
            runs = tmp_path_factory.mktemp("whole")
            assert train_meta.main(arguments(case, runs)) == 0
            done[case] = runs / "lstm-quadratic"
        return done[case]

    return run


def assert_same_run(folder: Path, expected: Path) -> None:
    assert (folder / "theta.safetensors").read_bytes() == (expected / "theta.safetensors").read_bytes()
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, expected)]
    assert same(*states) and states[0]["best_theta"] is not None
    assert same(rows(folder), rows(expected)) and [row["step"] for row in rows(folder)] == [*range(61)]
    assert not [*folder.glob(".*")]


# What else is in a carry is killed in one process, above, and by ``make soak``.
@pytest.mark.parametrize(
    ("case", "num_kills"),
    [
        ("learned start", 3),
        pytest.param("bootstrapped", 2, marks=pytest.mark.long),
        pytest.param("persistent", 2, marks=pytest.mark.long),
    ],
)
def test_a_process_killed_at_random_moments_ends_where_it_would_have(
    case: str, num_kills: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    moments = random.Random(0)
    folder, in_episode = tmp_path / "lstm-quadratic", 0
    for i in range(num_kills):
        process = started(arguments(case, tmp_path), tmp_path)
        wait_for_step(process, folder / "metrics.jsonl", 2 + 12 * i + moments.randrange(8))
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if (folder / "checkpoint.pt").exists():
            in_episode += torch.load(folder / "checkpoint.pt", weights_only=True)["carry"] is not None
    assert in_episode > 0
    assert train_meta.main(arguments(case, tmp_path)) == 0
    assert_same_run(folder, whole(case))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_a_checkpoint_and_a_finished_wandb_run(
    number: signal.Signals, code: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    case, folder = "learned start", tmp_path / "lstm-quadratic"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup a child would go on ignoring it
    process = started(arguments(case, tmp_path, "offline"), tmp_path)
    signal.signal(signal.SIGHUP, before)
    wait_for_step(process, folder / "metrics.jsonl", 5)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == code
    assert said.endswith(f"\nStopped. The same command goes on from {folder}.\n") and "Traceback" not in said
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["meta_step"]
    assert step == rows(folder)[-1]["step"] < 60  # the last meta-step was saved
    ends = [r.exit.exit_code for r in records(run_file(folder)) if r.WhichOneof("record_type") == "exit"]
    assert ends == [code]
    assert train_meta.main(arguments(case, tmp_path)) == 0
    assert_same_run(folder, whole(case))


# Checkpoints that cannot be gone on from


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs folder of a training whose checkpoint lies in the middle of an episode."""
    runs = tmp_path_factory.mktemp("stopped")
    assert train_meta.main([*arguments("learned start", runs), "--set", "num_meta_steps=2"]) == 0
    return runs


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def damaged(data: bytes, path: Path) -> bytes:
    """Return the archive with one bit flipped in its largest entry, which holds numbers that no parser looks at."""
    with zipfile.ZipFile(path) as archive:
        entry = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda e: e.file_size)
        content = archive.read(entry)
    at = data.index(content) + len(content) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def trapped(data: bytes, path: Path) -> bytes:
    torch.save({"format": "learnedopt-training-1", "theta": Trap(path.parent / "sprung")}, path)
    return path.read_bytes()


def foreign(content: Any) -> Callable[[bytes, Path], bytes]:
    def write(data: bytes, path: Path) -> bytes:
        torch.save(content, path)
        return path.read_bytes()

    return write


BAD: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda data, path: b"",
    "first kilobyte": lambda data, path: data[:1024],
    "half": lambda data, path: data[: len(data) // 2],
    "all but a byte": lambda data, path: data[:-1],
    "one bit": damaged,
    "text": lambda data, path: b"theta\n",
    "plain pickle that runs code": lambda data, path: pickle.dumps(Trap(path.parent / "sprung")),
    "archive whose pickle runs code": trapped,
    "foreign state dict": foreign({"weight": torch.ones(3)}),
    "foreign list": foreign([1, 2]),
    "other format": foreign({"format": "learnedopt-training-0"}),
    "nothing but the format": foreign({"format": "learnedopt-training-2"}),
    "nothing but the format of before": foreign({"format": "learnedopt-training-1"}),
    "theta": lambda data, path: (path.parent / "theta.safetensors").read_bytes(),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line_and_nothing_is_touched(
    kind: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    path = runs / "lstm-quadratic" / "checkpoint.pt"
    path.write_bytes(BAD[kind](path.read_bytes(), path))
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    assert train_meta.main([*arguments("learned start", runs), "--set", "num_meta_steps=2"]) == 2
    told = r"learnedopt train: .*checkpoint\.pt (cannot be read as|is no|is corrupt).*remove the file.*\n"
    assert re.fullmatch(told, capsys.readouterr().err)
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before  # the trap has not sprung either


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (['rule.rule={"name": "lstm", "options": {"hidden_size": 4}}'], "rule"),
        (["num_tasks=3"], "num_tasks"),
        (["meta.lr=0.02"], "meta"),  # nothing but the configuration tells
        (["family=linear-regression", "family.dim=3"], "family"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_though_config_json_is_gone(
    other: list[str], told: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lstm-quadratic"
    folder.mkdir()
    shutil.copy(stopped / "lstm-quadratic" / "checkpoint.pt", folder)
    before = (folder / "checkpoint.pt").read_bytes()
    changes = [word for assignment in ("num_meta_steps=2", *other) for word in ("--set", assignment)]
    assert train_meta.main([*arguments("learned start", tmp_path), *changes]) == 2
    said = capsys.readouterr().err
    assert f"holds a run with another configuration (different: {told})" in said and said.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["checkpoint.pt"]
    assert (folder / "checkpoint.pt").read_bytes() == before
    shutil.copy(DATA / "training-2.pt", folder / "checkpoint.pt")  # of a version that kept no configuration in it
    assert train_meta.main([*arguments("learned start", tmp_path), *changes]) == 2
    assert "holds a checkpoint, but no config.json, which says of what run" in capsys.readouterr().err


def test_a_run_whose_config_json_is_gone_gets_it_again_and_goes_on(stopped: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    path = runs / "lstm-quadratic" / "config.json"
    before = read_record(path)
    path.unlink()
    assert train_meta.main([*arguments("learned start", runs), "--set", "num_meta_steps=2"]) == 0
    after = read_record(path)
    assert after["recipe"] == before["recipe"] and after["run_id"] != before["run_id"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_tasks": 3}, "num_tasks 2 instead of 3"),
        ({"seed": 5}, "seed 0 instead of 5"),
        ({"meta_optimizer": lambda params: torch.optim.SGD(params, 1e-2)}, "meta_optimizer 'Adam' instead of 'SGD'"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3)}, "scheduler 'NoneType' instead of 'StepLR'"),
    ],
)
@pytest.mark.parametrize("meta_step", [2, 3])  # in the middle of an episode, where shapes tell, and at its end
def test_what_no_shape_tells_is_compared(meta_step: int, changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    make = CASES["a learned start and a stateful rule in windows"]
    make(tmp_path).run(meta_step)
    other = make(tmp_path, **changed)
    start = {k: v.detach().clone() for k, v in other.theta.items()}
    with pytest.raises(ValueError, match=told):
        other.run(4)
    assert same({k: v.detach() for k, v in other.theta.items()}, start)
    make(tmp_path).run(4)  # the refused training has not touched the checkpoint


@pytest.mark.usefixtures("float64")
def test_an_inner_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    small, large = (
        trainer(families.make("quadratic", dim=dim), "momentum", Truncated(2, horizon=6), FinalLoss()) for dim in (2, 3)
    )
    small(tmp_path).run(2)
    with pytest.raises(ValueError, match="written for other tasks: shapes or types of its inner state differ"):
        large(tmp_path).run(3)
