"""Long computations say how fast they go and how much is left."""

from __future__ import annotations

import re

import pytest

from learnedopt import optimizers, tasks
from learnedopt.core.pace import Pace, duration
from learnedopt.evaluation import evaluate, grids


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_are_those_of_the_runs_that_are_done() -> None:
    clock, said = Clock(), list[str]()
    pace = Pace(40, said.append, clock=clock)
    pace.begin(10)
    assert pace.words() == "0 of about 40 runs"
    for _ in range(6):
        clock.now += 4
        pace.ran("Tuning SGD")
    assert said == [  # every ten seconds at most
        "Tuning SGD: 3 of about 40 runs, 0.25 a second, about 2 min left",
        "Tuning SGD: 6 of about 40 runs, 0.25 a second, about 2 min left",
    ]
    pace.begin(30)  # what was announced counts, whether it took as many
    clock.now += 16
    assert pace.words() == "10 of about 40 runs, 0.25 a second, about 2 min left"
    pace.ran("Tuning Adam", 200)  # more than were announced
    assert pace.words() == "40 of about 40 runs, 1 a second, about 0 s left"


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (7000, "1 h 57 min"), (200_000, "2 d 8 h")]
)
def test_times_are_said_in_units_that_suit(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_comparison_tells_what_is_left_of_its_tuning() -> None:
    said: list[str] = []
    rule = optimizers.make("sgd", lr=0.1, learn=())
    baselines = {"SGD": evaluate.BASELINES["SGD"], "Adam": grids.HARD_BASELINES["Adam"]}
    evaluate.compare(
        {"mine": (rule, {})}, tasks.make("quadratic"), num_steps=2, num_tasks=4, baselines=baselines,
        report=said.append,
    )  # fmt: skip
    tuning = [line for line in said if line.startswith("Tuning")]
    num_runs = 1 + (13 + 5) + (9 + 16)
    done = [0 if found is None else int(found[1]) for found in (re.search(r"\((\d+) of", line) for line in tuning)]
    assert done == [1, 19] and all(f"of about {num_runs} runs, " in line and "left)" in line for line in tuning)
