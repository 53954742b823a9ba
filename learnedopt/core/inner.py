"""The inner loop: an update rule trains the optimizees of a batch of tasks, with or without a graph to theta."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from learnedopt.core import checks, theta_scale, tree
from learnedopt.core.cache import Cache
from learnedopt.core.carry import Carry, Rollout, Tape, detach, join, narrow
from learnedopt.core.counts import require_count
from learnedopt.core.execution import Execution, TaskMap, ThetaMap
from learnedopt.core.horizon import HorizonWarning
from learnedopt.core.inner_gradient import StepGradient, step_gradient
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.modes import outside_inference_mode
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.core.user_warning import warn_user


@dataclass(frozen=True, eq=False)
class InnerLoop:
    """A family's optimizees trained by an update rule; immutable.

    To train with it call ``init_theta``, ``start``, ``run`` and ``losses`` (or ``outputs``, ``metrics``). All other
    members are there for whoever writes an estimator, an objective or an execution.

    Args:
        family: what is trained.
        rule: how one step moves.
        execution: how tasks are run; see ``Execution``.
        inner_objective: what the steps descend; by default the family's loss.
        horizon: inner steps of a whole episode, which rules that read it must be told; None where it is open.

    Example:
        >>> loop = InnerLoop(learnedopt.tasks.make("quadratic"), learnedopt.optimizers.make("sgd", lr=0.01))
        >>> generator = torch.Generator().manual_seed(0)
        >>> theta = loop.init_theta(generator)
        >>> carry = loop.start(loop.family.sample(8, generator))
        >>> rollout = loop.run(theta, carry, num_steps=100, tape=Tape.NONE)
        >>> rollout.losses.shape
        torch.Size([100, 8])
    """

    family: TaskFamily
    rule: UpdateRule
    execution: Execution = Execution()
    inner_objective: InnerObjective = TaskLoss()
    horizon: int | None = None
    mover: UpdateRule = field(init=False, repr=False)
    """What is stepped: the rule, with a clock around it where it reads the horizon."""
    cache: Cache = field(default_factory=Cache, init=False, repr=False)
    """What was checked, found out or compiled once."""

    def __post_init__(self) -> None:
        checks.require_parts(self.family, self.rule, self.execution, self.inner_objective)
        if self.horizon is not None:
            require_count("horizon", self.horizon, least=1)
        object.__setattr__(self, "mover", self.rule.within(self.horizon))

    def require_end(self, step: int) -> None:
        """Warn, once, where a run up to ``step`` goes past the horizon that its rule reads."""
        if self.rule.reads_horizon and self.horizon is not None and step > self.horizon and "past" not in self.cache:
            self.cache.put("past", True)
            warn_user(
                f"this run goes on to step {step}, past the horizon of {self.horizon} steps that "
                f"{type(self.rule).__name__} was told: its schedule stays at its end. Tell it the whole length",
                HorizonWarning,
            )

    def on(self, family: TaskFamily) -> InnerLoop:
        """Return this loop on a family that wraps its own: what was found out of the one holds of the other."""
        found = replace(self, family=family)
        object.__setattr__(found, "cache", self.cache)
        return found

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw the rule's meta-parameters, then the inner objective's own, as one dict.

        Raises:
            ValueError: both have a meta-parameter of the same name.
        """
        return checks.joined_theta(self.rule, self.inner_objective, generator)

    def theta_scale(self, theta: Theta) -> Theta:
        """Return how large a step of size one is for each entry of theta, broadcastable to it: see ``UpdateRule``."""
        self.require_theta(theta)
        return theta_scale.scales_of(self.rule, self.inner_objective, theta, self._theta_shapes()[1], self.cache)

    @outside_inference_mode
    def start(self, tasks: Tasks) -> Carry:
        """Return a fresh carry at the family's own starting points."""
        num_tasks = tree.size(tasks)
        tasks = tree.to(tree.detach(tasks), self.execution.device, None)
        params = tree.to(tree.detach(self.family.init_params(tasks)), self.execution.device, self.execution.dtype)
        if not isinstance(params, dict) or not params or tree.size(params) != num_tasks:
            raise ValueError(
                f"{type(self.family).__name__}.init_params must return a dict of tensors with a leading dimension of "
                f"{num_tasks} tasks, got {checks.shapes(params)}"
            )
        return Carry(tasks, params)

    @outside_inference_mode
    def begin(self, theta: Theta, carry: Carry, theta_per_task: bool = False) -> Carry:
        """Apply the rule's ``init`` to a fresh carry; a begun one is returned as it is.

        Raises:
            ValueError: theta belongs to another loop or shape; a loss is not scalar, on no task finite at the start, or
                does not depend on the parameters; the rule cannot start where it would.
        """
        self.require_theta(theta, tree.size(carry.params) if theta_per_task else None)
        if carry.state is not None:
            return carry
        per_task, shared = ((theta,), ()) if theta_per_task else ((), (theta,))
        params, state = self.over_tasks(self.init_task, shared, *per_task, carry.params)
        checks.require_like(params, carry.params)
        checks.require_start(self.rule, params)
        begun = carry._replace(params=params, state=state)
        if "losses" not in self.cache:
            first = tree.narrow(theta, 0, 1) if theta_per_task else None
            self._check_losses(theta if first is None else tree.squeeze(first), begun)
        return begun

    def check_start(self, theta: Theta, carry: Carry) -> None:
        """Raise what ``begin`` raises on the first two tasks; that costs nothing once the losses have been seen."""
        self.require_theta(theta)
        if "losses" not in self.cache:
            num_tasks = tree.size(carry.params)

            def look(start: int, stop: int) -> None:
                self.begin(theta, narrow(carry, start, stop))

            checks.on_finite_tasks(num_tasks, look)

    @outside_inference_mode
    def run(
        self, theta: Theta, carry: Carry, num_steps: int, tape: Tape = Tape.FULL, theta_per_task: bool = False
    ) -> Rollout:
        """Take ``num_steps`` inner steps and return the rollout, recorded as ``tape`` says.

        A fresh carry is begun first. Under ``Tape.NONE`` nothing returned has a graph. With ``theta_per_task`` every
        entry of theta has a leading dimension of num_tasks: each task is trained by its own.
        """
        require_count("num_steps", num_steps)
        self.require_end(carry.step + num_steps)
        theta = tree.detach(theta) if tape is Tape.NONE else theta
        with torch.set_grad_enabled(tape is not Tape.NONE):
            carry = self.begin(theta, carry, theta_per_task)
            pieces: list[tuple[Params, State, Tensor]] = []
            for bounds in self._bounds(carry.params):
                own = tree.narrow(theta, *bounds) if theta_per_task else theta
                pieces.append(self._run_chunk(own, narrow(carry, *bounds), num_steps, tape, theta_per_task))
            params, state = tree.concatenate([piece[:2] for piece in pieces])
            start = detach(carry) if tape is Tape.NONE else carry
            end = Carry(carry.tasks, params, state, carry.step + num_steps)
            return Rollout(start, end, torch.cat([piece[2] for piece in pieces], dim=1))

    @outside_inference_mode
    def losses(self, theta: Theta, carry: Carry, split: Split, theta_per_task: bool = False) -> Tensor:
        """Return each task's outer loss (num_tasks,) at a begun carry on its step's batch of ``split``."""
        if theta_per_task or not self.inner_objective.reads_task_loss:
            self.require_theta(theta, tree.size(carry.params) if theta_per_task else None)
        if self.inner_objective.reads_task_loss:
            return self._evaluate(self.family.loss, carry, split)
        per_task, shared = ((theta,), ()) if theta_per_task else ((), (theta,))
        return self._evaluate(self._outer_loss, carry, split, shared, *per_task)

    @outside_inference_mode
    def outputs(self, carry: Carry, split: Split) -> Tensor:
        """Return each task's model outputs (num_tasks, ...) at a begun carry on its step's batch of ``split``."""
        return self._evaluate(self.family.outputs, carry, split)

    @outside_inference_mode
    def metrics(self, carry: Carry, split: Split) -> dict[str, Tensor]:
        """Return the family's metrics, each (num_tasks,), at a begun carry on its step's batch of ``split``."""
        return self._evaluate(self.family.metrics, carry, split)

    def split(self, carry: Carry) -> list[Carry]:
        """Cut a carry into the chunks of tasks that are run together."""
        return [narrow(carry, *bounds) for bounds in self._bounds(carry.params)]

    def over_tasks(self, fn: Callable[..., Any], shared: tuple[tree.Tree, ...], *batched: tree.Tree) -> Any:
        """Call ``fn(*shared, *each)``, a function of ONE task, on batched trees; its results come back batched."""
        results: list[tree.Tree] = []
        for start, stop in self._bounds(batched[-1]):
            task_map = TaskMap(stop - start)
            each = [task_map.unbatch(tree.narrow(x, start, stop)) for x in batched]
            results.append(task_map.rebatch(task_map.apply(fn, shared, *each)))
        return tree.concatenate(results)

    def _bounds(self, batched: tree.Tree) -> list[tuple[int, int]]:
        num_tasks = tree.size(batched)
        chunk_size = self.execution.chunk_size or (num_tasks if tree.leaves(batched)[0].is_cuda else 1)
        return [(i, min(i + chunk_size, num_tasks)) for i in range(0, num_tasks, chunk_size)]

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the family's batch on the execution's device and in its dtype."""
        return tree.to(self.family.batch(tasks, step, split), self.execution.device, self.execution.dtype)

    def init_task(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Return where ONE task starts, and the rule's first state."""
        params, state = self.mover.init(self.rule_theta(theta), params)
        state = () if state is None else state  # None marks a carry that has not begun
        checks.require_tensors(self.rule, state)
        return params, state

    def rule_theta(self, theta: Theta) -> Theta:
        """Return the part of theta that is the rule's."""
        own = self._theta_shapes()[1]
        return {k: v for k, v in theta.items() if k not in own} if own else theta

    def gradient(self, task_map: ThetaMap, theta: Theta, params: Params, batch: Batch, tape: Tape) -> StepGradient:
        """Return what a step on a train batch descends, and what is recorded of it; trees are unbatched."""
        plans = self.mixed_plans()
        return step_gradient(self.family, self.inner_objective, task_map, theta, params, batch, tape, mixed_plans=plans)

    def mixed_plans(self) -> dict[Hashable, Any] | None:
        """Return what mixed mode has found out about the inner loss so far; None where it is not asked for."""
        return self.cache.remember("mixed mode", dict[Hashable, Any]) if self.execution.mixed_mode else None

    def move(
        self, task_map: ThetaMap, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, State]:
        """Apply one update of the rule: return the new parameters and state; trees are unbatched."""
        arguments = (self.rule_theta(theta), grads, state, params, loss)
        kernel = self.mover.kernel
        found = None if kernel is None else task_map.apply_kernel(kernel, *arguments)
        moved, new_state = task_map.apply_theta(self._step, *arguments) if found is None else self._own(found, params)
        try:
            # Whoever flattens a step's inputs and outputs pairs them by position: dicts must not change their order.
            new_state = tree.arrange(new_state, state) if new_state is not state else state
        except ValueError as error:
            raise ValueError(
                f"{type(self.rule).__name__}.update must return a state of the same structure as it was given: {error}"
            ) from error
        return moved, new_state

    def _step(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        kernel = self.mover.kernel
        found = None if kernel is None else kernel.step(theta, grads, state, params, loss)
        if found is not None:
            return self._own(found, params)
        result = self.mover.update(theta, grads, state, params, loss)
        deltas, state = checks.params_and_state(self.rule, "update", result, params)
        return {k: p + tree.in_dtype_of(p, deltas[k]) for k, p in params.items()}, () if state is None else state

    def _own(self, found: Any, params: Params) -> tuple[Params, State]:
        values, state = checks.params_and_state(self.rule, "kernel.step", found, params)
        # Neither the rule's order nor a theta of another dtype may become the parameters' (scalars of both would
        # promote to the wider one).
        return {k: tree.in_dtype_of(p, values[k]) for k, p in params.items()}, () if state is None else state

    def _outer_loss(self, theta: Theta, params: Params, batch: Batch) -> Tensor:
        return self.inner_objective.outer_loss(theta, self.family, params, batch)

    def _evaluate(
        self, fn: Callable[..., Any], carry: Carry, split: Split, shared: tuple[Theta, ...] = (), *per_task: Theta
    ) -> Any:
        checks.require_begun(carry, split)
        results: list[tree.Tree] = []
        for bounds in self._bounds(carry.params):
            chunk = narrow(carry, *bounds)
            task_map = TaskMap(tree.size(chunk.params))
            batched = [*(tree.narrow(x, *bounds) for x in per_task), chunk.params]
            batched.append(self.batch(chunk.tasks, chunk.step, split))
            found = task_map.apply(fn, shared, *[task_map.unbatch(x) for x in batched])
            results.append(task_map.rebatch(found))
        return tree.concatenate(results)

    def _run_chunk(
        self, theta: Theta, carry: Carry, num_steps: int, tape: Tape, theta_per_task: bool
    ) -> tuple[Params, State, Tensor]:
        task_map = TaskMap(tree.size(carry.params), theta_per_task)
        params, state = task_map.unbatch(carry.params), task_map.unbatch(carry.state)
        theta = task_map.unbatch(theta) if theta_per_task else theta
        if tape is Tape.NONE:
            params, state = tree.detach(params), tree.detach(state)
        losses: list[Tensor] = []
        for step in range(carry.step, carry.step + num_steps):
            batch = task_map.unbatch(self.batch(carry.tasks, step, "train"))
            found = self.gradient(task_map, theta, params, batch, tape)
            params = tree.detach(found.params) if tape is Tape.NONE else found.params  # a rule may keep them
            params, state = self.move(task_map, theta, found.grads, state, params, found.loss)
            losses.append(found.outer)
        num_tasks = tree.size(carry.params)
        like = tree.leaves(carry.params)[0]
        stacked = torch.stack(losses) if losses else like.new_empty(0)
        return task_map.rebatch(params), task_map.rebatch(state), stacked.reshape(len(losses), num_tasks)

    def require_theta(self, theta: Theta, num_tasks: int | None = None) -> None:
        """Raise ValueError unless theta is one of this loop, or one for each of ``num_tasks``."""
        checks.require_theta(self.rule, self.inner_objective, theta, self._theta_shapes()[0], num_tasks)

    def _theta_shapes(self) -> tuple[dict[str, torch.Size], set[str]]:
        """Return the shapes of theta, and the names that are the inner objective's own."""
        return self.cache.remember("theta", lambda: checks.theta_shapes(self.rule, self.inner_objective))

    def _check_losses(self, theta: Theta, begun: Carry) -> None:
        """Check the losses once, by one forward pass, before the first inner step."""
        batch = self.batch(begun.tasks, begun.step, "train")
        checks.require_num_tasks(self.family, batch, tree.size(begun.params))
        checks.require_faultless(self.family, begun.params, batch)
        for owner, loss in checks.losses_by_owner(self.family, self.inner_objective):
            with torch.enable_grad():
                params = {k: p.detach().requires_grad_() for k, p in begun.params.items()}
                losses = self.over_tasks(loss, (tree.detach(theta),), params, batch)
                checks.require_trainable(owner, losses, params)
        self.cache.put("losses", True)


InnerSolver = Callable[[InnerLoop, Theta, Carry, int], Carry]
"""Takes a begun carry so many inner steps further by its own way, which need not be differentiable."""


def solve_inner(
    loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, inner: InnerSolver | None = None
) -> Rollout:
    """Solve a begun carry's inner problem without a graph, by ``inner`` or, without one, by the rule's own steps.

    A solver gets the tasks that are run together at a time. Its path is its own affair: the rollout's losses are what
    can be seen from outside, those before and after.

    Raises:
        TypeError: the solver returns something else than a begun carry.
    """
    if inner is None:
        return loop.run(theta, carry, num_steps, Tape.NONE)
    ends: list[Carry] = []
    for chunk in loop.split(carry):
        end = cast("object", inner(loop, theta, chunk, num_steps))
        if not isinstance(end, Carry) or end.state is None:
            raise TypeError(
                f"the inner solver {inner!r} must return a begun Carry, such as carry._replace(params=...), "
                f"got {type(end).__name__ if not isinstance(end, Carry) else 'one without a state'}"
            )
        ends.append(detach(end))
    end = join(ends)
    return Rollout(carry, end, torch.stack([loop.losses(theta, c, "train").detach() for c in (carry, end)]))
