"""The actor-critic of the two-colours grid, and what learns its entropy weight, against the library's public contract.

Several agents, each with its own world, networks and meta-learner, are ONE task: their tensors have a leading dimension
of agents and their losses are added, so that every agent's gradient and meta-gradient is its own.

What an agent learns from depends on its policy, so a task holds where the worlds stand and the last rollout that was
played in them, and ``batch`` returns that one. ``play`` alone plays on, a pure function of the task and the parameters:
its random numbers come from the task's seed and its count of rollouts. The meta-objectives call it between inner steps.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from benchmarks import two_colours_env as env
from learnedopt import (
    Batch,
    Carry,
    InnerLoop,
    InnerObjective,
    KLDivergence,
    Params,
    Rollout,
    Tape,
    TaskFamily,
    Tasks,
    Theta,
)
from learnedopt.core import tree
from learnedopt.core.carry import detach
from learnedopt.core.counts import require_count
from learnedopt.core.objective import TaskMean
from learnedopt.core.task import Split

HISTORY = 10
"""Rollouts whose mean rewards the meta-learner sees."""


@final
@dataclass(frozen=True)
class TwoColours(TaskFamily):
    """Agents on the grid: a softmax policy and a value function, each a ReLU network of two hidden layers.

    The loss of one agent is the mean over the rollout of ``-A log pi(a|s) + (R - v(s))^2 / 2``, with the discounted
    return ``R`` to the rollout's end, continued by the value there, and the advantage ``A = R - v(s)``. Both are data:
    ``play`` computes them at the parameters that it plays with.

    Args:
        num_agents: played side by side, independently.
        hidden: units of each hidden layer.
        rollout_length: environment steps an update.
        discount: of rewards.
        swap_every: steps between two changes of the colours' rewards.
    """

    num_agents: int = 6
    hidden: int = 256
    rollout_length: int = 16
    discount: float = 0.99
    swap_every: int = 100_000

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the one task's seed, and play its first rollout with the parameters that it starts from."""
        if num_tasks != 1:
            raise ValueError(f"num_tasks={num_tasks}: all agents are one task; set num_agents, and pass num_tasks=1")
        seed = torch.randint(2**62, (1,), generator=generator)
        uniform = _random(int(seed), 0).random((self.num_agents, env.NUM_CELLS))
        start = {
            "seed": seed,
            "rollouts": torch.zeros(1, dtype=torch.int64),
            "cells": torch.from_numpy(env.new_world(uniform).cells)[None],
            "total": torch.zeros(1, self.num_agents, dtype=torch.float64),
            "history": torch.zeros(1, self.num_agents, HISTORY),
        }
        return self.play(start, self.init_params(start))

    def init_params(self, tasks: Tasks) -> Params:
        """Return weights drawn from N(0, 1/fan_in), cut off at two standard deviations, and biases of zero."""
        generator = torch.Generator().manual_seed(int(tasks["seed"]))
        params = {}
        for net, num_outputs in (("policy", env.NUM_ACTIONS), ("value", 1)):
            sizes = [env.NUM_FEATURES, self.hidden, self.hidden, num_outputs]
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
                weight = torch.empty(1, self.num_agents, fan_in, fan_out)
                std = fan_in**-0.5
                torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
                params[f"{net}/{i}/weight"] = weight
                params[f"{net}/{i}/bias"] = torch.zeros(1, self.num_agents, 1, fan_out)
        return params

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the rollout that the task holds, with the history of rewards; the same for every step and split."""
        return {k: tasks[k] for k in ("observations", "actions", "returns", "advantages", "history")}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the sum over agents of policy and value loss."""
        policy, _ = self.policy_loss_and_entropy(params, batch)
        return (policy + self.value_loss(params, batch)).sum()

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the policy's logits (num_agents, rollout_length, NUM_ACTIONS)."""
        return _network(params, "policy", batch["observations"])

    def policy_loss_and_entropy(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each agent's policy loss and mean entropy (num_agents,)."""
        logs = self.outputs(params, batch).log_softmax(-1)
        taken = logs.gather(-1, batch["actions"][..., None]).squeeze(-1)
        return -(taken * batch["advantages"]).mean(-1), -(logs.exp() * logs).sum(-1).mean(-1)

    def value_loss(self, params: Params, batch: Batch) -> Tensor:
        """Return each agent's value loss (num_agents,)."""
        values = _network(params, "value", batch["observations"]).squeeze(-1)
        return 0.5 * (batch["returns"] - values).square().mean(-1)

    @torch.no_grad()
    def play(self, tasks: Tasks, params: Params) -> Tasks:
        """Return the task after one more rollout, which it holds in place of the last one."""
        mine = {k: p.detach()[0] for k, p in params.items()}
        dtype = mine["policy/0/weight"].dtype
        played = self._rollout(tasks, mine)
        rewards = torch.from_numpy(played.rewards)
        observations = torch.from_numpy(env.observe(played.cells)).to(dtype)
        values = _network(mine, "value", observations).squeeze(-1)
        discounts = _discounts(self.rollout_length, self.discount)
        returns = torch.cat([rewards.to(dtype), values[:, -1:]], dim=1) @ discounts.to(dtype)
        mean = rewards.mean(1, keepdim=True).to(dtype)
        found = {
            "cells": torch.from_numpy(played.cells[:, -1].copy()),
            "actions": torch.from_numpy(played.actions),
            "observations": observations[:, :-1],
            "returns": returns,
            "advantages": returns - values[:, :-1],
            "history": torch.cat([tasks["history"][0, :, 1:].to(dtype), mean], dim=1),
            "total": tasks["total"][0] + rewards.sum(1),
        }
        return {**tree.unsqueeze(found), "seed": tasks["seed"], "rollouts": tasks["rollouts"] + 1}

    def _rollout(self, tasks: Tasks, params: Params) -> env.Played:
        length, count = self.rollout_length, int(tasks["rollouts"])
        random = _random(int(tasks["seed"]), count + 1)
        gumbel = -np.log(random.exponential(size=(length, self.num_agents, env.NUM_ACTIONS)))
        uniform = random.random((length, self.num_agents))
        policy = [params[f"policy/{i}/{kind}"].numpy() for i in range(3) for kind in ("weight", "bias")]
        world = env.World(tasks["cells"][0].numpy(), count * length)
        return env.rollout(policy, world, gumbel, uniform, self.swap_every)


@functools.cache
def _discounts(length: int, discount: float) -> Tensor:
    """Return the matrix (length + 1, length) that takes rewards and the last value to returns."""
    ahead = torch.arange(length + 1)[:, None] - torch.arange(length)
    return torch.where(ahead >= 0, discount ** ahead.clamp(min=0).double(), 0.0)


def _random(seed: int, count: int) -> np.random.Generator:
    """Return the stream of random numbers number ``count`` of a seed."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, count]))


def _network(params: Params, net: str, x: Tensor) -> Tensor:
    for i in range(3):
        x = torch.baddbmm(params[f"{net}/{i}/bias"], x, params[f"{net}/{i}/weight"])
        x = x.relu() if i < 2 else x
    return x


@final
@dataclass(frozen=True)
class EntropyWeighted(InnerObjective):
    """An agent's loss less its entropy times a learned weight; the outer level reads the policy loss.

    The weight is a network of one hidden ReLU layer with a sigmoid, from the mean rewards of the last ten rollouts, the
    present one included. Each agent has its own.

    Args:
        num_agents: as the family's.
        hidden: units of the network.
        start: the weight that the network says at the beginning, to any history if ``constant``.
        constant: the last layer's weights start at zero.
        outer_entropy: the outer level reads the policy loss less the entropy times this.
    """

    num_agents: int = 6
    hidden: int = 32
    start: float = 0.5
    constant: bool = False
    outer_entropy: float = 0.0

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw weights from N(0, 1/fan_in), cut off at two standard deviations; the biases are constant."""
        first = torch.empty(self.num_agents, HISTORY, self.hidden)
        last = torch.empty(self.num_agents, self.hidden)
        for weight, std in ((first, HISTORY**-0.5), (last, self.hidden**-0.5)):
            torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        return {
            "entropy/first/weight": first,
            "entropy/first/bias": torch.zeros(self.num_agents, self.hidden),
            "entropy/last/weight": torch.zeros_like(last) if self.constant else last,
            "entropy/last/bias": torch.full((self.num_agents,), self.start).logit(),
        }

    def weights(self, theta: Theta, history: Tensor) -> Tensor:
        """Return each agent's entropy weight (num_agents,) for a history (num_agents, HISTORY)."""
        hidden = torch.einsum("ai,aij->aj", history, theta["entropy/first/weight"]) + theta["entropy/first/bias"]
        return ((hidden.relu() * theta["entropy/last/weight"]).sum(-1) + theta["entropy/last/bias"]).sigmoid()

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the sum over agents that the inner steps descend."""
        assert isinstance(family, TwoColours)
        policy, entropy = family.policy_loss_and_entropy(params, batch)
        weights = self.weights(theta, batch["history"])
        return (policy + family.value_loss(params, batch) - weights * entropy).sum()

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the sum over agents that the outer level reads."""
        assert isinstance(family, TwoColours)
        policy, entropy = family.policy_loss_and_entropy(params, batch)
        return (policy - self.outer_entropy * entropy).sum()


def play_on(loop: InnerLoop, carry: Carry) -> Carry:
    """Return the carry, without a graph, with a rollout that is played with its parameters."""
    assert isinstance(loop.family, TwoColours)
    carry = detach(carry)
    return carry._replace(tasks=loop.family.play(carry.tasks, carry.params))


@final
@dataclass(frozen=True)
class NextPolicyLoss(TaskMean):
    """The ordinary meta-gradient's objective: the outer loss on a rollout that is played after the inner steps.

    That rollout is what the next inner step learns from, so no environment step is spent on the outer level.
    """

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> tuple[Tensor, Carry]:
        """Return the loss, and the carry that holds the new rollout."""
        ahead = play_on(loop, rollout.end)
        return loop.losses(theta, rollout.end._replace(tasks=ahead.tasks), "train").mean(), ahead


@final
@dataclass(frozen=True)
class PlayedBootstrap(TaskMean):
    """KL(target || end) of the policies, the target being ``num_target_steps`` updates ahead (section 5.1).

    Each update of the target learns from a rollout played with the parameters before it; the last one is a plain
    gradient step of size ``step_size`` on the outer loss. Policies are compared on the states of the last rollout.
    Training goes on from before the plain step, with its rollout, so no environment step is spent on the outer level.

    The objective of the library, ``BootstrappedTarget``, runs the rule on data that were there before; here they are
    played on the way.
    """

    num_target_steps: int = 16
    step_size: float = 0.1

    def __post_init__(self) -> None:
        require_count("num_target_steps", self.num_target_steps, least=1)

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> tuple[Tensor, Carry]:
        """Return the sum over agents and states of the divergence, and the carry that training goes on from."""
        target, ahead = self.find(loop, theta, rollout.end)
        divergence = KLDivergence()(loop, target, rollout.end._replace(tasks=ahead.tasks), "train")
        # The matching is a mean over agents and states; of a sum each agent's meta-gradient is its own.
        return divergence.mean() * ahead.tasks["actions"].numel(), ahead

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> tuple[Carry, Carry]:
        """Return the target, and the carry that training goes on from, both with the last rollout and no graph."""
        ahead = play_on(loop, end)
        for _ in range(self.num_target_steps - 1):
            ahead = play_on(loop, loop.run(theta, ahead, 1, Tape.NONE).end)
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in ahead.params.items()}
            loss = loop.losses(tree.detach(theta), ahead._replace(params=params), "train").sum()
        grads = torch.autograd.grad(loss, tuple(params.values()), materialize_grads=True)
        moved = {k: p.detach() - self.step_size * g for (k, p), g in zip(params.items(), grads, strict=True)}
        return ahead._replace(params=moved), ahead
