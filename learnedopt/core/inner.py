"""The inner loop: an update rule trains the optimizees of a batch of tasks, with or without a graph to theta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import checks, mixed_mode, tree
from learnedopt.core.checks import require_count
from learnedopt.core.execution import Execution, TaskMap
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta


class Tape(Enum):
    """How much of the inner loop is recorded for back-propagation to theta.

    ``NONE`` records nothing. ``FIRST_ORDER`` lets gradients and losses enter the rule detached, so that no second
    derivative of the optimizee is taken (Andrychowicz et al. 2016, "drop the dashed edges"); parameters and states
    keep their graph. ``FULL`` records everything.
    """

    NONE = "none"
    FIRST_ORDER = "first-order"
    FULL = "full"


class Carry(NamedTuple):
    """Where the inner loop stands, without a graph between runs: all trees batched.

    ``state`` is None on a fresh carry, before the rule's ``init``; ``step`` counts inner steps from the start.
    """

    tasks: Tasks
    params: Params
    state: State | None = None
    step: int = 0


class Rollout(NamedTuple):
    """A piece of the inner loop; ``losses`` (num_steps, num_tasks) are the train losses before each update."""

    start: Carry
    end: Carry
    losses: Tensor


class InnerLoop:
    """A family's optimizees trained by an update rule.

    Args:
        family: what is trained.
        rule: how one step moves.
        execution: how tasks are run; see ``Execution``.

    Example:
        >>> loop = InnerLoop(learnedopt.tasks.make("quadratic"), learnedopt.optimizers.make("sgd", lr=0.01))
        >>> generator = torch.Generator().manual_seed(0)
        >>> theta = loop.rule.init_theta(generator)
        >>> carry = loop.start(loop.family.sample(8, generator))
        >>> rollout = loop.run(theta, carry, num_steps=100, tape=Tape.NONE)
        >>> rollout.losses.shape
        torch.Size([100, 8])
    """

    def __init__(self, family: TaskFamily, rule: UpdateRule, execution: Execution = Execution()) -> None:
        self.family, self.rule, self.execution = family, rule, execution
        if not hasattr(family, "loss") or not hasattr(rule, "update"):
            raise TypeError(
                f"InnerLoop takes a TaskFamily and an UpdateRule, got {type(family).__name__}, {type(rule).__name__}; "
                "make them by name with learnedopt.tasks.make(name) and learnedopt.optimizers.make(name)"
            )
        # What was already checked once, so that checks cost nothing after the first run.
        self.vetted: dict[Any, Any] = {}
        # What was compiled, or could not be, by signature.
        self.programs: dict[Any, Any] = {}
        self._source: Callable[[Tasks, int, Split], Batch] | None = None

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

    def begin(self, theta: Theta, carry: Carry) -> Carry:
        """Apply the rule's ``init`` to a fresh carry; a begun one is returned as it is.

        Raises:
            ValueError: theta belongs to another rule or shape; the family's loss is not scalar, not finite at the
                start, or does not depend on the parameters.
        """
        self._vet_theta(theta)
        if carry.state is not None:
            return carry
        params, state = self.over_tasks(self._init, (theta,), carry.params)
        checks.require_like(params, carry.params)
        begun = carry._replace(params=params, state=state)
        self._vet_family(begun)
        return begun

    def vet(self, theta: Theta, carry: Carry) -> None:
        """Raise what ``begin`` raises on the first two tasks; that costs nothing once the family has been seen."""
        self._vet_theta(theta)
        if "family" not in self.vetted:
            self.begin(theta, narrow(carry, 0, min(2, tree.size(carry.params))))

    def run(self, theta: Theta, carry: Carry, num_steps: int, tape: Tape = Tape.FULL) -> Rollout:
        """Take ``num_steps`` inner steps and return the rollout, recorded as ``tape`` says.

        A fresh carry is begun first. Under ``Tape.NONE`` nothing returned has a graph.
        """
        require_count("num_steps", num_steps)
        carry = self.begin(tree.detach(theta) if tape is Tape.NONE else theta, carry)
        pieces = [self._run_chunk(theta, chunk, num_steps, tape) for chunk in self.split(carry)]
        params, state = tree.concatenate([piece[:2] for piece in pieces])
        start = detach(carry) if tape is Tape.NONE else carry
        end = Carry(carry.tasks, params, state, carry.step + num_steps)
        return Rollout(start, end, torch.cat([piece[2] for piece in pieces], dim=1))

    def losses(self, theta: Theta, carry: Carry, split: Split) -> Tensor:
        """Return each task's loss (num_tasks,) at a begun carry on its step's batch of ``split``."""
        return self._evaluate(self.family.loss, carry, split)

    def outputs(self, carry: Carry, split: Split) -> Tensor:
        """Return each task's model outputs (num_tasks, ...) at a begun carry on its step's batch of ``split``."""
        return self._evaluate(self.family.outputs, carry, split)

    def metrics(self, carry: Carry, split: Split) -> dict[str, Tensor]:
        """Return the family's metrics, each (num_tasks,), at a begun carry on its step's batch of ``split``."""
        return self._evaluate(self.family.metrics, carry, split)

    def split(self, carry: Carry) -> list[Carry]:
        """Cut a carry into the chunks of tasks that are run together."""
        return [narrow(carry, *bounds) for bounds in self._bounds(carry.params)]

    def over_tasks(self, fn: Callable[..., Any], shared: tuple[tree.Tree, ...], *batched: tree.Tree) -> Any:
        """Call ``fn(*shared, *each)``, a function of ONE task, on batched trees; its results come back batched."""
        results = []
        for start, stop in self._bounds(batched[0]):
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
        source = self._source or self.family.batch
        return tree.to(source(tasks, step, split), self.execution.device, self.execution.dtype)

    @contextmanager
    def batches_from(self, source: Callable[[Tasks, int, Split], Batch]) -> Iterator[None]:
        """Ask ``source`` for batches in place of the family, until the context ends."""
        before, self._source = self._source, source
        try:
            yield
        finally:
            self._source = before

    def _init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        params, state = self.rule.init(theta, params)
        state = () if state is None else state  # None marks a carry that has not begun
        checks.require_tensors(self.rule, state)
        return params, state

    def _step(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        kernel = self.rule.kernel
        found = None if kernel is None else kernel.step(theta, grads, state, params, loss)
        if found is not None:
            values, state = checks.params_and_state(self.rule, "kernel.step", found, params)
            # Neither the rule's order nor a theta of another dtype may become the parameters' (scalars of both would
            # promote to the wider one).
            moved = {k: _in_dtype_of(p, values[k]) for k, p in params.items()}
        else:
            result = self.rule.update(theta, grads, state, params, loss)
            deltas, state = checks.params_and_state(self.rule, "update", result, params)
            moved = {k: p + _in_dtype_of(p, deltas[k]) for k, p in params.items()}
        return moved, () if state is None else state

    def _evaluate(self, fn: Callable[[Params, Batch], Any], carry: Carry, split: Split) -> Any:
        if split not in ("train", "valid"):
            raise ValueError(
                f"split={split!r} is neither 'train' nor 'valid'; other tasks are another family's meta_split"
            )
        if carry.state is None:
            raise ValueError(
                "the carry has not begun: pass it through loop.begin(theta, carry), which applies the rule's init"
            )
        results = []
        for chunk in self.split(carry):
            task_map = TaskMap(tree.size(chunk.params))
            batch = self.batch(chunk.tasks, chunk.step, split)
            found = task_map.apply(fn, (), task_map.unbatch(chunk.params), task_map.unbatch(batch))
            results.append(task_map.rebatch(found))
        return tree.concatenate(results)

    def _run_chunk(self, theta: Theta, carry: Carry, num_steps: int, tape: Tape) -> tuple[Params, State, Tensor]:
        task_map = TaskMap(tree.size(carry.params))
        params, state = task_map.unbatch(carry.params), task_map.unbatch(carry.state)
        if tape is Tape.NONE:
            theta, params, state = tree.detach(theta), tree.detach(params), tree.detach(state)
        losses = []
        for step in range(carry.step, carry.step + num_steps):
            batch = task_map.unbatch(self.batch(carry.tasks, step, "train"))
            loss, grads, params = self.gradient(task_map, theta, params, batch, tape)
            if tape is Tape.NONE:
                params = tree.detach(params)  # a rule may keep them in its state
            with torch.set_grad_enabled(tape is not Tape.NONE):
                params, state = self.move(
                    task_map, theta, grads, state, params, loss.detach() if tape is Tape.FIRST_ORDER else loss
                )
            losses.append(loss)
        num_tasks = tree.size(carry.params)
        like = tree.leaves(carry.params)[0]
        stacked = torch.stack(losses) if losses else like.new_empty(0)
        return task_map.rebatch(params), task_map.rebatch(state), stacked.reshape(len(losses), num_tasks)

    def gradient(
        self, task_map: TaskMap, theta: Theta, params: Params, batch: Batch, tape: Tape
    ) -> tuple[Tensor, Params, Params]:
        """Return the train loss, the gradient of loss plus regularizer, and the parameters that both refer to."""
        with torch.enable_grad():
            # Parameters without a graph become leaves: the gradient is taken with respect to what the loss has read.
            params = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
            if self.execution.mixed_mode and tape is Tape.FULL:
                loss, grads = mixed_mode.value_and_gradient(
                    lambda params: task_map.apply(self.family.loss, (), params, batch), params
                )
            else:
                loss = task_map.apply(self.family.loss, (), params, batch)
                grads = self._gradient_of(loss, params, tape)
                if tape is Tape.FIRST_ORDER:
                    loss = _FirstOrder.apply(loss.detach(), len(grads), *params.values(), *grads)
            if self.rule.has_regularizer:
                # Taken apart and then added, as LearnedOptimizer must: the same sums in the same order, the same bits.
                pulls = pull(self.rule, task_map, theta, params, create_graph=tape is Tape.FULL)
                with torch.set_grad_enabled(tape is Tape.FULL):
                    grads = [g + pulls[k] for g, k in zip(grads, params, strict=True)]
        return loss if tape is not Tape.NONE else loss.detach(), dict(zip(params, grads, strict=True)), params

    def _gradient_of(self, values: Tensor, params: Params, tape: Tape) -> list[Tensor]:
        # Tasks do not interact, so the gradient of the sum holds each task's own gradient.
        return list(
            torch.autograd.grad(
                values.sum() if values.ndim else values, tuple(params.values()), create_graph=tape is Tape.FULL,
                materialize_grads=True,
            )
        )  # fmt: skip

    def move(
        self, task_map: TaskMap, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, State]:
        """Apply one update of the rule: return the new parameters and state."""
        moved, new_state = task_map.apply(self._step, (theta,), grads, state, params, loss)
        try:
            # Whoever flattens a step's inputs and outputs pairs them by position: dicts must not change their order.
            new_state = tree.arrange(new_state, state) if new_state is not state else state
        except ValueError as error:
            raise ValueError(
                f"{type(self.rule).__name__}.update must return a state of the same structure as it was given: {error}"
            ) from error
        return moved, new_state

    def _vet_theta(self, theta: Theta) -> None:
        if "theta" not in self.vetted:
            self.vetted["theta"] = checks.theta_shapes(self.rule)
        checks.require_theta(self.rule, theta, self.vetted["theta"])

    def _vet_family(self, begun: Carry) -> None:
        """Check the loss once, by one forward pass, before the first inner step."""
        if "family" in self.vetted:
            return
        batch = self.batch(begun.tasks, begun.step, "train")
        checks.require_num_tasks(self.family, batch, tree.size(begun.params))
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in begun.params.items()}
            losses = self.over_tasks(checks.scalar_loss(self.family), (), params, batch)
        checks.require_trainable(self.family, losses, params)
        self.vetted["family"] = True


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
    ends = []
    for chunk in loop.split(carry):
        end = inner(loop, theta, chunk, num_steps)
        if not isinstance(end, Carry) or end.state is None:
            raise TypeError(
                f"the inner solver {inner!r} must return a begun Carry, such as carry._replace(params=...), "
                f"got {type(end).__name__ if not isinstance(end, Carry) else 'one without a state'}"
            )
        ends.append(detach(end))
    end = join(ends)
    return Rollout(carry, end, torch.stack([loop.losses(theta, c, "train").detach() for c in (carry, end)]))


def pull(rule: UpdateRule, task_map: TaskMap, theta: Theta, params: Params, *, create_graph: bool) -> Params:
    """Return the gradient of the rule's regularizer at parameters that are in the task_map."""
    if rule.has_regularizer_gradient:
        with torch.set_grad_enabled(create_graph):
            found = task_map.apply(rule.regularizer_gradient, (theta,), params)
        return checks.pull_like(rule, found, params)
    with torch.enable_grad():
        at = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        term = task_map.apply(rule.regularizer, (theta,), at).sum()
        pulls = torch.autograd.grad(term, tuple(at.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, pulls, strict=True))


def _in_dtype_of(like: Tensor, x: Tensor) -> Tensor:
    return x if x.dtype is like.dtype else x.to(like.dtype)


class _FirstOrder(torch.autograd.Function):
    """A loss whose gradient is known: the gradient is kept in place of the loss's graph."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, num_params: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[num_params:])
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:  # (num_tasks,), or () of one task
        grads = ctx.saved_tensors
        scaled = [cotangent.reshape(cotangent.shape + (1,) * (g.ndim - cotangent.ndim)) * g for g in grads]
        return None, None, *scaled, *[None] * len(grads)


def narrow(carry: Carry, start: int, stop: int) -> Carry:
    """Return tasks ``start`` to ``stop - 1`` of a carry."""
    tasks, params, state = tree.narrow(
        (carry.tasks, carry.params, () if carry.state is None else carry.state), start, stop
    )
    return Carry(tasks, params, None if carry.state is None else state, carry.step)


def join(carries: list[Carry]) -> Carry:
    """Put chunks of tasks, all at the same step, together again."""
    tasks, params, state = tree.concatenate([carry[:3] for carry in carries])
    return Carry(tasks, params, state, carries[0].step)


def detach(carry: Carry) -> Carry:
    """Cut a carry from the autograd graph."""
    state = None if carry.state is None else tree.detach(carry.state)
    return Carry(tree.detach(carry.tasks), tree.detach(carry.params), state, carry.step)
