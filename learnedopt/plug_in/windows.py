"""Windows of one training run: what it has recorded, and the meta-gradients that can be had of that alone.

Where gradients enter a rule detached (``Tape.FIRST_ORDER``), a window needs nothing of the losses l_t but their
gradients g_t at the run's own points x_t: the losses ``l_t + <g_t, x - x_t>`` have the same, and the engine's
estimators find the same meta-gradients on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.estimator import Estimate
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.unrolled import Truncated

Outputs: TypeAlias = Callable[[Params], Tensor]
NO_OUTPUTS = (
    "the objective compares what the model puts out, which gradients do not say; pass step(outputs=lambda params: "
    "torch.func.functional_call(model, params, (inputs,))), the logits as a function of the parameters by name"
)


class Entry(NamedTuple):
    """What one step of the run leaves: its loss (scalar, None where it was not told), gradients, and how it was taken.

    ``offset`` is ``l_t - <g_t, x_t>`` in float64, NaN without a loss, None where no window will read it; ``factors``
    are those on each parameter's update.
    """

    loss: Tensor | None
    offset: Tensor | None
    grads: Params
    factors: dict[str, float]


class Window(NamedTuple):
    """Where a window began, and what the steps since then have left, the present one included."""

    params: Params
    state: State
    entries: tuple[Entry, ...]


def entry(loss: Tensor | None, grads: Params, params: Params | None, factors: dict[str, float]) -> Entry:
    """Return what to keep of a step, without an offset where there are no ``params``.

    ``grads`` are kept as they are, and must not be written to later.
    """
    if params is None:
        return Entry(loss, None, grads, factors)
    at_point = _inner(grads, params)
    offset = at_point.new_full((), torch.nan) if loss is None else loss.to(at_point.dtype) - at_point
    return Entry(loss, offset, grads, factors)


@final
class RecordedRun(TaskFamily):
    """The losses ``l_t + <g_t, x - x_t>`` of one run, the same on both splits.

    Args:
        outputs: the model's logits as a function of its parameters by name, on one batch; None where nobody gave them.

    Tasks: ``offset`` (1, N) and ``grads``, each (1, N, ...), of the N steps recorded.
    """

    def __init__(self, outputs: Outputs | None = None) -> None:
        self._outputs = outputs

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Refuse: a run is recorded, not drawn."""
        raise NotImplementedError("a recorded run is one task, that of the window; there are no others to draw")

    def init_params(self, tasks: Tasks) -> Params:
        """Refuse: a window begins where the run was."""
        raise NotImplementedError("a recorded run goes on from its window's own parameters")

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return what was recorded at a step of the window.

        Raises:
            ValueError: the run has not come that far.
        """
        num_recorded = tasks["offset"].shape[1]
        if step >= num_recorded:
            raise ValueError(
                f"the objective asks for the loss {step} steps after the window's start, of which the run has recorded "
                f"{num_recorded}: use an objective that reads no further than the window, or a Bootstrap of the rule's "
                "own further steps"
            )
        return tree.tree_map(lambda x: x[:, step], tasks)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the recorded loss, extended linearly."""
        like = next(iter(params.values()))
        return (batch["offset"] + _inner(batch["grads"], params)).to(like.dtype)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return what the model puts out.

        Raises:
            ValueError: nobody gave a function for that.
        """
        if self._outputs is None:
            raise ValueError(NO_OUTPUTS)
        return self._outputs(params)


def recorded_loop(rule: UpdateRule) -> InnerLoop:
    """Return the loop whose windows are those of a run by ``rule``."""
    # Nothing to vet: the family is this file's own.
    return InnerLoop(RecordedRun(), rule, Execution(vet=False))


def truncated(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, num_steps: int, window: Window, outputs: Outputs | None
) -> Estimate:
    """Return the engine's own estimate: ``Truncated(num_steps, tape=Tape.FIRST_ORDER)`` on what was recorded.

    The estimate's carry counts steps from the window's start, and is not batched.
    """
    state, loop = window.state, loop if outputs is None else loop.on(RecordedRun(outputs))
    if any(factor != 1 for each in window.entries for factor in each.factors.values()):
        loop = InnerLoop(loop.family, Scaled(loop.rule), loop.execution)
        state = Scaled.state(state, window.entries)
    carry = Carry(_tasks(window), tree.unsqueeze(window.params), tree.unsqueeze(state), 0)
    estimator = Truncated(num_steps, tape=Tape.FIRST_ORDER)
    found = estimator.estimate(loop, theta, objective, carry)
    end = found.carry
    state = tree.squeeze(end.state)
    state = state["rule"] if isinstance(loop.rule, Scaled) else state
    return found._replace(carry=Carry((), tree.squeeze(end.params), state, end.step))


def pulled_back(outputs: Params, leaves: Theta, cotangents: Params) -> Theta:
    """Return ``Dφ(x, w)ᵀ cotangents`` of one update, which is a window's meta-gradient where it is all of the window.

    The arithmetic of ``truncated`` for ``num_steps=1``, without what the engine does around it.

    Args:
        outputs: deltas or new parameters, with their graph to ``leaves``, which stays.
        leaves: theta, as the update was given it.
        cotangents: the gradient after the update, times what the update was multiplied by.
    """
    moved = {k: x for k, x in outputs.items() if x.requires_grad}
    weights = [cotangents[k].to(x.dtype) for k, x in moved.items()]
    # That all of theta is reached by some update was asked at the start; by this one it may not be.
    found = torch.autograd.grad(
        list(moved.values()), list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@final
class Scaled(UpdateRule):
    """A rule whose updates are multiplied by recorded factors, one for each parameter and step.

    Theta: the rule's own. State: the rule's as ``rule``; ``factors``, each (N,), of the N steps recorded; ``step``.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule

    @staticmethod
    def state(state: State, entries: tuple[Entry, ...]) -> dict[str, Any]:
        """Return the state at the start of a window, of the rule's own."""
        grads = entries[0].grads
        factors = {k: g.new_tensor([each.factors[k] for each in entries]) for k, g in grads.items()}
        step = torch.zeros((), dtype=torch.int64, device=next(iter(grads.values())).device)
        return {"rule": state, "factors": factors, "step": step}

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the rule's."""
        return self.rule.init_theta(generator)

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start as the rule does; the factor is 1 throughout."""
        start, state = self.rule.init(theta, params)
        ones = {k: p.new_ones(1) for k, p in params.items()}
        first = next(iter(params.values()))
        return start, {"rule": state, "factors": ones, "step": torch.zeros((), dtype=torch.int64, device=first.device)}

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move by the factors of the present step."""
        deltas, own = self.rule.update(theta, grads, state["rule"], params, loss)
        now = state["step"].reshape(1)
        factors = {k: f.index_select(0, now.clamp(max=len(f) - 1)).squeeze(0) for k, f in state["factors"].items()}
        # 0 times an infinite update would not be nothing.
        deltas = {k: torch.where(factors[k] == 0, 0.0, factors[k] * d) for k, d in deltas.items()}
        own = () if own is None else own
        return deltas, {"rule": own, "factors": state["factors"], "step": state["step"] + 1}


def stand_in(params: Params, num_recorded: int) -> Tasks:
    """Return what a run of so many steps could have recorded: gradients of one."""
    offset = next(iter(params.values())).new_ones(1, num_recorded, dtype=torch.float64)
    return {"offset": offset, "grads": {k: p.new_ones(1, num_recorded, *p.shape) for k, p in params.items()}}


def _tasks(window: Window) -> Tasks:
    def stacked(pick: Callable[[Entry], Any]) -> Tensor:
        return torch.stack([pick(each) for each in window.entries]).unsqueeze(0)

    grads = {k: stacked(lambda each, k=k: each.grads[k]) for k in window.params}
    return {"offset": stacked(lambda each: each.offset), "grads": grads}


def _inner(grads: Params, params: Params) -> Tensor:
    # In float64: the loss must come out of the difference as it was told.
    return torch.stack([(grads[k].double() * p.double()).sum() for k, p in params.items()]).sum()
