"""The compiled step of the small network for every coordinate against its update in torch, over lanes of all kinds."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import FLOAT, Quadratic, generic_theta, sample
from test_small_mlp import RULES, TOLERANCE, assert_close, by_update, drawn, every_rule
from torch import Tensor

from learnedopt import Execution, InnerLoop, Tape
from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta
from learnedopt.execution import particles
from learnedopt.optimizers import LearnedInit, SmallMLP
from learnedopt.optimizers.kernels import native, small_mlp_kernel
from learnedopt.optimizers.small_mlp import Memory

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def by_kernel(rule: SmallMLP, theta: Theta, grads: Params, state: Memory, params: Params) -> tuple[Params, Memory]:
    found = rule.kernel.step(theta, grads, state, params, torch.zeros(()))
    assert found is not None
    return found


def test_a_compiler_is_there() -> None:
    with torch.no_grad():
        served = small_mlp_kernel.serves(small_mlp_kernel.Tensors(torch.zeros(()), [], [], [], []))
    assert served, "install gcc: the next tests would test nothing"


@torch.no_grad()
@every_dtype
@every_rule
def test_a_compiled_step_is_the_update(kind: str, dtype: torch.dtype) -> None:
    inputs = drawn(RULES[kind], (), dtype)
    found, expected = by_kernel(RULES[kind], *inputs), by_update(RULES[kind], *inputs)
    assert_close(found, expected, dtype)
    moved = [float((expected[0][k] - p).abs().max()) for k, p in inputs[3].items() if p.numel()]
    assert min(moved) > 1e-3  # enough to be told from standing still
    assert all(torch.equal(x.isnan(), torch.zeros_like(x, dtype=torch.bool)) for x in tree.leaves(found))


SLOTS, PARTICLES = 3, 4
BATCHED: dict[str, tuple[tuple[int, ...], ...]] = {
    "all have both": ((SLOTS, PARTICLES),) * 4,
    "theta is the particles'": ((PARTICLES,), *((SLOTS, PARTICLES),) * 3),
    "theta is the slots', parameters shared": ((SLOTS,), (SLOTS, PARTICLES), (SLOTS, PARTICLES), ()),
    "nothing but gradients": ((), (SLOTS, PARTICLES), (), ()),
    "nothing but theta": ((PARTICLES,), (), (SLOTS,), ()),
}
"""Which of slots and particles theta, gradients, state and parameters have each."""


def over_lanes(fn: Callable[..., Any], batched: tuple[tuple[int, ...], ...]) -> Callable[..., Any]:
    inner = tuple(0 if PARTICLES in lanes else None for lanes in batched)
    outer = tuple(0 if SLOTS in lanes else None for lanes in batched)
    return torch.func.vmap(torch.func.vmap(fn, in_dims=inner), in_dims=outer)


@torch.no_grad()
@every_dtype
@every_rule
@pytest.mark.parametrize("which", BATCHED)
def test_nested_vmap_ends_in_one_call(
    which: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, calls = RULES[kind], []
    run = small_mlp_kernel._run
    monkeypatch.setattr(small_mlp_kernel, "_run", lambda *args: calls.append(args[1]) or run(*args))
    inputs = [drawn(rule, lanes, dtype, seed)[i] for i, (seed, lanes) in enumerate(enumerate(BATCHED[which]))]
    found = over_lanes(lambda *each: by_kernel(rule, *each), BATCHED[which])(*inputs)
    assert calls == [(SLOTS, PARTICLES)]
    assert_close(found, over_lanes(lambda *each: by_update(rule, *each), BATCHED[which])(*inputs), dtype)
    for lane in ((slot, particle) for slot in range(SLOTS) for particle in range(PARTICLES)):
        each = [one_lane(x, lanes, lane) for x, lanes in zip(inputs, BATCHED[which], strict=True)]
        alone = by_kernel(rule, *each)  # company changes no bit
        torch.testing.assert_close(one_lane(found, (SLOTS, PARTICLES), lane), alone, rtol=0, atol=0)
    broadcast = [two_dims(x, lanes) for x, lanes in zip(inputs, BATCHED[which], strict=True)]
    together = rule.kernel.step_of_lanes(*broadcast, torch.zeros(1, 1), 2)
    assert together is not None
    torch.testing.assert_close(together, found, rtol=0, atol=0)


def one_lane(x: tree.Tree, lanes: tuple[int, ...], lane: tuple[int, int]) -> tree.Tree:
    index = tuple(lane[0] if size == SLOTS else lane[1] for size in lanes)
    return tree.tree_map(lambda t: t[index], x)


def two_dims(x: tree.Tree, lanes: tuple[int, ...]) -> tree.Tree:
    """Return ``x`` with a dimension for slots and one for particles, of size 1 where it has none."""
    sizes = tuple(size if size in lanes else 1 for size in (SLOTS, PARTICLES))
    return tree.tree_map(lambda t: t.reshape(*sizes, *t.shape[len(lanes) :]), x)


@torch.no_grad()
@every_dtype
def test_strided_tensors_and_lanes_in_any_dimension_are_read_right(dtype: torch.dtype) -> None:
    rule = RULES["default"]
    theta, grads, state, params = drawn(rule, (5,), dtype)
    expected = torch.func.vmap(lambda *each: by_update(rule, *each))(theta, grads, state, params)
    # The lanes last, and a transposed matrix, which C cannot read as it is.
    last = [tree.tree_map(lambda x: x.movedim(0, -1).contiguous(), x) for x in (theta, grads, state)]
    turned = {k: p.mT.contiguous().mT if p.ndim == 3 else p for k, p in params.items()}
    assert not turned["w"].is_contiguous() and not last[1]["w"].movedim(-1, 0).is_contiguous()
    found = torch.func.vmap(lambda *each: by_kernel(rule, *each), in_dims=(-1, -1, -1, 0))(*last, turned)
    assert_close(found, expected, dtype)
    assert all(torch.equal(a, b) for a, b in zip(turned.values(), params.values(), strict=True))


@torch.no_grad()
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES["default"]
    inputs = drawn(rule, (7,), torch.float32)
    step = torch.func.vmap(lambda *each: by_kernel(rule, *each))
    expected = step(*inputs)
    started = []
    pool = small_mlp_kernel.ThreadPoolExecutor
    monkeypatch.setattr(small_mlp_kernel, "_SHARE", 1)
    monkeypatch.setattr(small_mlp_kernel, "ThreadPoolExecutor", lambda n: started.append(n) or pool(n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(step(*inputs), expected, rtol=0, atol=0)
    assert started == [3]


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_lane_and_is_what_update_makes_of_it() -> None:
    rule = RULES["default"]
    theta, grads, state, params = drawn(rule, (3,), torch.float32)
    grads["w"][1, 0, 0] = math.nan
    params["b"][1, 3] = math.inf
    theta["layer1/weight"][2, 1] = 3e5  # exp of it is infinite
    found = torch.func.vmap(lambda *each: by_kernel(rule, *each))(theta, grads, state, params)
    expected = torch.func.vmap(lambda *each: by_update(rule, *each))(theta, grads, state, params)
    assert all(x[0].isfinite().all() for x in tree.leaves(found))
    assert found[0]["w"][1].isnan().all() and not found[0]["whole"][2].isfinite().all()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    for a, b in zip(tree.leaves(found[0]), tree.leaves(expected[0]), strict=True):
        assert torch.equal(a[:2].isfinite(), b[:2].isfinite())
        assert (a[2].isfinite() == b[2].isfinite()).float().mean() > 0.99 or not a.numel()


@torch.no_grad()
@every_dtype
def test_gradients_that_are_zero_move_it_by_finite_steps(dtype: torch.dtype) -> None:
    rule = RULES["default"]
    theta, grads, state, params = drawn(rule, (), dtype)
    zeros = tree.tree_map(torch.zeros_like, (grads, Memory(torch.zeros((), dtype=dtype), state.averages)))
    found = by_kernel(rule, theta, *zeros, params)
    assert all(x.isfinite().all() for x in tree.leaves(found)) and not found[1].averages["w"].any()
    assert_close(found, by_update(rule, theta, *zeros, params), dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp loads what was scripted
def test_it_serves_only_where_nothing_is_recorded_in_one_dtype_on_a_cpu() -> None:
    rule = RULES["default"]
    inputs = drawn(rule, (), FLOAT)
    ask = rule.kernel.step
    assert ask(*inputs, torch.zeros(())) is None  # gradients are recorded
    seen = []

    def along(params: Params) -> Params:
        with torch.no_grad():
            seen.append(ask(*inputs[:3], params, torch.zeros(())))
        return params

    torch.func.jvp(along, (inputs[3],), (inputs[3],))
    with torch.autograd.forward_ad.dual_level():
        along(inputs[3])
    assert seen == [None, None]
    along(inputs[3])
    assert seen[2] is not None
    with torch.no_grad():
        for kinds in ({0: torch.float32}, {3: torch.float32}, dict.fromkeys(range(4), torch.bfloat16)):
            mixed = [tree.to(x, None, kinds.get(i, FLOAT)) for i, x in enumerate(inputs)]
            assert ask(*mixed, torch.zeros(())) is None
            assert rule.kernel.step_of_lanes(*map(tree.unsqueeze, mixed), torch.zeros(1), 1) is None
        assert ask(*(tree.to(x, torch.device("meta"), None) for x in inputs), torch.zeros(())) is None


def test_a_derivative_of_the_compiled_step_is_refused() -> None:
    rule = RULES["default"]
    theta, grads, state, params = drawn(rule, (), FLOAT)
    tensors = rule.kernel._tensors({k: v.requires_grad_() for k, v in theta.items()}, grads, state, params)
    _, moved, _ = small_mlp_kernel.step(rule.kernel._network, tensors)
    with pytest.raises(NotImplementedError, match=r"no derivatives; SmallMLP\.update has all"):
        moved[0].sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("part", ["theta", "averages", "gradient"])
def test_another_rules_theta_or_state_is_refused_before_c_reads_it(part: str) -> None:
    theta, grads, state, params = drawn(SmallMLP(), (2,), FLOAT)
    if part == "theta":
        theta["layer0/weight"] = theta["layer0/weight"][:, :, 1:]
    elif part == "averages":
        state.averages["b"] = state.averages["b"][:, 1:]
    else:
        grads["w"] = grads["w"][:, 1:]
    with pytest.raises(ValueError, match=r"was given a tensor of shape .* where .* was expected"):
        torch.func.vmap(lambda *each: by_kernel(SmallMLP(), *each))(theta, grads, state, params)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("start", ["the task's", "learned"])
def test_the_engine_takes_compiled_steps_where_nothing_is_recorded(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, calls, run = Quadratic(), [], small_mlp_kernel._run
    rule: Any = SmallMLP(step_scale=0.1)
    if start == "learned":
        rule = LearnedInit(rule, {k: p[0] for k, p in family.init_params(sample(family)).items()})
    loop = InnerLoop(family, rule, Execution(chunk_size=4))
    theta, carry = generic_theta(loop), loop.start(sample(family, 3))
    expected = loop.run(theta, carry, 5, Tape.FULL)
    monkeypatch.setattr(small_mlp_kernel, "_run", lambda *args: calls.append(args[1]) or run(*args))
    found = loop.run(theta, carry, 5, Tape.NONE)
    assert [tuple(lanes) for lanes in calls] == [(3,)] * 5
    assert_close((found.losses, found.end.params, found.end.state), tree.detach((expected.losses, *expected.end[1:3])))
    loop.run(theta, carry, 5, Tape.FIRST_ORDER)
    assert len(calls) == 5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_slots", "num_particles"), [(2, 3), (1, 3), (2, 1), (1, 1)], ids=str)
def test_particles_take_their_steps_together(
    num_slots: int, num_particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, calls, run = InnerLoop(Quadratic(), SmallMLP(step_scale=0.1)), [], small_mlp_kernel._run
    tasks, one = sample(loop.family, num_slots), generic_theta(loop)
    loop.check_start(one, loop.start(tasks))
    generator = torch.Generator().manual_seed(3)

    def perturbed(v: Tensor) -> Tensor:
        return v + 0.1 * torch.randn(num_slots, num_particles, *v.shape, generator=generator)

    theta = {k: perturbed(v) for k, v in one.items()}
    begun = particles.begin(loop, theta, tasks, loop.start(tasks).params)
    particles.run(loop, begun, 1)  # the first time, they are tried alone too
    monkeypatch.setattr(small_mlp_kernel, "_run", lambda *args: calls.append(tuple(args[1])) or run(*args))
    found, losses = particles.run(loop, begun, 3)
    assert calls == [tuple(size for size in (num_slots, num_particles) if size > 1)] * 3
    for slot in range(num_slots):
        for i in range(num_particles):
            own = {k: v[slot, i] for k, v in theta.items()}
            alone = loop.run(own, loop.start(tree.narrow(tasks, slot, slot + 1)), 3, Tape.FULL)
            assert_close(losses[:, slot, i], alone.losses[:, 0].detach())
            ours, expected = (found.params, found.state), tree.detach((alone.end.params, alone.end.state))
            assert_close(tree.tree_map(lambda x, at=(slot, i): x[at], ours), tree.squeeze(expected))


def test_switched_off_or_without_a_compiler_it_runs_in_pure_torch(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from learnedopt.optimizers import SmallMLP\n"
        "rule, params = SmallMLP(), {'x': torch.ones(3)}\n"
        "theta = rule.init_theta(torch.Generator().manual_seed(0))\n"
        "with torch.no_grad():\n"
        "    state = rule.init(theta, params)[1]\n"
        "    print(rule.kernel.step(theta, params, state, params, None))\n"
        "    print(rule.update(theta, params, state, params, None)[0]['x'].isfinite().all().item())\n"
    )
    absent = {"LEARNEDOPT_CACHE": str(tmp_path), "PATH": str(tmp_path), "CC": "absent"}
    for environment in ({"LEARNEDOPT_NATIVE": "0"}, absent):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
        )
        assert run.stdout.split() == ["None", "True"]


def test_a_library_is_built_again_where_a_header_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    found = []
    for value in (3, 4):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "value.h").write_text(f"#define VALUE {value}\n")
        (folder / "same.c").write_text('#include "value.h"\nint value(void) { return VALUE; }\n')
        with caplog.at_level(logging.WARNING, logger="learnedopt"):
            library = native.library(folder / "same.c")
        assert library is not None, caplog.text
        found.append(library.value())
    assert found == [3, 4]
