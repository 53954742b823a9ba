"""What ``higher`` can differentiate as an update rule."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor

from learnedopt.bridges.options import defaults_of, foreign_code, require_learnable
from learnedopt.core import tree
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta

try:
    # higher has no types, and no other list of the optimizers that it knows.
    from higher.optim import (  # pyright: ignore[reportMissingTypeStubs]
        _opt_mapping,  # pyright: ignore[reportPrivateUsage]
        get_diff_optim,  # pyright: ignore[reportUnknownVariableType]
    )
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"learnedopt.bridges.higher needs the package higher ({_error}); install learnedopt[bridges]"
    ) from _error

_DETACHED = (torch.optim.ASGD, torch.optim.Rprop)
"""Their rate goes into their memory as a number."""


@final
@dataclass(frozen=True, eq=False, init=False)
class HigherRule(UpdateRule):
    """Any optimizer that ``higher`` has a differentiable version of, its own or one that was registered with it.

    Values and derivatives are higher's, which are finite at a coordinate that never had a gradient, but for a centred
    RMSprop. Its Adam adds ``eps`` before it corrects the root for the start, where torch does so after. Its counts and
    scalars are Python's numbers, so that tasks are run one by one, with ``Execution(chunk_size=1)``, and never
    compiled.

    Args:
        optimizer: a class such as ``torch.optim.Adagrad``.
        learn: options in theta, plain numbers such as "lr", which higher takes by its ``override``.
        options: of the optimizer, with its defaults.

    Theta: the learned options, () each, at the constructor's values.
    State: ``step`` (), the updates taken; ``tensors`` and ``numbers``, by parameter, what higher keeps of it. Numbers
    are float64.

    Raises:
        TypeError: higher does not know the optimizer; it has no such option, or one that says how a step is executed.
        ValueError: what the optimizer refuses; ``learn`` names what higher does not differentiate.

    Example:
        >>> loop = InnerLoop(family, HigherRule(torch.optim.Adagrad, lr=0.1, learn=("lr",)), Execution(chunk_size=1))
    """

    optimizer: type[torch.optim.Optimizer]
    learn: tuple[str, ...]
    options: dict[str, Any]
    defaults: dict[str, Any] = field(repr=False)

    def __init__(self, optimizer: type[torch.optim.Optimizer], *, learn: tuple[str, ...] = (), **options: Any) -> None:
        kinds = cast("dict[object, object]", _opt_mapping)
        if not isinstance(cast("object", optimizer), type) or optimizer not in kinds:
            known = ", ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise TypeError(
                f"higher has no differentiable version of {getattr(optimizer, '__name__', optimizer)!r}, only of "
                f"{known}; register one with higher.register_optim, or use learnedopt.bridges.torch_optim.TorchOptim"
            )
        defaults = defaults_of(optimizer, options)
        require_learnable(
            f"HigherRule({optimizer.__name__})", learn, () if optimizer in _DETACHED else _numbers(defaults),
            "higher takes the others out of the graph, at least in part: parts of pairs, such as betas, and the rates "
            "of ASGD and Rprop",
        )  # fmt: skip
        for name, value in (("optimizer", optimizer), ("learn", learn), ("options", options), ("defaults", defaults)):
            object.__setattr__(self, name, value)
        self._stepper({}, {"0": torch.zeros(1)})  # higher's own warnings about some of them, once

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the learned options at the constructor's values."""
        return {key: torch.tensor(float(self.defaults[key]), device=generator.device) for key in self.learn}

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are; what higher makes at its first step has its place already, with zeros."""
        first = next(iter(params.values()))
        with torch.no_grad(), self._calling():
            stepper = self._stepper({}, params)
            stepper._update([[torch.zeros_like(p) for p in params.values()]])
        state = _kept(stepper, params)
        step = torch.zeros((), dtype=torch.int64, device=first.device)
        return params, tree.tree_map(torch.zeros_like, {"step": step, **state})

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Let higher make new parameters, and return the difference."""
        with self._calling():
            first = int(state["step"]) == 0  # its memory is then its own
            stepper = self._stepper(theta, params if first else dict.fromkeys(params, torch.zeros(1)))
            stepper.param_groups[0]["params"] = list(params.values())
            if not first:
                for i, k in enumerate(params):
                    numbers = {key: x.item() for key, x in state["numbers"][k].items()}
                    stepper.state[0][i] = {**state["tensors"][k], **numbers}
            stepper._update([[grads[k] for k in params]])
        moved = stepper.param_groups[0]["params"]
        deltas = {k: moved[i] - p for i, (k, p) in enumerate(params.items())}
        return deltas, {"step": state["step"] + 1, **_kept(stepper, params)}

    @contextmanager
    def _calling(self) -> Generator[None, None, None]:
        with foreign_code(f"HigherRule({self.optimizer.__name__})"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Differentiable ", UserWarning)  # said when the rule was made
            yield

    def _stepper(self, theta: Theta, params: Params) -> Any:
        """Return higher's own, with the memory of an optimizer that has not moved yet."""
        made = self.optimizer([torch.nn.Parameter(p.detach()) for p in params.values()], **self.options)
        own = made.param_groups[0]["params"]
        stepper = get_diff_optim(made, own, override={key: [theta[key]] for key in self.learn if key in theta})
        stepper.param_groups[0]["params"] = list(params.values())
        for memory in stepper.state[0].values():  # torch counts by tensors where higher expects numbers
            memory.update({k: x.item() for k, x in memory.items() if k == "step" and isinstance(x, Tensor)})
        return stepper


def _numbers(defaults: dict[str, Any]) -> tuple[str, ...]:
    """Return the options that are numbers and are read at every step."""
    numbers = [k for k, x in defaults.items() if isinstance(x, int | float) and not isinstance(x, bool)]
    return tuple(k for k in numbers if k != "initial_accumulator_value")


def _kept(stepper: Any, params: Params) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return what higher keeps by parameter: tensors, and numbers as tensors."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {"tensors": {}, "numbers": {}}
    for i, (k, p) in enumerate(params.items()):
        memory = stepper.state[0][i]
        found["tensors"][k] = {key: x for key, x in memory.items() if isinstance(x, Tensor)}
        found["numbers"][k] = {
            key: torch.tensor(float(x), dtype=torch.float64, device=p.device)
            for key, x in memory.items()
            if not isinstance(x, Tensor)
        }
    return found
