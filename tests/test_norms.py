"""The norm that the guard reads at every step, beside its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from learnedopt.plug_in.norms import norm_of

CASES: dict[str, list[Tensor]] = {
    "none": [],
    "empty": [torch.zeros(0), torch.zeros(2, 0)],
    "scalar and vector": [torch.tensor(3.0), torch.tensor([4.0, -12.0])],
    "types": [torch.ones(2), 2 * torch.ones(3, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)],
    "no contiguous ones": [torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0)[::2]],
    "bfloat16": [torch.full((4,), 2.0, dtype=torch.bfloat16), torch.full((9,), 1.0, dtype=torch.bfloat16)],
    "that require a gradient": [nn.Parameter(torch.full((4,), 0.5))],
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_root_of_the_sum_of_squares(case: str) -> None:
    exact = math.sqrt(sum(float(x.detach().double().square().sum()) for x in CASES[case]))
    coarse = any(x.dtype is torch.bfloat16 for x in CASES[case])  # a norm has the type of its tensor, as torch clips
    assert norm_of(CASES[case]) == pytest.approx(exact, rel=4e-3 if coarse else 1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)], ids=["one", "two"])
def test_one_number_that_is_not_finite_is_seen(bad: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    few = [torch.ones(3, dtype=dtypes[0]), torch.tensor([1.0, bad], dtype=dtypes[1])]
    assert not math.isfinite(norm_of(few))
