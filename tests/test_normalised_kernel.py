"""The compiled steps of the normalised rules and of the general one against their updates, over lanes of all kinds."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from problems import FLOAT, Quadratic, generic_theta, sample
from torch import Tensor, nn

from learnedopt import Execution, InnerLoop, LearnedOptimizer, Tape
from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta
from learnedopt.execution import particles
from learnedopt.optimizers import General, Normalised, NormalisedLSTM, NormalisedMLP
from learnedopt.optimizers.kernels import lanes as lanes_module
from learnedopt.optimizers.kernels import normalised_native
from learnedopt.plug_in.bound import BoundSteps

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
SHAPES = {
    "conv.weight": (7, 3, 3, 2), "conv.bias": (7,), "norm.weight": (70,), "wide.weight": (5, 300), "temperature": (),
    "tall.weight": (130, 4), "tall.bias": (130,), "same.weight": (5, 300), "head.weight": (1, 3), "head.bias": (1,),
}  # fmt: skip
"""Tensors of whole blocks and of less than one; two of one shape."""
RULES: dict[str, Any] = {
    "normalised": Normalised(),
    "normalised-mlp": NormalisedMLP(),
    "normalised-mlp, 5 units": NormalisedMLP(hidden=5),
    "normalised-lstm": NormalisedLSTM(),
    "normalised-lstm, 3 units": NormalisedLSTM(units=3),
    "general": General(),
    "general without directions": General(orthogonalise=False),
}
every_rule = pytest.mark.parametrize("kind", RULES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def memory_of(state: Any) -> Any:
    return getattr(state, "frame", state)


def with_memory(state: Any, **entries: Any) -> Any:
    if hasattr(state, "frame"):
        return state._replace(frame=state.frame._replace(**entries))
    return state._replace(**entries)


def drawn(rule: Any, lanes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Theta, Params, Any, Params]:
    """Return theta, gradients, a state in the middle of training, and parameters, all with leading ``lanes``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn((*lanes, *shape), generator=generator, dtype=FLOAT).to(dtype)

    theta = {k: v.to(dtype) + 0.2 * normal(*v.shape) for k, v in rule.init_theta(generator).items()}
    params = {k: normal(*shape) for k, shape in SHAPES.items()}
    grads = {k: 0.01 * normal(*shape) for k, shape in SHAPES.items()}
    one = {k: torch.zeros(shape, dtype=dtype) for k, shape in SHAPES.items()}
    state = tree.tree_map(lambda x: 0.01 * normal(*x.shape), rule.init(rule.init_theta(generator), one)[1])
    square = {k: x.square() for k, x in memory_of(state).square.items()}
    average = {k: p + 0.1 * normal(*p.shape[len(lanes) :]) for k, p in params.items()}
    step = torch.randint(1, 40, lanes, generator=generator).to(dtype)
    for each in (grads, square):  # a coordinate that never had a gradient
        each["wide.weight"][..., 2, 7] = 0
    return theta, grads, with_memory(state, step=step, square=square, average=average), params


PROGRESS = 0.37


def by_update(rule: Any, theta: Theta, grads: Params, state: Any, params: Params, progress: Any = None) -> Any:
    progress = torch.tensor(PROGRESS, dtype=params["temperature"].dtype) if progress is None else progress
    deltas, state = rule.update(theta, grads, state, params, torch.zeros(()), progress=progress)
    return {k: p + deltas[k] for k, p in params.items()}, state


def by_kernel(rule: Any, theta: Theta, grads: Params, state: Any, params: Params) -> Any:
    progress = torch.tensor(PROGRESS, dtype=params["temperature"].dtype)
    found = rule.kernel.step(theta, grads, state, params, torch.zeros(()), progress=progress)
    assert found is not None
    return found


def assert_close(found: Any, expected: Any, dtype: torch.dtype = FLOAT, **options: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], **options)


def test_a_compiler_is_there() -> None:
    with torch.no_grad():
        assert normalised_native.serves([torch.zeros(())]), "install gcc: the next tests would test nothing"


@torch.no_grad()
@every_dtype
@every_rule
def test_a_compiled_step_is_the_update(kind: str, dtype: torch.dtype) -> None:
    rule = RULES[kind]
    inputs = drawn(rule, (), dtype)
    found, expected = by_kernel(rule, *inputs), by_update(rule, *inputs)
    assert_close(found, expected, dtype)
    moved = [float((expected[0][k] - p).abs().max()) for k, p in inputs[3].items()]
    assert min(moved) > 1e-4  # enough to be told from standing still


@torch.no_grad()
@every_rule
def test_the_first_steps_of_a_run_are_the_updates(kind: str) -> None:
    rule, names = RULES[kind], ("conv.weight", "conv.bias", "tall.weight", "temperature")
    theta, grads, _, params = drawn(rule, (), FLOAT)
    params, grads = ({k: x[k] for k in names} for x in (params, grads))
    grads["temperature"] = torch.zeros((), dtype=FLOAT)  # without any gradient at all
    start, state = rule.init(theta, params)
    found, expected = (start, state), (start, state)
    for _ in range(3):
        found, expected = by_kernel(rule, theta, grads, *found[::-1]), by_update(rule, theta, grads, *expected[::-1])
    assert_close(found, expected)
    assert all(x.isfinite().all() for x in tree.leaves(found))


@torch.no_grad()
@every_rule
def test_how_tensors_are_cut_and_who_takes_the_pieces_changes_no_sum(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = RULES[kind]
    inputs = drawn(rule, (), FLOAT)
    whole = by_kernel(rule, *inputs)
    monkeypatch.setattr(normalised_native, "_PIECE", 64)
    normalised_native.cut.cache_clear()
    cut = normalised_native.cut(tuple(SHAPES.values()))
    assert len(cut.pieces) > 2 * len(SHAPES) and cut.pieces[-1][0] == len(SHAPES) - 1
    pieces, started, pool = by_kernel(rule, *inputs), [], lanes_module.ThreadPoolExecutor
    assert_close(pieces, whole)
    monkeypatch.setattr(lanes_module, "SHARE", 1)
    monkeypatch.setattr(lanes_module, "ThreadPoolExecutor", lambda n: started.append(n) or pool(n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(by_kernel(rule, *inputs), pieces, rtol=0, atol=0)
    assert started == [3] * (3 if kind == "general" else 2)  # matrices are orthogonalised in between
    normalised_native.cut.cache_clear()


SLOTS, PARTICLES = 3, 4
BATCHED: dict[str, tuple[tuple[int, ...], ...]] = {
    "all have both": ((SLOTS, PARTICLES),) * 4,
    "theta is the particles'": ((PARTICLES,), *((SLOTS, PARTICLES),) * 3),
    "theta is the slots', parameters shared": ((SLOTS,), (SLOTS, PARTICLES), (SLOTS, PARTICLES), ()),
    "nothing but gradients": ((), (SLOTS, PARTICLES), (), ()),
    "nothing but theta": ((PARTICLES,), (), (SLOTS,), ()),
}
"""Which of slots and particles theta, gradients, state and parameters have each."""


def one_lane(x: tree.Tree, lanes: tuple[int, ...], lane: tuple[int, int]) -> tree.Tree:
    index = tuple(lane[0] if size == SLOTS else lane[1] for size in lanes)
    return tree.tree_map(lambda t: t[index], x)


def two_dims(x: tree.Tree, lanes: tuple[int, ...]) -> tree.Tree:
    """Return ``x`` with a dimension for slots and one for particles, of size 1 where it has none."""
    sizes = tuple(size if size in lanes else 1 for size in (SLOTS, PARTICLES))
    return tree.tree_map(lambda t: t.reshape(*sizes, *t.shape[len(lanes) :]), x)


@torch.no_grad()
@every_dtype
@every_rule
@pytest.mark.parametrize("which", BATCHED)
def test_lanes_are_stepped_together(which: str, kind: str, dtype: torch.dtype) -> None:
    rule = RULES[kind]
    inputs = [drawn(rule, lanes, dtype, seed)[i] for i, (seed, lanes) in enumerate(enumerate(BATCHED[which]))]
    theta, grads, state, params = (two_dims(x, lanes) for x, lanes in zip(inputs, BATCHED[which], strict=True))
    progress = torch.linspace(0.1, 0.9, SLOTS, dtype=dtype).reshape(SLOTS, 1)
    found = rule.kernel.step_of_lanes(theta, grads, state, params, torch.zeros(1, 1), 2, progress=progress)
    assert found is not None
    for slot in range(SLOTS):
        for particle in range(PARTICLES):
            each = [one_lane(x, lanes, (slot, particle)) for x, lanes in zip(inputs, BATCHED[which], strict=True)]
            ours = tree.tree_map(lambda x, at=(slot, particle): x[at], found)
            assert_close(ours, by_update(rule, *each, progress=progress[slot, 0]), dtype)


@torch.no_grad()
@every_dtype
def test_strided_tensors_and_lanes_in_any_dimension_are_read_right(dtype: torch.dtype) -> None:
    rule = RULES["general"]
    theta, grads, state, params = drawn(rule, (5,), dtype)
    last = [tree.tree_map(lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0), x) for x in (theta, grads, state)]
    turned = {k: p.mT.contiguous().mT if p.ndim > 2 else p for k, p in params.items()}
    assert not turned["wide.weight"][0].is_contiguous() and not memory_of(last[2]).first["conv.bias"].is_contiguous()
    progress = torch.full((5,), PROGRESS, dtype=dtype)
    found = rule.kernel.step_of_lanes(*last, turned, torch.zeros(5), 1, progress=progress)
    for lane in range(5):
        each = tree.tree_map(lambda x, lane=lane: x[lane], (theta, grads, state, params))
        assert_close(tree.tree_map(lambda x, lane=lane: x[lane], found), by_update(rule, *each), dtype)


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_lane_and_is_what_update_makes_of_it() -> None:
    rule = RULES["normalised-lstm"]
    theta, grads, state, params = drawn(rule, (3,), torch.float32)
    grads["tall.weight"][1, 0, 0] = math.nan
    grads["conv.bias"][1, 3] = math.inf
    theta["output/bias"][2, 1] = 3e5  # exp of it is infinite
    progress = torch.full((3,), PROGRESS)
    found = rule.kernel.step_of_lanes(theta, grads, state, params, torch.zeros(3), 1, progress=progress)
    assert all(x[0].isfinite().all() for x in tree.leaves(found))
    for lane in range(3):
        each = tree.tree_map(lambda x, lane=lane: x[lane], (theta, grads, state, params))
        expected = by_update(rule, *each)
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            assert torch.equal(a[lane].isfinite(), b.isfinite()), lane


@torch.no_grad()
@every_rule
def test_a_step_in_place_has_the_bits_of_one_that_is_not(kind: str) -> None:
    rule = RULES[kind]
    theta, grads, state, params = drawn(rule, (), torch.float32)
    expected = by_kernel(rule, theta, grads, state, params)
    own = copy.deepcopy((params, state))
    versions = [x._version for x in tree.leaves(own)]
    read = [x.clone() for x in (*theta.values(), *grads.values())]
    arguments = (theta, grads, own[1], own[0], torch.zeros(()))
    assert rule.kernel.step_in_place(*arguments, progress=torch.tensor(PROGRESS))
    torch.testing.assert_close(own, expected, rtol=0, atol=0)
    torch.testing.assert_close([*theta.values(), *grads.values()], read, rtol=0, atol=0)
    unchanged = [i for i, x in enumerate(tree.leaves(own)) if x._version == versions[i]]
    assert len(unchanged) == ("general" in kind)  # the run's length


@torch.no_grad()
def test_what_is_not_contiguous_is_not_stepped_in_place() -> None:
    rule = RULES["normalised"]
    theta, grads, state, params = drawn(rule, (), torch.float32)
    params["wide.weight"] = params["wide.weight"].mT.contiguous().mT
    before = copy.deepcopy((params, state))
    assert not rule.kernel.step_in_place(theta, grads, state, params, None, progress=torch.tensor(PROGRESS))
    torch.testing.assert_close((params, state), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp loads what was scripted
def test_it_serves_only_where_nothing_is_recorded_in_one_dtype_on_a_cpu() -> None:
    rule, progress = RULES["general"], torch.tensor(PROGRESS, dtype=FLOAT)
    inputs = drawn(rule, (), FLOAT)

    def serves(*each: Any) -> bool:
        return rule.kernel.step(*each, torch.zeros(()), progress=progress) is not None

    assert not serves(*inputs)  # gradients are recorded
    seen: list[bool] = []

    def along(params: Params) -> Params:
        with torch.no_grad():
            seen.append(serves(*inputs[:3], params))
        return params

    torch.func.jvp(along, (inputs[3],), (inputs[3],))
    torch.func.vmap(along, in_dims=(0,))({k: p.unsqueeze(0) for k, p in inputs[3].items()})
    with torch.autograd.forward_ad.dual_level():
        along(inputs[3])
    assert seen == [False, False, False]
    along(inputs[3])
    assert seen[3]
    with torch.no_grad():
        for kinds in ({0: torch.float32}, {3: torch.float32}, dict.fromkeys(range(4), torch.bfloat16)):
            assert not serves(*(tree.to(x, None, kinds.get(i, FLOAT)) for i, x in enumerate(inputs)))
        assert not serves(*(tree.to(x, torch.device("meta"), None) for x in inputs))


@torch.no_grad()
@pytest.mark.parametrize("part", ["theta", "hidden", "first", "gradient"])
def test_another_rules_theta_or_state_is_refused_before_c_reads_it(part: str) -> None:
    rule = RULES["normalised-lstm"]
    theta, grads, state, params = drawn(rule, (), FLOAT)
    if part == "theta":
        theta["recurrent/weight"] = theta["recurrent/weight"][:, 1:]
    elif part == "hidden":
        state = state._replace(hidden=state.hidden[:, 1:])
    elif part == "first":
        memory_of(state).first["wide.weight"] = memory_of(state).first["wide.weight"][:, 1:]
    else:
        grads["wide.weight"] = grads["wide.weight"][1:]
    with pytest.raises(ValueError, match=r"a step was given .* of shape .*made by init"):
        by_kernel(rule, theta, grads, state, params)


@torch.no_grad()
def test_products_in_bfloat16_are_near_and_only_where_nothing_is_recorded() -> None:
    exact, fast = RULES["general"], General(bfloat16=True)
    inputs = drawn(exact, (), torch.float32)
    expected, found = by_kernel(exact, *inputs)[0], by_kernel(fast, *inputs)[0]
    if fast.products(torch.zeros(())) is None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        pytest.skip("this processor does not multiply bfloat16")
    assert_close(found, by_update(fast, *inputs)[0], torch.float32)
    moved = {k: p - inputs[3][k] for k, p in expected.items()}
    for name in ("wide.weight", "conv.weight"):
        gap = (found[name] - expected[name]).norm() / moved[name].norm()
        assert 1e-5 < gap < 0.1
    with torch.enable_grad():
        recorded = by_update(fast, *inputs)[0]
    assert_close(tree.detach(recorded), by_update(exact, *inputs)[0], torch.float32)


# Who takes such steps.


@pytest.mark.usefixtures("float64")
@every_rule
def test_the_engine_takes_compiled_steps_where_nothing_is_recorded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, move = [], normalised_native.Ready.move
    loop = InnerLoop(Quadratic(), RULES[kind], Execution(chunk_size=4), horizon=5)
    theta, carry = generic_theta(loop), loop.start(sample(loop.family, 3))
    expected = loop.run(theta, carry, 5, Tape.FULL)
    monkeypatch.setattr(
        normalised_native.Ready, "move", lambda *args: calls.append(tuple(args[0].data.lanes)) or move(*args)
    )
    found = loop.run(theta, carry, 5, Tape.NONE)
    assert calls == [(3,)] * 5
    assert_close((found.losses, found.end.params, found.end.state), tree.detach((expected.losses, *expected.end[1:3])))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["normalised", "general"])
@pytest.mark.parametrize(("num_slots", "num_particles"), [(2, 3), (1, 3), (2, 1)], ids=str)
def test_particles_take_their_steps_together(
    num_slots: int, num_particles: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, calls, move = InnerLoop(Quadratic(), RULES[kind], horizon=8), [], normalised_native.Ready.move
    tasks, one = sample(loop.family, num_slots), generic_theta(loop)
    loop.check_start(one, loop.start(tasks))
    generator = torch.Generator().manual_seed(3)
    theta = {k: v + 0.1 * torch.randn(num_slots, num_particles, *v.shape, generator=generator) for k, v in one.items()}
    begun = particles.begin(loop, theta, tasks, loop.start(tasks).params)
    particles.run(loop, begun, 1)  # the first time, they are tried alone too
    monkeypatch.setattr(
        normalised_native.Ready, "move", lambda *args: calls.append(tuple(args[0].data.lanes)) or move(*args)
    )
    found, losses = particles.run(loop, begun, 3)
    assert calls == [tuple(size for size in (num_slots, num_particles) if size > 1)] * 3
    for slot in range(num_slots):
        for i in range(num_particles):
            own = {k: v[slot, i] for k, v in theta.items()}
            alone = loop.run(own, loop.start(tree.narrow(tasks, slot, slot + 1)), 3, Tape.FULL)
            assert_close(losses[:, slot, i], alone.losses[:, 0].detach())
            ours, expected = (found.params, found.state), tree.detach((alone.end.params, alone.end.state))
            assert_close(tree.tree_map(lambda x, at=(slot, i): x[at], ours), tree.squeeze(expected))


@every_rule
def test_the_plug_in_steps_in_place_and_leaves_what_it_gave_away(kind: str) -> None:
    rule = RULES[kind]
    theta = rule.init_theta(torch.Generator().manual_seed(0))

    def trained(in_place: bool) -> tuple[nn.Module, LearnedOptimizer, list[Any]]:
        torch.manual_seed(0)
        model, given = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), []
        optimizer = bare(model.named_parameters(), (rule, theta), num_steps=6)
        for step in range(6):
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            if step == 4:  # without a gradient a parameter stays, so that nothing is written over it
                next(model.parameters()).grad = None
            optimizer._owned = optimizer._owned and in_place
            optimizer.step()
            if step == 2:
                given.append(optimizer.state_dict())
                given.append(copy.deepcopy(given[0]))
        return model, optimizer, given

    calls, step_in_place, step_ready = [], type(rule.kernel).step_in_place, BoundSteps.step

    def counted(*args: Any, **options: Any) -> bool:
        calls.append(1)
        return step_in_place(*args, **options)

    def counted_ready(*args: Any) -> bool:
        calls.append(1)
        return step_ready(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rule.kernel), "step_in_place", counted)
        patch.setattr(BoundSteps, "step", counted_ready)
        found, optimizer, given = trained(True)
    assert len(calls) == 3  # not the first, not after state_dict(), not without a gradient
    expected, other, _ = trained(False)
    torch.testing.assert_close(dict(found.named_parameters()), dict(expected.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)
    torch.testing.assert_close(given[0]["state"], given[1]["state"], rtol=0, atol=0)


def test_switched_off_or_without_a_compiler_it_runs_in_pure_torch(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from learnedopt.optimizers import General\n"
        "rule, params = General(), {'x': torch.ones(3, 2)}\n"
        "theta, half = rule.init_theta(torch.Generator().manual_seed(0)), torch.tensor(0.5)\n"
        "with torch.no_grad():\n"
        "    state = rule.init(theta, params)[1]\n"
        "    print(rule.kernel.step(theta, params, state, params, None, progress=half))\n"
        "    print(rule.kernel.step_in_place(theta, params, state, params, None, progress=half))\n"
        "    print(rule.update(theta, params, state, params, None, progress=half)[0]['x'].isfinite().all().item())\n"
    )
    absent = {"LEARNEDOPT_CACHE": str(tmp_path), "PATH": str(tmp_path), "CC": "absent"}
    for environment in ({"LEARNEDOPT_NATIVE": "0"}, absent):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
        )
        assert run.stdout.split() == ["None", "False", "True"]
