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
from learnedopt.plug_in.memory import Layout

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
    """Where a window began, and what the steps since then have left, the present one included.

    ``state`` is None where the run itself began: the rule's ``init`` is part of that window.
    """

    params: Params
    state: State | None
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
    # Nothing to vet or to check: the family is this file's own, and a loss that was not told is NaN.
    loop = InnerLoop(RecordedRun(), rule, Execution(vet=False))
    loop.cache.put("losses", True)
    return loop


def truncated(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, num_steps: int, window: Window, outputs: Outputs | None
) -> Estimate:
    """Return the engine's own estimate: ``Truncated(num_steps, tape=Tape.FIRST_ORDER)`` on what was recorded.

    The estimate's carry counts steps from the window's start, and is not batched.
    """
    state = window.state
    if any(factor != 1 for each in window.entries for factor in each.factors.values()):
        scaled = Scaled(loop.rule, window.entries)
        loop, state = recorded_loop(scaled), None if state is None else scaled.at_start(state)
    loop = loop if outputs is None else loop.on(RecordedRun(outputs))
    state = None if state is None else tree.unsqueeze(state)
    carry = Carry(_tasks(window), tree.unsqueeze(window.params), state, 0)
    estimator = Truncated(num_steps, tape=Tape.FIRST_ORDER)
    found = estimator.estimate(loop, theta, objective, carry)
    end = found.carry
    state = tree.squeeze(end.state)
    state = state["rule"] if isinstance(loop.rule, Scaled) else state
    return found._replace(carry=Carry((), tree.squeeze(end.params), state, end.step))


def pulled_back(outputs: Params, leaves: Theta, cotangents: Params, factors: dict[str, float]) -> Theta:
    """Return ``Dφ(x, w)ᵀ cotangents`` of one update, which is a window's meta-gradient where it is all of the window.

    The arithmetic of ``truncated`` for ``num_steps=1``, without what the engine does around it.

    Args:
        outputs: deltas or new parameters, with their graph to ``leaves``, which stays.
        leaves: theta, as the update was given it.
        cotangents: the gradient after the update.
        factors: by what each parameter's update was multiplied.
    """
    moved = {k: x for k, x in outputs.items() if x.requires_grad}
    weights: list[Tensor] = []
    for k, x in moved.items():
        weight, factor = cotangents[k].to(x.dtype), factors[k]
        weights.append(weight if factor == 1 else torch.zeros_like(weight) if factor == 0 else factor * weight)
    # That all of theta is reached by some update was asked at the start; by this one it may not be.
    found = torch.autograd.grad(
        list(moved.values()), list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@final
class Scaled(UpdateRule):
    """A rule whose updates are multiplied by recorded factors, one for each parameter and step.

    Theta: the rule's own. State: the rule's as ``rule``, and ``step``.
    """

    def __init__(self, rule: UpdateRule, entries: tuple[Entry, ...]) -> None:
        grads = entries[0].grads
        self.rule = rule
        self.factors: dict[str, Tensor] = {
            k: g.new_tensor([each.factors[k] for each in entries]) for k, g in grads.items()
        }

    def at_start(self, state: State) -> dict[str, Any]:
        """Return the state with which the window begins, of the rule's own."""
        device = next(iter(self.factors.values())).device
        return {"rule": () if state is None else state, "step": torch.zeros((), dtype=torch.int64, device=device)}

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the rule's."""
        return self.rule.init_theta(generator)

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return the rule's."""
        return self.rule.theta_scale()

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start as the rule does."""
        start, state = self.rule.init(theta, params)
        return start, self.at_start(state)

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move by the factors of the present step."""
        deltas, own = self.rule.update(theta, grads, state["rule"], params, loss)
        now = state["step"].reshape(1)
        moved: Params = {}
        for k, delta in deltas.items():
            factor = self.factors[k].index_select(0, now).squeeze(0)
            moved[k] = torch.where(factor == 0, 0.0, factor * delta)  # 0 times an infinite update would not be nothing
        return moved, {"rule": () if own is None else own, "step": state["step"] + 1}


def packed(window: Window | None, layout: Layout) -> dict[str, Any] | None:
    """Return a window as dicts and lists of tensors and numbers, for a state dict; ``layout`` is that of the memory."""
    if window is None:
        return None
    entries = [each._asdict() for each in window.entries]
    memory = None if window.state is None else layout.entries(window.state)
    return {"params": window.params, "memory": memory, "entries": entries}


def unpacked(found: dict[str, Any] | None, layout: Layout) -> Window | None:
    """Return the window that ``packed`` took apart; ``layout`` is that of the rule's memory."""
    if found is None:
        return None
    memory = found["memory"]
    state = None if memory is None else layout.state(memory)
    return Window(dict(found["params"]), state, tuple(Entry(**each) for each in found["entries"]))


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
