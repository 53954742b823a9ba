"""The two-colours grid: the world's rules, the agents' losses and meta-gradients, and runs that are stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import learnedopt
from benchmarks import two_colours
from benchmarks import two_colours_env as env
from benchmarks.two_colours_agent import EntropyWeighted, NextPolicyLoss, PlayedBootstrap, TwoColours
from benchmarks.two_colours_report import report
from learnedopt import Carry, Execution, InnerLoop, KLDivergence, Tape, Theta, Unrolled
from learnedopt.optimizers.kernels import native

UP, DOWN, LEFT, RIGHT = range(4)
SWAP = 1000


def world(agent: int, blue: int, red: int, num_steps: int = 0) -> env.World:
    return env.World(np.array([[agent, blue, red]]), num_steps)


@pytest.mark.parametrize(
    ("cell", "action", "after"),
    [
        (12, UP, 7), (12, DOWN, 17), (12, LEFT, 11), (12, RIGHT, 13),
        (0, UP, 0), (5, LEFT, 5), (24, DOWN, 24), (4, RIGHT, 4),
    ],
)  # fmt: skip
def test_an_action_moves_the_agent_by_one_cell_unless_a_wall_is_there(cell: int, action: int, after: int) -> None:
    moved, rewards = env.step(world(cell, 2, 3), np.array([action]), np.array([0.5]), SWAP)
    assert moved.cells.tolist() == [[after, 2, 3]] and moved.num_steps == 1
    assert rewards.tolist() == [-0.04]


@pytest.mark.parametrize(("num_steps", "sign"), [(0, 1), (SWAP - 1, 1), (SWAP, -1), (2 * SWAP - 1, -1), (2 * SWAP, 1)])
def test_the_colours_change_places_every_so_many_steps(num_steps: int, sign: int) -> None:
    starts = world(11, 12, 20, num_steps), world(11, 20, 12, num_steps)
    blue, red = (float(env.step(start, np.array([RIGHT]), np.array([0.0]), SWAP)[1][0]) for start in starts)
    assert (blue, red) == (sign, -sign)


@pytest.mark.parametrize("which", [1, 2])
def test_the_object_that_was_reached_moves_to_any_free_cell_alike(which: int) -> None:
    other = 20
    start = world(11, 12, other) if which == 1 else world(11, other, 12)
    found = []
    for k in range(230):
        moved, _ = env.step(start, np.array([RIGHT]), np.array([(k + 0.5) / 230]), SWAP)
        assert moved.cells[0, 0] == 12 and moved.cells[0, 3 - which] == other
        found.append(int(moved.cells[0, which]))
    free = sorted(set(range(25)) - {12, other})
    assert {cell: found.count(cell) for cell in free} == dict.fromkeys(free, 10)


def test_worlds_begin_on_three_different_cells_and_are_seen_one_hot() -> None:
    cells = env.new_world(np.random.default_rng(0).random((1000, env.NUM_CELLS))).cells
    assert all(len(set(row)) == 3 for row in cells.tolist()) and set(cells.reshape(-1)) == set(range(25))
    seen = env.observe(np.array([[7, 0, 24]]))[0].reshape(3, 2, 5)
    assert seen.argmax(-1).tolist() == [[1, 2], [0, 0], [4, 4]] and seen.sum() == 6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rollouts_in_c_are_those_of_the_slow_way(dtype: type) -> None:
    random = np.random.default_rng(0)
    shapes = [(3, 30, 20), (3, 1, 20), (3, 20, 20), (3, 1, 20), (3, 20, 4), (3, 1, 4)]
    policy = [random.normal(0, 0.4, shape).astype(dtype) for shape in shapes]
    start = env.new_world(random.random((3, 25)))._replace(num_steps=SWAP - 100)
    numbers = random.gumbel(size=(500, 3, 4)), random.random((500, 3))
    fast, slow = (play(policy, start, *numbers, SWAP) for play in (env.rollout, env.slow_rollout))
    for x, y in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(x, y)
    assert {-1.0, -0.04, 1.0} == set(slow.rewards.reshape(-1))


def test_rollouts_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    family = TwoColours(2, hidden=6)
    fast = family.sample(1, torch.Generator().manual_seed(0))
    monkeypatch.setattr(native, "library", lambda *_: None)
    slow = family.sample(1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast, slow)


def test_actions_are_drawn_from_the_softmax() -> None:
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    policy = [np.zeros(s) for s in ((1, 30, 4), (1, 1, 4), (1, 4, 4), (1, 1, 4), (1, 4, 4))] + [logits[None, None]]
    random = np.random.default_rng(0)
    played = env.rollout(policy, world(12, 0, 24), random.gumbel(size=(20_000, 1, 4)), random.random((20_000, 1)), SWAP)
    frequencies = np.bincount(played.actions[0], minlength=4) / 20_000
    np.testing.assert_allclose(frequencies, [0.1, 0.2, 0.3, 0.4], atol=0.015)  # four standard errors


def setting(num_agents: int = 2, hidden: int = 5, outer_entropy: float = 0.0) -> tuple[InnerLoop, Theta, Carry]:
    """A small loop in float64 after a few updates, so that histories and weights are not those of the start."""
    family = TwoColours(num_agents, hidden, swap_every=50)
    rule = learnedopt.optimizers.make("sgd", lr=0.1, learn=())
    weights = EntropyWeighted(num_agents, hidden=4, outer_entropy=outer_entropy)
    loop = InnerLoop(family, rule, Execution(dtype=torch.float64), inner_objective=weights)
    generator = torch.Generator().manual_seed(3)
    theta = {
        k: v.double() + 0.3 * torch.randn(v.shape, generator=generator) for k, v in loop.init_theta(generator).items()
    }
    carry = loop.start(family.sample(1, generator))
    estimate = Unrolled(1).estimate(loop, theta, PlayedBootstrap(12), carry)
    return loop, theta, estimate.carry


def test_returns_go_on_with_the_value_at_the_rollouts_end_and_history_keeps_ten_means() -> None:
    loop, _, carry = setting()
    family = loop.family
    assert isinstance(family, TwoColours)
    tasks = family.play(carry.tasks, carry.params)
    played = family._rollout(carry.tasks, {k: p[0] for k, p in carry.params.items()})
    x = torch.from_numpy(env.observe(played.cells)).double()
    for i in range(3):
        x = x @ carry.params[f"value/{i}/weight"][0] + carry.params[f"value/{i}/bias"][0]
        x = x.relu() if i < 2 else x
    for agent in range(2):
        following = x[agent, -1, 0]
        for t in reversed(range(16)):
            following = played.rewards[agent, t] + 0.99 * following
            assert float(tasks["returns"][0, agent, t]) == pytest.approx(float(following), rel=1e-12)
            advantage = following - x[agent, t, 0]
            assert float(tasks["advantages"][0, agent, t]) == pytest.approx(float(advantage), rel=1e-9)
        assert float(tasks["history"][0, agent, -1]) == pytest.approx(played.rewards[agent].mean())
    torch.testing.assert_close(tasks["history"][0, :, :-1], carry.tasks["history"][0, :, 1:].double())
    gained = tasks["total"][0] - carry.tasks["total"][0]
    torch.testing.assert_close(gained, torch.from_numpy(played.rewards.sum(1)))


def test_the_inner_loss_is_policy_and_value_less_the_weighted_entropy() -> None:
    loop, theta, carry = setting()
    family, weighted = loop.family, loop.inner_objective
    assert isinstance(weighted, EntropyWeighted)
    params, batch = ({k: v[0] for k, v in x.items()} for x in (carry.params, family.batch(carry.tasks, 0, "train")))
    policy = family.outputs(params, batch).softmax(-1)
    weights = weighted.weights(theta, batch["history"])
    expected = torch.zeros((), dtype=torch.float64)
    for agent in range(2):
        for t in range(16):
            p, action = policy[agent, t], int(batch["actions"][agent, t])
            expected = expected - batch["advantages"][agent, t] * p[action].log() / 16
            expected = expected + weights[agent] * (p * p.log()).sum() / 16
    value = family.loss(params, batch) - weighted.outer_loss(theta, family, params, batch)
    # The rollout was played with these parameters, so the advantages are the value's errors.
    torch.testing.assert_close(value, 0.5 * batch["advantages"].square().mean(1).sum())
    torch.testing.assert_close(weighted.loss(theta, family, params, batch), expected + value, rtol=1e-12, atol=1e-12)
    assert weights.min() > 0 and weights.max() < 1 and weights.std() > 1e-3


@pytest.mark.parametrize("method", ["bmg", "mg"])
def test_the_meta_gradient_is_the_slope_of_what_the_outer_level_compares(method: str) -> None:
    loop, theta, carry = setting(outer_entropy=0.1 if method == "mg" else 0.0)
    objective = PlayedBootstrap(3) if method == "bmg" else NextPolicyLoss()
    estimate = Unrolled(1).estimate(loop, theta, objective, carry)
    end = loop.run(theta, carry, 1, Tape.NONE).end
    # What was played after the step is data, and so is the target.
    target, ahead = PlayedBootstrap(3 if method == "bmg" else 1).find(loop, theta, end)

    def value(theta: Theta) -> torch.Tensor:
        at = loop.run(theta, carry, 1, Tape.NONE).end._replace(tasks=ahead.tasks)
        if method == "mg":
            return loop.losses(theta, at, "train").sum()
        return KLDivergence()(loop, target, at, "train").sum() * 2 * 16

    torch.testing.assert_close(value(theta), estimate.loss, rtol=1e-10, atol=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in theta.items()}
        up, down = (value({k: v + step * way[k] for k, v in theta.items()}) for step in (1e-4, -1e-4))
        slope = sum((way[k] * g).sum() for k, g in estimate.grads.items())
        torch.testing.assert_close((up - down) / 2e-4, slope, rtol=1e-6, atol=1e-12)
    assert all(g.abs().max() > 0 for g in estimate.grads.values())


def test_one_agents_meta_gradient_knows_nothing_of_another() -> None:
    loop, theta, carry = setting()
    other = {k: torch.cat([v[:1], 2.0 * v[1:] - 1.0]) for k, v in theta.items()}
    mine, changed = (Unrolled(1).estimate(loop, x, PlayedBootstrap(3), carry).grads for x in (theta, other))
    for k, g in mine.items():
        torch.testing.assert_close(changed[k][0], g[0], rtol=1e-12, atol=1e-15)
        assert (changed[k][1] - g[1]).abs().max() > 1e-6 * g[1].abs().max()


def test_training_goes_on_with_every_rollout_learnt_from_once() -> None:
    loop, theta, carry = setting()
    for objective, played in ((PlayedBootstrap(4), 4), (NextPolicyLoss(), 1)):
        ahead = Unrolled(1).estimate(loop, theta, objective, carry).carry
        assert ahead.step - carry.step == played and int(ahead.tasks["rollouts"] - carry.tasks["rollouts"]) == played
        by_hand = carry
        for _ in range(played):
            by_hand = loop.run(theta, by_hand, 1, Tape.NONE).end
            assert isinstance(loop.family, TwoColours)
            by_hand = by_hand._replace(tasks=loop.family.play(by_hand.tasks, by_hand.params))
        torch.testing.assert_close(ahead.params, by_hand.params, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ahead.tasks, by_hand.tasks, rtol=1e-12, atol=1e-14)


SMALL = {"num_steps": 3 * 64, "num_agents": 2, "hidden": 6, "num_target_steps": 2, "swap_every": 64, "record_every": 64}


@pytest.mark.parametrize("method", ["bmg", "mg", "fixed"])
def test_a_run_that_was_killed_goes_on_to_the_bit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = two_colours.Run(method, **SMALL)
    whole = run.go_on(tmp_path / "whole", method)
    assert [point["steps"] for point in whole] == [64, 128, 192]
    write, calls = two_colours.write_atomically, []

    def killed(path: Path, write_to: object) -> None:
        calls.append(path)
        if len(calls) == 2:  # the checkpoint has been written, its point has not
            raise KeyboardInterrupt
        write(path, write_to)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(two_colours, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            run.go_on(tmp_path / "parts", method)
    assert run.go_on(tmp_path / "parts", method) == whole
    weights = np.array([point["weight"] for point in whole])
    assert (weights == 0.5).all() if method == "fixed" else (np.diff(weights, axis=0) != 0).all()


def test_files_of_another_run_and_a_lost_past_are_refused(tmp_path: Path) -> None:
    run = two_colours.Run("mg", **SMALL)
    run.go_on(tmp_path, "mg")
    with pytest.raises(ValueError, match="is of another run"):
        two_colours.Run("mg", **SMALL, lr=0.2).go_on(tmp_path, "mg")
    (tmp_path / "mg.json").unlink()
    with pytest.raises(ValueError, match="remove both"):
        run.go_on(tmp_path, "mg")
    with pytest.raises(ValueError, match="none of"):
        two_colours.Run("sgd")
    with pytest.raises(ValueError, match="num_agents"):
        TwoColours().sample(2, torch.Generator())
    with pytest.raises(ValueError, match="num_target_steps"):
        PlayedBootstrap(0)


def test_the_report_compares_runs_at_the_end_of_the_shortest(tmp_path: Path) -> None:
    two_colours.Run("fixed", **SMALL).go_on(tmp_path, "fixed")
    mg = two_colours.Run("mg", **{**SMALL, "num_steps": 128}).go_on(tmp_path, "mg")
    table = report(tmp_path, tmp_path / "figure.png")
    a, b = mg[-1]["total"]
    mean, half = (a + b) / 2, 12.71 * abs(a - b) / 2  # two values: their standard error is half their distance
    assert f"| mg | {mean:,.0f} ± {half:,.0f} |" in table and "after 128 steps" in table
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="holds no runs"):
        report(tmp_path / "empty", tmp_path / "figure.png")
