"""Slow oracles of perturbing estimators: every particle walked by itself, in plain loops over pairs and tasks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from oracles import value_of, walk
from problems import one_by_one
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt import EvolutionStrategies, InnerLoop, PersistentES, Tasks, Theta
from learnedopt.core.objective import MetaObjective
from learnedopt.estimators import perturbations
from learnedopt.estimators.evolution import EvolutionCarry
from learnedopt.estimators.persistent import PersistentCarry


class Posed(NamedTuple):
    """What is estimated."""

    loop: InnerLoop
    theta: Theta
    objective: MetaObjective
    tasks: Tasks


def mean(found: list[Theta]) -> Theta:
    return {k: torch.stack([each[k] for each in found]).mean(0) for k in found[0]}


def window(posed: Posed, theta: Theta, starts: list[Any], step: int, num_steps: int) -> tuple[Tensor, list[Any]]:
    """Return the mean over tasks of a window's objective at ``theta``, and each task's end."""
    values, ends = [], []
    for task, start in zip(one_by_one(posed.tasks), starts, strict=True):
        path = walk(posed.loop, theta, task, num_steps, full=False, start=start, first_step=step)
        values.append(value_of(posed.objective, posed.loop, theta, task, path, None).detach())
        ends.append(pytree.tree_map(lambda x: x.detach(), path.points[-1]))
    return torch.stack(values).mean(), ends


def lengths_of(posed: Posed, sigma: float) -> dict[str, Any]:
    """Return how far each meta-parameter is perturbed by noise of one, from what rule and inner objective say."""
    said = {**posed.loop.rule.theta_scale(), **posed.loop.inner_objective.theta_scale()}
    return {k: sigma * said.get(k, 1.0) for k in posed.theta}


def moved(theta: Theta, noise: Theta, pair: int, sign: int, lengths: dict[str, Any]) -> Theta:
    return {k: x + sign * lengths[k] * noise[k][pair] for k, x in theta.items()}


def evolution(posed: Posed, estimator: EvolutionStrategies, carry: EvolutionCarry) -> Theta:
    """Return the estimate of whole episodes."""
    lengths = lengths_of(posed, estimator.sigma)
    noise = perturbations.draw(posed.theta, estimator.num_pairs, perturbations.generator(carry.seed, carry.window), [])
    starts = [None] * len(one_by_one(posed.tasks))
    found = []
    for pair in range(estimator.num_pairs):
        above, below = (
            window(posed, moved(posed.theta, noise, pair, sign, lengths), starts, 0, estimator.num_steps)[0]
            for sign in (1, -1)
        )
        found.append({k: n[pair] * (above - below) / (2 * lengths[k]) for k, n in noise.items()})
    return mean(found)


def persistent(posed: Posed, estimator: PersistentES, carry: PersistentCarry, num_estimates: int) -> list[Theta]:
    """Return the first estimates, of one pair a cohort and none that has to begin anew among them."""
    windows, lengths = estimator.horizon // estimator.num_steps, lengths_of(posed, estimator.sigma)
    found: list[list[Theta]] = [[] for _ in range(num_estimates)]
    for i, phase in enumerate(i * windows // estimator.num_pairs for i in range(estimator.num_pairs)):
        ends: dict[int, list[Any]] = dict.fromkeys((1, -1), [None] * len(one_by_one(posed.tasks)))
        drift = {k: torch.zeros_like(x) for k, x in posed.theta.items()}
        for number in range(min(phase + num_estimates, windows)):
            source = perturbations.generator(carry.seed, 0, windows - phase + number, i)
            still = start_alone(posed, estimator) if number else []
            noise = perturbations.draw(posed.theta, 1, source, still)
            if estimator.reuse_noise and number:
                noise = {k: x.unsqueeze(0) for k, x in drift.items()}
            drift = {k: n[0] + (0 if estimator.reuse_noise else drift[k]) for k, n in noise.items()}
            values = {}
            for sign in (1, -1):
                theta = moved(posed.theta, noise, 0, sign, lengths)
                values[sign], ends[sign] = window(
                    posed, theta, ends[sign], number * estimator.num_steps, estimator.num_steps
                )
            if number >= phase:
                slope = (values[1] - values[-1]) / 2
                found[number - phase].append({k: x * slope / lengths[k] for k, x in drift.items()})
    return [mean(each) for each in found]


def start_alone(posed: Posed, estimator: PersistentES) -> list[str]:
    """Return the meta-parameters that the rule's ``init`` reads and no update does."""
    names = perturbations.moving(posed.loop, posed.theta, posed.tasks, estimator.horizon, estimator.sigma)
    return sorted(names.start_alone)
