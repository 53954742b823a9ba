"""One call of a rule by an optimizer, with errors that say what a user of the optimizer can do about them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.plug_in.members import common_device, name_of, scalar_loss, shapes, unknown_names


class Updated(NamedTuple):
    """What a rule answered: deltas or, where it ``added`` them itself, new parameters; and its new state."""

    found: Params
    state: State
    added: bool
    written: bool = False
    """The new parameters are in the parameters already."""


def begun(mover: UpdateRule, theta: Theta, params: Params, *, graph: bool = False) -> tuple[Params, State]:
    """Return where a rule starts from and its first state; with a ``graph`` to theta or without.

    Raises:
        ValueError: the rule does not know the parameters by name, or starts from others.
    """
    try:
        with torch.set_grad_enabled(graph):
            start, state = mover.init(theta, params)
    except KeyError as error:
        raise ValueError(unknown_names(mover, params, error)) from error
    if {k: x.shape for k, x in start.items()} != {k: p.shape for k, p in params.items()}:
        raise ValueError(
            f"{name_of(mover)} starts from parameters {shapes(start)}, the optimizer's are {shapes(params)}; "
            "pass model.named_parameters() of a model like the one that the rule was made for"
        )
    return start, () if state is None else state


def updated(
    mover: UpdateRule, theta: Theta, grads: Params, state: State, params: Params, loss: Any, *, whole: bool,
    in_place: bool = False, overwrite: bool = False,
) -> Updated:  # fmt: skip
    """Call the rule.

    Args:
        mover: what is stepped.
        theta: its values, on the parameters' device.
        grads: of all parameters.
        state: the rule's memory.
        params: the parameters' values.
        loss: what ``step`` was told, or None.
        whole: whether the update will be added as it is, or not at all; parts of one need the deltas.
        in_place: whether ``state`` may be overwritten.
        overwrite: whether ``params`` may be, by their new values, where the state may.

    Raises:
        ValueError: the rule reads the loss and got none, does not know the parameters, or answered something else.
    """
    # A rule that reads no loss does not mind None; one that does must not be given an invented number.
    scalar: Any = None if loss is None else scalar_loss(loss, common_device(params))
    kernel, arguments = mover.kernel, (theta, grads, state, params, scalar)
    try:
        if kernel is not None and in_place and overwrite and kernel.step_in_place(*arguments):
            return Updated(params, state, True, True)
        stepped = kernel.step(*arguments) if kernel is not None and whole else None
        if stepped is not None:
            found, state = stepped
        else:
            deltas = kernel.update_in_place(*arguments) if kernel is not None and in_place else None
            found, state = (deltas, state) if deltas is not None else mover.update(*arguments)
    except KeyError as error:
        raise ValueError(unknown_names(mover, params, error)) from error
    except (TypeError, AttributeError) as error:
        if loss is not None:
            raise
        raise ValueError(
            f"{name_of(mover)}.update failed without the loss ({type(error).__name__}: {error}); a rule that "
            "reads the loss needs step(loss=loss) or step(closure)"
        ) from error
    if {k: d.shape for k, d in found.items()} != {k: p.shape for k, p in params.items()}:
        raise ValueError(
            f"{name_of(mover)}.update must return one delta of the same shape per parameter: expected "
            f"{shapes(params)}, got {shapes(found)}"
        )
    return Updated(found, () if state is None else state, stepped is not None)
