"""A window of persistent evolution strategies on a rule that is a small network for every coordinate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from benchmarks import peers_jax
from benchmarks.networks import IMAGE, Problem, Stored, at, mlp
from benchmarks.suite import Call, Competitor, Size, Workload, peer
from learnedopt import Execution, InnerLoop, PersistentES, SumOfLosses, Theta
from learnedopt import optimizers as rules
from learnedopt.core import tree
from learnedopt.estimators import perturbations
from learnedopt.estimators.persistent import PersistentCarry
from learnedopt.optimizers.small_mlp import TIME_SCALES

WINDOWS, SIGMA = 4, 0.01
LARGE, SMALL = ((IMAGE**2, 20, 10), 128), ((64, 32, 10), 64)
Net = tuple[Sequence[int], int]  # the widths of a multi-layer perceptron and the size of its batches


class Posed(NamedTuple):
    """What is computed: an episode of ``WINDOWS`` windows, ``size.units`` pairs at staggered phases of it."""

    problem: Problem
    loop: InnerLoop
    estimator: PersistentES
    theta: Theta
    carry: PersistentCarry


class Window(NamedTuple):
    """The same in plain tensors: thetas, parameters and averages (num_phases, num_particles, ...), where a phase's
    first half of particles moves along the noise and the second against it; drift, the sum of the noise so far with
    this window's, in units of ``lengths``, (num_phases, num_pairs, ...); the first step of each phase."""

    thetas: Theta
    params: list[Tensor]
    averages: list[Tensor]
    drift: Theta
    lengths: Theta
    begins: list[int]


class Indexed(Stored):
    """Tasks that say which they are and hold no data themselves, as those of a family on a data set do."""

    def sample(self, num_tasks, generator):
        """Return the only task there is data for."""
        return {"which": torch.zeros(num_tasks, dtype=torch.int64)}

    def init_params(self, tasks):
        """Start all tasks at the module's parameters."""
        return {k: p.expand(len(tasks["which"]), *p.shape) for k, p in self.problem.start.items()}

    def batch(self, tasks, step, split):
        """Return the step's batch."""
        return tuple(x[:1, step].expand(len(tasks["which"]), *x.shape[2:]) for x in self.problem.train)


def pose(net: Net, size: Size, execution: Execution | None = None) -> Posed:
    """Return an MLP with ReLU, a fresh batch of random images for each step, and the pairs at the end of a window."""
    (widths, batch), steps = net, WINDOWS * size.steps + 1
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, steps, batch, widths[0], generator=generator, dtype=torch.float64).to(size.torch_dtype)
    data = images, torch.randint(widths[-1], (1, steps, batch), generator=generator)
    problem = Problem(*mlp(widths, nn.ReLU, size.torch_dtype), data, data)
    rule = rules.make("small-mlp")
    theta = {k: v.to(size.torch_dtype) for k, v in rule.init_theta(generator).items()}
    loop = InnerLoop(Indexed(problem), rule, execution or Execution())
    estimator = PersistentES(size.steps, WINDOWS * size.steps, size.units, SIGMA)
    carry = estimator.start(loop, theta, loop.family.sample(1, generator), generator)
    return Posed(problem, loop, estimator, theta, carry)


def ours(net: Net, execution: Execution | None = None) -> Callable[[Size], Call]:
    """Return this library's estimate; each call is the same window, with the same perturbations."""

    def build(size: Size) -> Call:
        posed = pose(net, size, execution)

        def call() -> list[Tensor]:
            estimate = posed.estimator.estimate(posed.loop, posed.theta, SumOfLosses(), posed.carry)
            return list(estimate.grads.values())

        return call

    return build


def window_of(posed: Posed) -> Window:
    """Return what the estimator is about to run, with the perturbations that it will draw."""
    carry, num_phases = posed.carry, len(posed.carry.cohorts)
    lengths = perturbations.lengths_of(posed.loop, posed.theta, SIGMA)
    params, averages, drifts, thetas = [], [], [], []
    for i, cohort in enumerate(carry.cohorts):
        source, num_pairs = perturbations.generator(carry.seed, 0, carry.window, i), tree.size(cohort.drift)
        noise = perturbations.draw(posed.theta, num_pairs, source, [])
        thetas.append(perturbations.perturbed(posed.theta, noise, lengths))
        drifts.append({k: cohort.drift[k] + noise[k] for k in noise})
        memory: Any = cohort.state
        begun = memory is not None
        here = {k: x[0] if begun else x.expand(2 * num_pairs, *x.shape[1:]) for k, x in cohort.params.items()}
        num_averages = len(posed.loop.rule.decays)  # type: ignore[attr-defined]
        zeros = {k: x.new_zeros(len(x), num_averages, *x.shape[1:]) for k, x in here.items()}
        params.append(list(here.values()))
        averages.append([x[0] for x in memory.averages.values()] if begun else list(zeros.values()))
    assert num_phases == WINDOWS
    return Window(
        {k: torch.stack([x[k] for x in thetas]) for k in posed.theta},
        [torch.stack(x) for x in zip(*params, strict=True)],
        [torch.stack(x) for x in zip(*averages, strict=True)],
        {k: torch.stack([x[k] for x in drifts]) for k in posed.theta},
        lengths,
        [cohort.step for cohort in carry.cohorts],
    )


def plain(net: Net) -> Callable[[Size], Call]:
    """Return the loop that one writes by hand, one particle after the other; the rule's formula is the library's."""

    def build(size: Size) -> Call:
        posed = pose(net, size)
        window, names = window_of(posed), list(posed.problem.start)

        def value(phase: int, particle: int) -> Tensor:
            at_first = window.begins[phase]
            theta = {k: x[phase, particle] for k, x in window.thetas.items()}
            params = {k: x[phase, particle] for k, x in zip(names, window.params, strict=True)}
            _, memory = posed.loop.rule.init(theta, params)
            averages = {k: x[phase, particle] for k, x in zip(names, window.averages, strict=True)}
            memory = memory._replace(step=memory.step + at_first, averages=averages)
            total = torch.zeros((), dtype=size.torch_dtype)
            for step in range(size.steps):
                loss, grads = _gradient(posed.problem, params, at_first + step)
                total = total + loss if step else total
                with torch.no_grad():
                    deltas, memory = posed.loop.rule.update(theta, grads, memory, params, loss)
                    params = {k: params[k] + deltas[k] for k in names}
            return total + posed.problem.loss(list(params.values()), at(posed.problem.train, 0, at_first + size.steps))

        def call() -> list[Tensor]:
            phases = range(len(window.begins))
            found = torch.stack([torch.stack([value(i, j) for j in range(2 * size.units // WINDOWS)]) for i in phases])
            return list(estimated(window, found).values())

        return call

    return build


def _gradient(problem: Problem, params: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = [p.detach().requires_grad_() for p in params.values()]
    loss = problem.loss(leaves, at(problem.train, 0, step))
    grads = torch.autograd.grad(loss, leaves)
    return loss.detach(), dict(zip(params, grads, strict=True))


def estimated(window: Window, found: Any) -> dict[str, Any]:
    """Return the mean over pairs of drift (f₊ - f₋) / (2 length); ``found`` is (num_phases, num_particles)."""
    num_pairs = found.shape[1] // 2
    differences = (found[:, :num_pairs] - found[:, num_pairs:]) / 2
    return {
        k: (differences.reshape(*differences.shape, *(1,) * (x.ndim - 2)) * x / window.lengths[k]).mean((0, 1))
        for k, x in window.drift.items()
    }


def jax(net: Net) -> Callable[[Size], Call]:
    """Return the window in JAX, as one program: particles and phases under ``vmap``, steps in a ``scan``."""

    def build(size: Size) -> Call:
        posed, package = pose(net, size), peers_jax.ready(size)
        np, loss, rule = peer("jax.numpy"), peers_jax.mlp_loss(package.nn.relu), posed.loop.rule
        window = window_of(posed)
        spans = [slice(first, first + size.steps + 1) for first in window.begins]
        images, classes = (np.stack([peers_jax.array(x[0, span]) for span in spans]) for x in posed.problem.train)
        window = package.tree.map(lambda x: peers_jax.array(x) if isinstance(x, Tensor) else np.asarray(x), window)

        def particle(theta: Any, params: Any, averages: Any, begins: Any, images: Any, classes: Any) -> Any:
            def step(carry: Any, batch: Any) -> Any:
                params, averages, count = carry
                value, grads = package.value_and_grad(loss)(params, batch)
                return (*small_mlp_in_jax(rule, theta, grads, params, averages, count), count + 1), value

            batches, last = (images[:-1], classes[:-1]), (images[-1], classes[-1])
            (params, averages, _), losses = package.lax.scan(step, (params, averages, begins), batches)
            return losses[1:].sum() + loss(params, last), params, averages

        phases = package.vmap(package.vmap(particle, (0, 0, 0, None, None, None)))

        def whole(window: Any, images: Any, classes: Any) -> Any:
            found, *onward = phases(window.thetas, window.params, window.averages, window.begins, images, classes)
            return estimated(window, found), onward

        gradient = package.jit(whole)
        window = window._replace(begins=np.stack(window.begins))

        def call() -> list[Tensor]:
            grads, _ = package.block_until_ready(gradient(window, images, classes))
            return peers_jax.tensors([grads[k] for k in posed.theta])

        return call

    return build


def small_mlp_in_jax(
    rule: Any, theta: Any, grads: list[Any], params: list[Any], averages: list[Any], count: Any
) -> tuple[list[Any], list[Any]]:
    """Return the parameters and averages after a step of the rule; see ``optimizers/small_mlp.py``."""
    package, np = peer("jax"), peer("jax.numpy")
    new, rows = [], []
    for grad, param, old in zip(grads, params, averages, strict=True):
        decays = np.asarray(rule.decays, grad.dtype).reshape(-1, *(1,) * grad.ndim)
        new.append(decays * old + (1 - decays) * grad)
        row = np.concatenate([grad.reshape(1, -1), param.reshape(1, -1), new[-1].reshape(len(rule.decays), -1)])
        rows.append(row * package.lax.rsqrt(np.square(row).mean(1, keepdims=True) + rule.eps))
    signal = np.concatenate(rows, axis=1)
    clocks = np.tanh(count / np.asarray(TIME_SCALES, signal.dtype) - 1).astype(signal.dtype)
    weight = theta["layer0/weight"]
    hidden = weight[:, : len(signal)] @ signal + (theta["layer0/bias"] + weight[:, len(signal) :] @ clocks)[:, None]
    direction, magnitude = theta["layer1/weight"] @ package.nn.relu(hidden) + theta["layer1/bias"][:, None]
    deltas = -rule.step_scale * direction * np.exp(rule.exp_scale * magnitude)
    ends = numpy.cumsum([p.size for p in params])[:-1]
    pieces = np.split(deltas, [int(x) for x in ends])
    return [p + d.reshape(p.shape) for p, d in zip(params, pieces, strict=True)], new


def _rows(net: Net) -> dict[str, Competitor]:
    return {
        "learnedopt": Competitor(ours(net)),
        "learnedopt, one particle at a time": Competitor(ours(net, Execution(chunk_size=1))),
        "JAX, jitted": Competitor(jax(net), "jax", warm_at_size=True),
        "plain loop": Competitor(plain(net)),
    }


_TEXT = (
    "PersistentES on the rule `small-mlp` (202 weights): 16 antithetic pairs at four phases of an episode of 80 steps, "
    "the sum of the losses. *Plain loop*: one particle after the other, by hand. All are given the same perturbations."
)
WORKLOADS = {
    "pes-mlp": Workload(
        "Window of PersistentES, MLP 784-20-10, 20 steps, 16 pairs",
        _TEXT + f" Batches of {LARGE[1]} random images.",
        Size(steps=20, units=16),
        Size(steps=3, units=8),
        _rows(LARGE),
        "plain loop",
        per=(16 * 20, "pair and inner step"),
    ),
    "pes-small-mlp": Workload(
        "Window of PersistentES, MLP 64-32-10, 20 steps, 16 pairs",
        _TEXT + f" Batches of {SMALL[1]} random images of 8x8 pixels.",
        Size(steps=20, units=16),
        Size(steps=3, units=8),
        _rows(SMALL),
        "plain loop",
        per=(2 * 16 * 20, "particle and inner step"),
    ),
}
