"""The LSTM's Triton kernels against the form in pure torch: in Triton's interpreter, compiled, and on a GPU.

Triton reads TRITON_INTERPRET when it is imported, so those tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lstm_kernel import problem, values_and_gradients, worst

from learnedopt import optimizers
from learnedopt.optimizers.kernels import lstm_kernel, native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# hidden, layers, preprocessing (two inputs or one), coordinates
SIZES = [(20, 2, 10.0, 65), (20, 1, None, 1), (7, 3, None, 63), (16, 2, 10.0, 64)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
itself = pytest.mark.skipif(INTERPRETED, reason="starts the process with TRITON_INTERPRET=1, or needs one without it")

COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from learnedopt.optimizers.kernels import lstm_triton

for kernel, real, dtype in (
    (lstm_triton._step_kernel, "*fp32", torch.float32),
    (lstm_triton._window_kernel, "*fp32", torch.float32),
    (lstm_triton._step_kernel, "*fp64", torch.float64),
):
    options = lstm_triton._options([torch.empty(20, 1, dtype=dtype)] * 4, 2, 4096)
    warps = {k: options.pop(k) for k in ("num_warps", "num_stages")}
    types = {name: real for name in kernel.arg_names}
    types |= {k: "i32" for k in ("n", "m", "num_steps") if k in types} | {k: "constexpr" for k in options}
    types |= {k: (real,) * count for k, count in (("theta", 6), ("states", 4), ("new_states", 4)) if k in types}
    constants = {(kernel.arg_names.index(k),): v for k, v in options.items()}
    source = ASTSource(kernel, types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=warps)
    assert compiled.metadata.shared < 99 * 1024, compiled.metadata.shared
    print("mma.sync" in compiled.asm["ptx"], len(compiled.asm["cubin"]) > 1000)
"""


@pytest.fixture
def _kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = lstm_kernel._kernels("cuda", torch.float32)
    assert kernels is not None
    monkeypatch.setattr(lstm_kernel, "_kernels", lambda device_type, dtype: kernels)


@itself
@needs_triton
def test_in_the_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", __file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "13 passed" in run.stdout, run.stdout + run.stderr


@itself
@needs_triton
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["True"] * 6, run.stdout + run.stderr


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (20, 2, 10.0, 5000), (33, 1, 5.0, 65), (128, 2, 10.0, 65)], ids=str)
def test_on_a_gpu(size: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, theta, grads, state = problem(size, dtype)
    there = {k: v.cuda() for k, v in theta.items()}, grads.cuda(), {k: h.cuda() for k, h in state.items()}
    assert lstm_kernel.computed_dtype(there[1]) is dtype
    found = {k: v.cpu() for k, v in values_and_gradients(rule, *there).items()}
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    assert worst(found, values_and_gradients(rule, theta, grads, state)) < TOLERANCE[dtype]


@interpreted
@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step_equals_pure_torch_in_the_interpreter(
    size: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(size, dtype)
    found = values_and_gradients(*case)
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    expected = values_and_gradients(*case)
    assert worst(found, expected) < TOLERANCE[dtype]
    assert any(not torch.equal(found[k], expected[k]) for k in found)  # two forms, not one twice


@interpreted
@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("with_end", [True, False], ids=["end", "no end"])
def test_window_adjoint_equals_autograd_in_the_interpreter(with_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from learnedopt.optimizers.kernels import lstm_triton

    monkeypatch.setattr(lstm_triton, "_SCRATCH", 1)  # 64 coordinates at a time, then one alone
    rule, theta, grads, state = problem((20, 2, 10.0, 65), torch.float64)
    generator = torch.Generator().manual_seed(2)
    cotangents = torch.randn(grads.shape, generator=generator, dtype=torch.float64)
    ends = {k: float(with_end) * torch.randn(h.shape, generator=generator).double() for k, h in state.items()}
    d_end = {k: d.unsqueeze(0) for k, d in ends.items()} if with_end else None
    starts = {k: h.unsqueeze(0) for k, h in state.items()}
    served = rule.kernel.adjoint(theta, grads.unsqueeze(1), starts, cotangents.unsqueeze(1), d_end)
    assert served is not None
    monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    leaves, first = ({k: v.clone().requires_grad_() for k, v in x.items()} for x in (theta, state))
    here, total = first, torch.zeros(())
    for g, cotangent in zip(grads, cotangents, strict=True):
        deltas, here = rule.update(leaves, {"x": g}, here, {}, g.sum())
        total = total + (deltas["x"] * cotangent).sum()
    total = total + sum((h * ends[k]).sum() for k, h in here.items())
    slopes = torch.autograd.grad(total, [*leaves.values(), *first.values()])
    found = {**served[0], **{k: d.squeeze(0) for k, d in served[1].items()}}
    assert worst(found, dict(zip([*leaves, *first], slopes, strict=True))) < 1e-12


@interpreted
@pytest.mark.usefixtures("_kernels_on_cpu")
def test_in_place_step_has_the_same_bits_in_the_interpreter() -> None:
    rule, theta, grads, state = problem((20, 2, 10.0, 130), torch.float32)
    deltas, new = rule.update(theta, {"x": grads[0]}, state, {}, grads.sum())
    own = {k: h.clone() for k, h in state.items()}
    found = rule.kernel.update_in_place(theta, {"x": grads[0]}, own, {}, grads.sum())
    assert found is not None and torch.equal(found["x"], deltas["x"])
    assert all(torch.equal(own[k], new[k]) for k in new)


@interpreted
@pytest.mark.usefixtures("_kernels_on_cpu")
def test_bfloat16_is_computed_in_float32_in_the_interpreter() -> None:
    rule, theta, grads, state = problem((20, 2, 10.0, 70), torch.bfloat16)
    deltas, new = rule.update(theta, {"x": grads[0]}, state, {}, grads.sum())
    assert deltas["x"].dtype is torch.bfloat16 and new["h1"].dtype is torch.float32
    wide = [[v.float() for v in x.values()] for x in (theta, state)]
    exact, _ = lstm_kernel.step(wide[0], rule._inputs(grads[0].float()), wide[1])
    assert torch.equal(deltas["x"], (rule.output_scale * exact).bfloat16())


@interpreted
@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy, which speaks of infinities
def test_infinities_saturate_and_small_numbers_keep_their_digits_in_the_interpreter() -> None:
    rule = optimizers.make("lstm", hidden_size=3, preprocess_factor=None)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    grads = torch.tensor([float("nan"), 1e30, float("inf"), -float("inf"), 0.0])
    _, state = rule.init(theta, {"x": grads})
    deltas, new = rule.update(theta, {"x": grads}, state, {}, grads.sum())
    assert deltas["x"].isnan().tolist() == [True, False, False, False, False]
    assert new["h2"].isfinite().tolist() == [[False, True, True, True, True]] * 3
    # Zero weights: c becomes half of itself, and h half of its tangent.
    tiny = {k: torch.full_like(v, 1e-9) for k, v in state.items()}
    _, new = rule.update({k: torch.zeros_like(v) for k, v in theta.items()}, {"x": grads[4:]}, {
        k: h[:, 4:].contiguous() for k, h in tiny.items()
    }, {}, grads[4])  # fmt: skip
    torch.testing.assert_close(new["h1"], torch.full((3, 1), 0.25e-9), rtol=1e-6, atol=0)


@itself
def test_without_triton_or_by_the_switch_pure_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finder = lstm_kernel._triton_kernels.__wrapped__
    monkeypatch.delitem(sys.modules, "learnedopt.optimizers.kernels.lstm_triton", raising=False)
    monkeypatch.delattr(optimizers, "lstm_triton", raising=False)
    monkeypatch.delitem(sys.modules, "learnedopt.optimizers.kernels.lstm_triton_device", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.INFO, logger="learnedopt"):
        assert finder() is None
        monkeypatch.setenv(native.SWITCH, "0")
        assert finder() is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "Install triton 3.5" in caplog.records[0].message and native.SWITCH in caplog.records[1].message
