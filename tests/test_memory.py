"""Peak memory of meta-gradients against inner steps, each point in a process of its own."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.results_memory import IMPLICIT, MB, SEGMENTS, STEPS, WHOLE, allocator_peak, exponent, measure


def test_allocator_peak_counts_what_is_held_at_a_time() -> None:
    def call() -> None:
        for _ in range(3):  # each is gone before the next
            first = torch.empty(1_000_000, dtype=torch.uint8)
            second = torch.empty(2_000_000, dtype=torch.uint8)
            del first, second
        torch.empty(2_500_000, dtype=torch.uint8)

    assert allocator_peak(call) == pytest.approx(3 * MB, rel=1e-2)


def test_exponent_is_the_power_of_growth() -> None:
    assert exponent([5, 10, 20, 40], [3 * n**0.5 for n in (5, 10, 20, 40)]) == pytest.approx(0.5)


@pytest.mark.long
def test_whole_tapes_grow_linearly_segments_less_and_implicit_not_at_all() -> None:
    points = measure()
    whole, segments, implicit = ([point.allocated for point in points[k]] for k in (WHOLE, SEGMENTS, IMPLICIT))
    slopes = [(b - a) / (n - m) for a, b, m, n in zip(whole, whole[1:], STEPS, STEPS[1:], strict=False)]
    assert max(slopes) < 1.1 * min(slopes)
    assert exponent(STEPS, segments) < 0.8
    assert segments[-1] < 0.7 * whole[-1]  # a step's tape is small here: the first layer's gradient needs no weights
    assert max(implicit) < 1.1 * min(implicit)
    for row in points.values():
        for point in row:  # the kernel's count agrees where there is one
            assert math.isnan(point.resident) or point.resident == pytest.approx(point.allocated, rel=0.3, abs=3 * MB)
