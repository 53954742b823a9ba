"""Memory in bfloat16 between steps: which leaves, how they are rounded, and where Adam goes with it."""

from __future__ import annotations

import pytest
import torch

from learnedopt.optimizers import Adam
from learnedopt.plug_in.state_dtype import packed, require_state_dtype, unpacked


def test_only_leaves_with_a_number_for_every_coordinate_are_packed() -> None:
    param = torch.zeros(3, 2)
    memory = {
        "step": 7, "mean": torch.rand(3, 2), "averages": torch.rand(4, 3, 2), "h1": torch.rand(5, 6),
        "count": torch.tensor(257.0), "tensor": torch.rand(4), "index": torch.arange(6).reshape(3, 2),
    }  # fmt: skip
    found = packed(memory, param, torch.bfloat16, seed=1)
    assert {k for k, x in found.items() if k != "step" and x.dtype == torch.bfloat16} == {"mean", "averages", "h1"}
    assert all(found[k] is memory[k] for k in ("step", "count", "tensor", "index"))
    assert all(memory[k].dtype == torch.float32 for k in ("mean", "averages", "h1"))
    wide = {k: unpacked(x, torch.float32) for k, x in found.items()}
    assert {k for k, x in wide.items() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16} == set()
    assert wide["mean"].equal(found["mean"].float())


def test_without_a_dtype_and_for_a_number_alone_nothing_changes() -> None:
    memory = {"step": 7, "mean": torch.rand(3)}
    assert packed(memory, torch.zeros(3), None, seed=1) == memory
    alone = {"mean": torch.tensor(0.3), "count": torch.tensor(257.0)}
    assert packed(alone, torch.tensor(1.0), torch.bfloat16, seed=1) == alone


def test_a_number_goes_to_one_of_its_neighbours_and_stays_where_it_is_in_the_mean() -> None:
    x = torch.tensor([1.001, -1.001, 3e-41, -2.7e-3, 0.0, 5.0, float("inf"), float("nan"), -float("inf")])
    wide = x.repeat(20000, 1).T.contiguous()
    (found,) = packed({"x": wide}, wide, torch.bfloat16, seed=3).values()
    assert found.dtype == torch.bfloat16
    unit = 2.0**-7 * torch.tensor([1, 1, 1, 2.0**-9])  # at most, between two bfloat16s; 2^-9 <= 2.7e-3 < 2^-8
    assert ((found[:4].float() - wide[:4]).abs() < unit[:, None]).all()
    assert (found[[0, 1, 3]].float().std(1) > 0).all()
    error = (found[[0, 1, 3]].double().mean(1) - x[[0, 1, 3]].double()).abs()
    assert (error < 5 * unit[[0, 1, 3]] / 2 / 20000**0.5).all()
    assert torch.equal(found[4:7], wide[4:7].bfloat16())
    assert found[7].isnan().all()
    assert torch.equal(found[8], wide[8].bfloat16())


def test_the_rounding_is_the_seeds() -> None:
    memory, param = {"x": torch.rand(1000)}, torch.zeros(1000)
    one, same, other = (packed(memory, param, torch.bfloat16, seed=s)["x"] for s in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)
    assert packed({"x": one}, param, torch.bfloat16, seed=5)["x"] is one


def test_adam_forgets_a_large_gradient_although_its_memory_has_eight_bits() -> None:
    # To the nearest, the average square would keep the first gradient's for ever: .999 of it rounds back to it.
    rule, param = Adam(lr=0.01), torch.zeros(500)
    theta = rule.init_theta(torch.Generator())

    def square_after(dtype: torch.dtype | None) -> torch.Tensor:
        _, state = rule.init(theta, {"p": param})
        for step in range(1500):
            grad = torch.full_like(param, 10.0 if step == 0 else 0.1)
            _, state = rule.update(theta, {"p": grad}, state, {"p": param}, torch.tensor(0.0))
            memory = {"mean": state["mean"]["p"], "square": state["square"]["p"]}
            memory = {k: unpacked(x, torch.float32) for k, x in packed(memory, param, dtype, seed=step).items()}
            state = {"mean": {"p": memory["mean"]}, "square": {"p": memory["square"]}, "step": state["step"]}
        return state["square"]["p"]

    exact, kept = square_after(None), square_after(torch.bfloat16)
    assert float(exact[0]) < 0.32 * (1 - 0.999) * 100
    torch.testing.assert_close(kept.mean(), exact.mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(kept, exact, rtol=0.3, atol=0)


def test_other_dtypes_are_refused() -> None:
    require_state_dtype(None)
    require_state_dtype(torch.bfloat16)
    with pytest.raises(ValueError, match=r"state_dtype=torch.float16.*bfloat16"):
        require_state_dtype(torch.float16)
