"""The functional optimizers of ``torch.optim`` as update rules."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.bridges.options import defaults_of, foreign_code, require_learnable
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta

_CLASSES = {
    "sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam", "adamax": "Adamax",
    "rmsprop": "RMSprop", "adagrad": "Adagrad", "adadelta": "Adadelta", "asgd": "ASGD", "rprop": "Rprop",
}  # fmt: skip
"""Name, of the module and of the function in it -> the class that has its options."""
_ADAM = ("exp_avgs", "exp_avg_sqs")
_AVERAGES: dict[str, tuple[str, ...]] = {
    "sgd": (), "adam": _ADAM, "adamw": _ADAM, "nadam": _ADAM, "radam": _ADAM, "adamax": ("exp_avgs", "exp_infs"),
    "rmsprop": ("square_avgs",), "adagrad": (), "adadelta": ("square_avgs", "acc_deltas"), "asgd": ("axs",),
    "rprop": ("prevs",),
}  # fmt: skip
"""What starts at zero and is shaped as the parameters, by the name of the function's argument."""
_WHERE_ON = {
    "sgd": {"momentum_buffer_list": "momentum"},
    "rmsprop": {"momentum_buffer_list": "momentum", "grad_avgs": "centered"},
    "adam": {"max_exp_avg_sqs": "amsgrad"},
    "adamw": {"max_exp_avg_sqs": "amsgrad"},
}
"""More of these, each where an option is not 0."""
_PARTS = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
"""An option that is a pair -> the names of the function's two arguments."""
_NOT_LINEAR = ("asgd", "rprop")
"""Their step is not proportional to the learning rate, which is in their memory."""


@final
@dataclass(frozen=True, eq=False, init=False)
class TorchOptim(UpdateRule):
    """A functional optimizer of ``torch.optim``, such as ``torch.optim.adam.adam``, on copies of what it writes over.

        delta = lr * (what torch adds at lr = 1)      where lr is learned
        delta = what torch adds at lr                 elsewhere

    Values are torch's, to rounding, and so are the derivatives: where it divides by a root, as the Adams, RMSprop and
    Adagrad do, they are NaN at a coordinate that never had a gradient; the rules of ``learnedopt.optimizers`` are not.
    One exception: the momentum buffer of "sgd" starts at zero, which moves as torch does and keeps the derivative of
    the first gradient, which torch drops.

    Args:
        name: "sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adadelta", "asgd" or "rprop".
        learn: ``("lr",)`` for a learning rate in theta; not for "asgd" and "rprop", whose memory holds it.
        options: of the class in ``torch.optim``, with its defaults.

    Theta: ``lr`` () where learned, at the constructor's value; else empty.
    State: ``step`` (), float64, and dicts shaped as the parameters under the names of the function's arguments.

    Several tasks at once (``torch.func.vmap``) are for those that compute with the number of steps as a tensor, or not
    at all: "sgd", "adam", "adamw", "rmsprop", "adagrad" and "adadelta". The others are run task by task,
    ``Execution(chunk_size=1)``.

    Raises:
        TypeError: an option that torch does not have, or that says how a step is executed, such as ``fused``.
        ValueError: an unknown name; a value that torch refuses; "sgd" with dampening; "adagrad" with lr_decay.

    Example:
        >>> loop = InnerLoop(family, TorchOptim("adam", lr=0.01, learn=("lr",)))
    """

    name: str
    learn: tuple[str, ...]
    options: dict[str, Any]
    defaults: dict[str, Any] = field(repr=False)

    def __init__(self, name: str, *, learn: tuple[str, ...] = (), **options: Any) -> None:
        owner = f"TorchOptim({name!r})"
        if name not in _CLASSES:
            near = difflib.get_close_matches(str(name).lower(), _CLASSES, n=1)
            raise ValueError(
                f"{owner} is none of {', '.join(_CLASSES)}" + (f"; did you mean {near[0]!r}?" if near else "") + ". "
                "Others need a closure, sparse gradients or several tensors at once, or have no functional form"
            )
        defaults = defaults_of(getattr(torch.optim, _CLASSES[name]), options)
        require_learnable(
            owner, learn, () if name in _NOT_LINEAR else ("lr",),
            "its memory holds the learning rate" if name in _NOT_LINEAR else "torch takes the others as plain numbers",
        )  # fmt: skip
        if defaults.get("dampening"):
            raise ValueError(
                f"{owner} with dampening={defaults['dampening']}: torch leaves it out at the first step, which a rule "
                "without branches cannot tell; use learnedopt.optimizers.make('momentum', dampening=...)"
            )
        if defaults.get("lr_decay"):
            raise ValueError(
                f"{owner} with lr_decay={defaults['lr_decay']}: torch reads the step as a plain number for it; leave "
                "it out and use a schedule, or HigherRule(torch.optim.Adagrad, lr_decay=...)"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "learn", learn)
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "defaults", defaults)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the learning rate, where it is learned."""
        return {key: torch.tensor(float(self.defaults[key]), device=generator.device) for key in self.learn}

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are, with torch's first memory."""
        device = next(iter(params.values())).device
        memory: dict[str, Any] = {
            argument: {k: torch.zeros_like(p) for k, p in params.items()} for argument in self._averages()
        }
        for argument, (value, scalar) in self._constants().items():
            memory[argument] = {
                k: torch.full((), value, dtype=torch.float64, device=device) if scalar else torch.full_like(p, value)
                for k, p in params.items()
            }
        return params, {"step": torch.zeros((), dtype=torch.float64, device=device), **memory}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Let torch write over copies, and return the difference."""
        names = list(params)
        moved = {k: params[k].clone() for k in names}
        memory = {key: {k: x.clone() for k, x in one.items()} for key, one in state.items() if key != "step"}
        self._call(names, moved, grads, memory, state["step"])
        deltas = {k: moved[k] - p for k, p in params.items()}
        if self.learn:
            deltas = {k: theta["lr"].to(delta.dtype) * delta for k, delta in deltas.items()}
        return deltas, {"step": state["step"] + 1, **memory}

    def _call(self, names: list[str], moved: Params, grads: Params, memory: dict[str, Params], step: Tensor) -> None:
        function = getattr(importlib.import_module(f"torch.optim.{self.name}"), self.name)
        known = inspect.signature(function).parameters
        lists: dict[str, list[Any]] = {key: [one[k] for k in names] for key, one in memory.items()}
        for argument in _WHERE_ON.get(self.name, {}):
            lists.setdefault(argument, [None for _ in names] if self.name == "sgd" else [])
        # "adagrad" reads the count as a number, for nothing: where it is one of several tasks, it could not be read.
        count = torch.zeros((), device=step.device) if self.name == "adagrad" else step
        if "state_steps" in known:
            lists["state_steps"] = [count.clone() for _ in names]
        told = {"foreach": False, "fused": False, "differentiable": True, "capturable": False}
        options = {k: v for k, v in {**self._arguments(), **told}.items() if k in known}
        with foreign_code(f"TorchOptim({self.name!r})"):
            function([moved[k] for k in names], [grads[k] for k in names], **lists, **options)

    def _arguments(self) -> dict[str, Any]:
        """Return the options as the function names them; the rate is 1 where theta holds it."""
        found: dict[str, Any] = {}
        for key, value in self.defaults.items():
            found.update(zip(_PARTS[key], value, strict=True) if key in _PARTS else {key: value}.items())
        return {**found, **dict.fromkeys(self.learn, 1.0)}

    def _averages(self) -> list[str]:
        extra = [argument for argument, option in _WHERE_ON.get(self.name, {}).items() if self.defaults[option]]
        return [*_AVERAGES[self.name], *extra]

    def _constants(self) -> dict[str, tuple[float, bool]]:
        """Return what does not start at zero: its value, and whether it is a scalar for each parameter."""
        lr = float(self.defaults["lr"])
        return {
            "adagrad": {"state_sums": (self.defaults.get("initial_accumulator_value", 0.0), False)},
            "asgd": {"mus": (1.0, True), "etas": (lr, True)},
            "nadam": {"mu_products": (1.0, True)},
            "rprop": {"step_sizes": (lr, False)},
        }.get(self.name, {})
