"""The LSTM's compiled step and adjoint against the form in pure torch."""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import Theta, optimizers
from learnedopt.optimizers.kernels import lstm_kernel, lstm_native, native
from learnedopt.optimizers.lstm import LSTM

# hidden, layers, preprocessing, coordinates: whole and broken blocks, one coordinate, widths that fill no vector
SIZES = [(20, 2, 10.0, 130), (20, 2, None, 64), (7, 1, None, 1), (3, 3, 10.0, 129), (16, 2, 5.0, 65), (33, 1, 10.0, 31)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


def problem(size: tuple, dtype: torch.dtype) -> tuple[LSTM, Theta, Tensor, dict[str, Tensor]]:
    hidden, layers, factor, n = size
    rule = optimizers.make("lstm", hidden_size=hidden, num_layers=layers, preprocess_factor=factor)
    generator = torch.Generator().manual_seed(SIZES.index(size) if size in SIZES else 99)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    theta = {k: (2 * v).to(dtype) for k, v in rule.init_theta(generator).items()}
    grads = normal(4, n) * normal(4, n).exp()
    grads[1, ::5] = 0  # as under black pixels
    return rule, theta, grads, {k: 0.5 * normal(hidden, n) for k in rule.init(theta, {"x": grads[0]})[1]}


def values_and_gradients(rule: LSTM, theta: Theta, grads: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return deltas and states of a few steps, and a random combination's gradient by everything that went in."""
    leaves, start = ({k: v.clone().requires_grad_() for k, v in x.items()} for x in (theta, state))
    inputs, here, deltas = grads.clone().requires_grad_(), start, []
    for g in inputs:
        step, here = rule.update(leaves, {"x": g}, here, {}, g.sum())
        deltas.append(step["x"])
    found = {"deltas": torch.stack(deltas), **here}
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)).sum() for v in found.values()
    )
    sources = {**{f"d {k}": v for k, v in (*leaves.items(), *start.items())}, "d grads": inputs}
    slopes = torch.autograd.grad(total, list(sources.values()))
    return {**{k: v.detach() for k, v in found.items()}, **dict(zip(sources, slopes, strict=True))}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[k] - v).abs().max() / (v.abs().max() + 1e-3)) for k, v in expected.items())


def test_a_compiler_is_there() -> None:
    assert lstm_kernel.computed_dtype(torch.zeros(1)) is torch.float32, "install gcc: the next tests would test nothing"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step_equals_pure_torch(size: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(size, dtype)
    found = values_and_gradients(*case)
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    expected = values_and_gradients(*case)
    assert worst(found, expected) < TOLERANCE[dtype]
    assert any(not torch.equal(found[k], expected[k]) for k in found) or size[3] == 1  # two forms, not one twice


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_window_adjoint_equals_autograd_of_pure_torch(size: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, theta, grads, state = problem(size, torch.float64)
    generator = torch.Generator().manual_seed(2)
    cotangents = torch.randn(grads.shape, generator=generator, dtype=torch.float64)
    ends = {k: torch.randn(h.shape, generator=generator, dtype=torch.float64) for k, h in state.items()}
    # Two tasks: the second one runs the steps backwards.
    both = torch.stack([grads, grads.flip(0)], 1), torch.stack([cotangents, cotangents], 1)
    starts, d_end = ({k: torch.stack([h, -h]) for k, h in x.items()} for x in (state, ends))
    served = rule.kernel.adjoint(theta, both[0], starts, both[1], d_end)
    assert served is not None
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    assert rule.kernel.adjoint(theta, both[0], starts, both[1], d_end) is None
    leaves, first = ({k: v.clone().requires_grad_() for k, v in x.items()} for x in (theta, starts))
    total = torch.zeros(())
    for task in range(2):
        here = {k: h[task] for k, h in first.items()}
        for g, c in zip(both[0][:, task], both[1][:, task], strict=True):
            deltas, here = rule.update(leaves, {"x": g}, here, {}, g.sum())
            total = total + (deltas["x"] * c).sum()
        total = total + sum((h * d_end[k][task]).sum() for k, h in here.items())
    slopes = torch.autograd.grad(total, [*leaves.values(), *first.values()])
    expected = dict(zip([*leaves, *first], slopes, strict=True))
    assert worst({**served[0], **served[1]}, expected) < 1e-13


def test_lanes_of_vmap_are_single_steps() -> None:
    rule, theta, grads, state = problem((20, 2, 10.0, 33), torch.float64)

    def step(theta: Theta, g: Tensor, state: dict[str, Tensor]) -> Tensor:
        deltas, new = rule.update(theta, {"x": g}, state, {}, g.sum())
        return torch.cat([deltas["x"], *(h.flatten() for h in new.values())])

    lanes = torch.func.vmap(step, in_dims=(None, 0, None))(theta, grads, state)
    assert torch.equal(lanes, torch.stack([step(theta, g, state) for g in grads]))
    # Weights of their own for every lane, as when theta is perturbed.
    thetas = {k: torch.stack([v, 1.1 * v, -v, 0.5 * v]) for k, v in theta.items()}
    lanes = torch.func.vmap(step, in_dims=(0, 0, None))(thetas, grads, state)
    singles = [step({k: v[i] for k, v in thetas.items()}, g, state) for i, g in enumerate(grads)]
    assert torch.equal(lanes, torch.stack(singles))
    # Per-lane gradients of torch.func, which call the backward pass on tensors of their own.
    by_lane = torch.func.vmap(torch.func.grad(lambda g: step(theta, g, state).square().sum()))(grads)
    for g, slope in zip(grads, by_lane, strict=True):
        leaf = g.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(step(theta, leaf, state).square().sum(), leaf)[0], slope)


def test_in_place_step_has_the_same_bits() -> None:
    rule, theta, grads, state = problem((20, 2, 10.0, 200), torch.float32)
    deltas, new = rule.update(theta, {"x": grads[0]}, state, {}, grads.sum())
    own = {k: h.clone() for k, h in state.items()}
    found = rule.kernel.update_in_place(theta, {"x": grads[0]}, own, {}, grads.sum())
    assert found is not None and torch.equal(found["x"], deltas["x"])
    assert all(torch.equal(own[k], new[k]) for k in new)
    turned = {k: h.t().contiguous().t() for k, h in own.items()}
    assert rule.kernel.update_in_place(theta, {"x": grads[0]}, turned, {}, grads.sum()) is None


def test_threads_share_the_work_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, theta, grads, state = problem((5, 2, None, 1000), torch.float64)
    alone = values_and_gradients(rule, theta, grads, state)
    monkeypatch.setattr(lstm_native, "_SHARE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = values_and_gradients(rule, theta, grads, state)
    assert all(torch.equal(shared[k], alone[k]) for k in ("deltas", "h1", "c2", "d h1", "d grads"))
    assert worst(shared, alone) < 1e-14  # the weights' gradients are summed in another order


def test_bfloat16_is_computed_in_float32() -> None:
    rule, theta, grads, state = problem((20, 2, 10.0, 70), torch.bfloat16)
    deltas, new = rule.update(theta, {"x": grads[0]}, state, {}, grads.sum())
    assert deltas["x"].dtype is torch.bfloat16 and new["h1"].dtype is torch.float32
    wide = [{k: v.float() for k, v in x.items()} for x in (theta, state)]
    x = rule._inputs(grads[0].float())
    exact, states = lstm_kernel.step(list(wide[0].values()), x, list(wide[1].values()))
    assert torch.equal(deltas["x"], (rule.output_scale * exact).bfloat16())
    assert torch.equal(new["h1"], states[0])


def test_infinities_saturate_and_nan_stays_nan() -> None:
    rule = optimizers.make("lstm", preprocess_factor=None)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    grads = torch.tensor([float("nan"), 1e30, -1e30, float("inf"), 0.0])
    _, state = rule.init(theta, {"x": grads})
    deltas, new = rule.update(theta, {"x": grads}, state, {}, grads.sum())
    assert deltas["x"].isnan().tolist() == [True, False, False, False, False]
    assert new["h1"].isfinite().tolist() == [[False, True, True, True, True]] * 20


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 65])
def test_what_is_not_finite_stays_in_its_lane(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, theta, grads, state = problem((20, 2, 10.0, n), dtype)
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1e-42, 1e-320, 1e35, 0.0], dtype=dtype)[:n]
    flat = torch.cat([odd, grads[0, len(odd) :]])
    deltas, new = rule.update(theta, {"x": flat}, state, {}, flat.sum())
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    exact, states = rule.update(theta, {"x": flat}, state, {}, flat.sum())
    for found, expected in ((deltas["x"], exact["x"]), *((new[k], states[k]) for k in new)):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for older processors of this kind")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_narrower_vectors_reckon_the_same(processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if processor == "haswell" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    command = native._command(native.NAMES[torch.float32])
    assert "-march=native" in command
    command = [f"-march={processor}" if flag == "-march=native" else flag for flag in command]
    monkeypatch.setattr(native, "_command", lambda definitions: [*command, "-O1"])
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        assert lstm_native.is_there(torch.float32)
        case = problem((20, 2, 10.0, 131), torch.float32)
        case[2][0, :3] = torch.tensor([math.inf, -math.inf, 1e-42])
        found = values_and_gradients(*case)
    finally:
        native.library.cache_clear()
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    expected = values_and_gradients(*case)
    # An infinite input times a gate's slope of 0 is NaN, times one that is nearly 0 it is infinite.
    assert all(torch.equal(found[k].isfinite(), expected[k].isfinite()) for k in found)
    told, exact = ({k: v.nan_to_num(0, 0, 0) for k, v in each.items()} for each in (found, expected))
    assert worst(told, exact) < TOLERANCE[torch.float32]


def test_second_derivatives_are_refused_with_what_to_do() -> None:
    rule, theta, grads, state = problem((3, 1, None, 4), torch.float64)
    leaf = grads[0].clone().requires_grad_()
    deltas, _ = rule.update(theta, {"x": leaf}, state, {}, leaf.sum())
    slope = torch.autograd.grad(deltas["x"].sum(), leaf, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="LEARNEDOPT_NATIVE=0"):
        torch.autograd.grad(slope.sum(), leaf)


def test_without_a_compiler_pure_torch_serves_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "broken.c"
    source.write_text("this is not C\n")
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert native.library(source) is None
        assert native.library(source, "REAL=double") is None
    assert len(caplog.records) == 1 and "gcc" in caplog.text and "broken" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))
    code = (
        "import torch, logging; logging.basicConfig()\n"
        "from learnedopt import optimizers\n"
        "from learnedopt.optimizers.kernels import lstm_kernel\n"
        "assert lstm_kernel.computed_dtype(torch.zeros(1)) is None\n"
        "rule = optimizers.make('lstm'); theta = rule.init_theta(torch.Generator().manual_seed(0))\n"
        "for _ in range(2):\n"
        "    _, state = rule.init(theta, {'x': torch.ones(3)})\n"
        "    print(rule.update(theta, {'x': torch.ones(3)}, state, {}, torch.ones(()))[0]['x'].tolist())\n"
    )
    environment = {**os.environ, "LEARNEDOPT_CACHE": str(tmp_path / "other"), "PATH": str(tmp_path), "CC": "absent"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stderr.count("pure torch") == 1 and "no C compiler" in run.stderr
    assert len(set(run.stdout.splitlines())) == 1


def test_the_library_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "three.c"
    source.write_text("int three(void) { return 3; }\n")
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    library = native.library(source)
    assert library is not None and library.three() == 3
    built = list((tmp_path / "cache" / "kernels").iterdir())
    assert [path.suffix for path in built] == [".so"]
    native.library.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", _only_version(native.subprocess.run))
    again = native.library(source)
    assert again is not None and again.three() == 3


def _only_version(run: Any) -> Any:
    """Return a stand-in for subprocess.run."""

    def guarded(command: list[str], **options: Any) -> Any:
        assert "--version" in command, "compiled again"
        return run(command, **options)

    return guarded


@pytest.mark.parametrize("fault", ["no home", "not a folder"])
def test_without_a_place_to_keep_it_it_is_built_in_every_process(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / f"{fault.replace(' ', '_')}.c"
    source.write_text("int three(void) { return 3; }\n")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if fault == "no home":
        monkeypatch.delenv("LEARNEDOPT_CACHE", raising=False)

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    else:
        monkeypatch.setenv("LEARNEDOPT_CACHE", str(source))  # a file
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        library = native.library(source)
    assert library is not None and library.three() == 3
    assert len(caplog.records) == 1 and "built anew in every process" in caplog.text
