"""The two-colours grid of Flennerhag et al. 2022, section 5.1, for several agents at once, in NumPy.

A 5 x 5 grid holds an agent, a blue and a red object on three different cells. An action moves the agent one cell up,
down, left or right; a wall keeps it where it is. On the cell of an object it gets +1 or -1, and that object moves to a
free cell drawn uniformly: one of the 23 that neither the agent nor the other object is on. Every other step costs 0.04.
Blue is the good one first, and the two change places every ``swap_every`` steps. There are no episodes. An observation
is 30 numbers: the row and the column of the agent, the blue and the red object, each one-hot.

Everything here is a pure function; cells are numbered row by row, and arrays have a leading dimension of agents.
``rollout`` plays many steps by a policy in C where that can be compiled, else by ``slow_rollout``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnedopt.optimizers.kernels import native

SIZE = 5
NUM_CELLS = SIZE * SIZE
NUM_ACTIONS = 4
NUM_FEATURES = 3 * 2 * SIZE
STEP_REWARD = -0.04

Cells = NDArray[np.int64]
Floats = NDArray[np.floating]


def _moves() -> Cells:
    """Return the cell that each action leads to from each cell (NUM_CELLS, NUM_ACTIONS): up, down, left, right."""
    row, column = np.divmod(np.arange(NUM_CELLS), SIZE)
    ways = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    return np.stack([_clip(row + r) * SIZE + _clip(column + c) for r, c in ways], axis=1)


def _clip(x: Cells) -> Cells:
    return x.clip(0, SIZE - 1)


MOVES = _moves()
ONE_HOT = np.concatenate([np.eye(SIZE)[x] for x in np.divmod(np.arange(NUM_CELLS), SIZE)], axis=1).astype(np.float32)
"""Row and column of each cell, one-hot (NUM_CELLS, 2 * SIZE)."""


class World(NamedTuple):
    """Where the agent, the blue and the red object are, ``cells`` (num_agents, 3), and the number of steps taken."""

    cells: Cells
    num_steps: int


def new_world(uniform: Floats) -> World:
    """Return a world of objects on free cells, from one row of NUM_CELLS uniform numbers per agent."""
    return World(uniform.argsort(axis=1)[:, :3], 0)


def step(world: World, actions: Cells, uniform: Floats, swap_every: int) -> tuple[World, Floats]:
    """Move every agent by its action; return the world after it and the rewards (num_agents,).

    Args:
        world: before.
        actions: (num_agents,), 0 to 3.
        uniform: (num_agents,) in [0, 1), which an object that was reached is put somewhere by.
        swap_every: steps between two changes of the colours' rewards.
    """
    agent = MOVES[world.cells[:, 0], actions]
    cells = np.concatenate([agent[:, None], world.cells[:, 1:]], axis=1)
    hits = cells[:, 1:] == agent[:, None]
    rewards = np.full(len(agent), STEP_REWARD)
    if hits.any():
        sign = 1.0 if (world.num_steps // swap_every) % 2 == 0 else -1.0
        who, which = np.nonzero(hits)
        rewards[who] = np.where(which == 0, sign, -sign)
        cells[who, 1 + which] = _free_cells(agent[who], cells[who, 2 - which], uniform[who])
    return World(cells, world.num_steps + 1), rewards


def _free_cells(one: Cells, other: Cells, uniform: Floats) -> Cells:
    """Return cells drawn uniformly from those that are neither ``one`` nor ``other``."""
    found = (uniform * (NUM_CELLS - 2)).astype(np.int64)
    found += found >= np.minimum(one, other)
    return found + (found >= np.maximum(one, other))


def observe(cells: Cells) -> NDArray[np.float32]:
    """Return one-hot rows and columns (..., NUM_FEATURES) of agent, blue and red, from cells (..., 3)."""
    return ONE_HOT[cells].reshape(*cells.shape[:-1], NUM_FEATURES)


class Played(NamedTuple):
    """``cells`` (num_agents, length + 1, 3), the first where it began; actions and rewards (num_agents, length)."""

    cells: Cells
    actions: Cells
    rewards: Floats


def rollout(policy: Sequence[Floats], world: World, gumbel: Floats, uniform: Floats, swap_every: int) -> Played:
    """Play as many steps as there are random numbers for; actions are drawn from the softmax of the policy's logits.

    Args:
        policy: weights (num_agents, in, out) and biases (num_agents, 1, out) of three layers in turn, ReLU between.
        world: where it begins.
        gumbel: Gumbel noise (length, num_agents, NUM_ACTIONS): the largest of logit and noise is taken.
        uniform: (length, num_agents), as ``step`` takes it.
        swap_every: as ``step`` takes it.
    """
    real = {np.dtype(np.float32): "REAL=float", np.dtype(np.float64): "REAL=double"}[policy[0].dtype]
    library = native.library(Path(__file__).with_name("two_colours.c"), real)
    if library is None:
        return slow_rollout(policy, world, gumbel, uniform, swap_every)
    num_agents, _, hidden = policy[0].shape
    length = len(uniform)
    cells = np.empty((num_agents, length + 1, 3), np.int64)
    cells[:, 0] = world.cells
    played = Played(cells, np.empty((num_agents, length), np.int64), np.empty((num_agents, length)))
    contiguous = [np.ascontiguousarray(x) for x in policy]
    parameters = (ctypes.c_void_p * len(contiguous))(*(x.ctypes.data for x in contiguous))
    numbers = [*map(ctypes.c_long, (num_agents, length, hidden, world.num_steps, swap_every))]
    arrays = [np.ascontiguousarray(x, np.float64) for x in (gumbel, uniform)]
    arrays += [np.empty(2 * hidden, policy[0].dtype), *played]
    library.play(*numbers, parameters, *(ctypes.c_void_p(x.ctypes.data) for x in arrays))
    return played


def slow_rollout(policy: Sequence[Any], world: World, gumbel: Floats, uniform: Floats, swap_every: int) -> Played:
    """The same step by step in NumPy: what ``rollout`` is checked against."""
    cells, actions, rewards = [world.cells], [], []
    for noise, places in zip(gumbel, uniform, strict=True):
        x = observe(world.cells)[:, None]
        for i in range(3):
            x = x @ policy[2 * i] + policy[2 * i + 1]
            x = np.maximum(x, 0.0) if i < 2 else x
        actions.append((x[:, 0] + noise).argmax(1))
        world, reward = step(world, actions[-1], places, swap_every)
        cells.append(world.cells)
        rewards.append(reward)
    return Played(np.stack(cells, axis=1), np.stack(actions, axis=1), np.stack(rewards, axis=1))
