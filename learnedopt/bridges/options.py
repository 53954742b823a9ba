"""What the rules made of other libraries' optimizers share: options, and how their code is called."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from learnedopt.core.containers import is_tuple

UNDIFFERENTIABLE = {
    "fused": "a fused kernel writes over its inputs and has no derivative",
    "foreach": "torch's loops over many tensors write over their inputs, and are refused by autograd",
    "capturable": "it serves CUDA graphs of steps in place",
    "differentiable": "a rule always is",
}
"""Options of ``torch.optim`` that say how a step is executed -> why a rule, a pure function, has none of them."""


def defaults_of(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of an optimizer at their values, as it fills them in.

    Raises:
        TypeError: the optimizer has no such option, or an option says how a step is executed.
        ValueError: what the optimizer raises for a value that it refuses.
    """
    told = {name: why for name, why in UNDIFFERENTIABLE.items() if options.get(name)}
    if told:
        why = "; ".join(f"{name}: {reason}" for name, reason in told.items())
        raise TypeError(
            f"{kind.__name__} as an update rule cannot take {', '.join(told)} ({why}). Leave it out: the values are "
            "the same"
        )
    tensors = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    if tensors:
        raise TypeError(
            f"{kind.__name__} got tensors for {tensors}; pass numbers, and name what is to be learned: learn=('lr',)"
        )
    return dict(kind([torch.zeros(1, requires_grad=True)], **options).defaults)


def require_learnable(owner: str, learn: Any, learnable: tuple[str, ...], why: str) -> None:
    """Raise TypeError or ValueError unless ``learn`` is a tuple out of ``learnable``; else ``why`` is said."""
    if not is_tuple(learn) or not all(isinstance(name, str) for name in learn):
        raise TypeError(f"{owner}: learn={learn!r} is not a tuple of names; pass learn=('lr',), or () for none")
    unknown = [name for name in learn if name not in learnable]
    if unknown:
        raise ValueError(f"{owner} cannot learn {unknown}, only {list(learnable)}: {why}")


@contextmanager
def foreign_code(owner: str) -> Generator[None, None, None]:
    """Call code that was not written with ``torch.func.vmap`` in mind.

    Operations that torch has no rule for run task by task inside, to the same values; its hint that this is slower is
    not shown.

    Raises:
        ValueError: the code reads a tensor of several tasks as a number, branches on it, or asks for its gradient.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            yield
    except RuntimeError as error:
        if not str(error).startswith("vmap:") and "functorch transform" not in str(error):
            raise
        raise ValueError(
            f"{owner} treats tensors as those of one task, and cannot be run for several at once; run them one by one, "
            f"with Execution(chunk_size=1) ({str(error).splitlines()[0][:120]})"
        ) from error
