"""What the tests of the plug-in's conventions share: sources of rules, torch's own twins, a model and its training."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import learnedopt
from learnedopt import LearnedOptimizer, UpdateRule
from learnedopt.core import tree
from learnedopt.core.tree import Params
from learnedopt.optimizers import SGD, Adam, AdamW, Momentum, NAdam, Nesterov, RMSprop

HAND_DESIGNED: dict[str, UpdateRule] = {
    "sgd": SGD(lr=0.05),
    "momentum": Momentum(lr=0.05, momentum=0.8),
    "nesterov": Nesterov(lr=0.05, momentum=0.8),
    "rmsprop": RMSprop(lr=0.01),
    "adam": Adam(lr=0.02),
    "adamw": AdamW(lr=0.02),
    "nadam": NAdam(lr=0.02),
}
PACKAGED = learnedopt.packaged()
ALL = [*HAND_DESIGNED, *PACKAGED]
NUM_STEPS = 40
"""What rules that read the horizon are told."""
BARE: dict[str, Any] = {"guard": False}
"""The rule itself is asked, and not what watches over it."""


def bare(params: Any, rule: Any, **options: Any) -> LearnedOptimizer:
    """Make an optimizer that takes the rule's steps, to the bit, and is not watched."""
    return LearnedOptimizer(params, rule, **{**BARE, **options})


def source(name: str) -> Any:
    """Return what the plug-in takes for a rule: a packaged name, or a rule of this module with its theta."""
    if name in PACKAGED:
        return name
    rule = HAND_DESIGNED[name]
    return rule, rule.init_theta(torch.Generator())


def rule_of(name: str) -> UpdateRule:
    """Return the rule behind a name."""
    return HAND_DESIGNED.get(name) or learnedopt.load(name)[0]


def made(name: str, params: Any, **options: Any) -> LearnedOptimizer:
    """Make an optimizer, told the horizon where its rule reads it."""
    horizon = {"num_steps": NUM_STEPS} if rule_of(name).reads_horizon else {}
    return LearnedOptimizer(params, source(name), **{**BARE, **horizon, **options})


def learned(rule: UpdateRule, params: Any, **options: Any) -> LearnedOptimizer:
    """Make an optimizer of a rule that is used as it is."""
    return LearnedOptimizer(params, (rule, rule.init_theta(torch.Generator())), **{**BARE, **options})


class Net(nn.Module):
    """Two matrices, two vectors and a scalar."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(torch.tanh(self.layer(x)))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Clear the gradients, back-propagate the loss of a step's batch, and return it."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs, targets = torch.randn(7, 5, generator=generator).to(dtype), torch.randint(3, (7,), generator=generator)
    loss = nn.functional.cross_entropy(model(inputs).float(), targets)
    model.zero_grad()
    loss.backward()
    return loss


def take(optimizer: torch.optim.Optimizer, loss: Tensor | None = None) -> None:
    """Step, and pass the loss to what can take it."""
    if isinstance(optimizer, LearnedOptimizer) and loss is not None:
        optimizer.step(loss=loss)
    else:
        optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Train on the batches of these steps."""
    for step in steps:
        take(optimizer, loss_of(model, step))


def values(model: nn.Module) -> Params:
    """Return copies of the parameters."""
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def memory(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return copies of what is kept for each parameter, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {
            k: tree.tree_map(torch.clone, x) if isinstance(x, Tensor) else x
            for k, x in optimizer.state.get(p, {}).items()
        }
        for p in params
    ]


def equal(first: Any, second: Any) -> bool:
    """Whether two trees have the same leaves, to the bit and in the same types."""

    def same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return all(same(a, b) for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True))


def through_a_file(what: Any) -> Any:
    """Return it as ``torch.load`` reads it with ``weights_only``."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Twin(NamedTuple):
    """The same algorithm twice: as a rule of rate 1, whose rate is the group's, and torch's own."""

    rule: Callable[[], UpdateRule]
    ours: dict[str, Any]
    """Options of ``LearnedOptimizer``."""
    own: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]


def _twin(
    rule: Callable[..., UpdateRule], hyper: dict[str, Any], own: Any, options: dict[str, Any], **ours: Any
) -> Twin:
    return Twin(lambda: rule(lr=1.0, **hyper), ours, own, options)


_optim = torch.optim
TWINS: dict[str, Twin] = {
    "sgd": _twin(SGD, {}, _optim.SGD, {}),
    "sgd, weight_decay": _twin(SGD, {"weight_decay": 0.5}, _optim.SGD, {"weight_decay": 0.5}),
    "sgd, weight_decay, maximize": _twin(
        SGD, {"weight_decay": 0.1}, _optim.SGD, {"weight_decay": 0.1, "maximize": True}, maximize=True
    ),
    "momentum": _twin(Momentum, {"momentum": 0.9}, _optim.SGD, {"momentum": 0.9}),
    "momentum, dampening": _twin(
        Momentum, {"momentum": 0.9, "dampening": 0.5}, _optim.SGD, {"momentum": 0.9, "dampening": 0.5}
    ),
    "momentum, weight_decay, maximize": _twin(
        Momentum, {"momentum": 0.9, "weight_decay": 0.1}, _optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}, maximize=True,
    ),
    "nesterov, weight_decay": _twin(
        Nesterov, {"momentum": 0.9, "weight_decay": 0.1}, _optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    "adam": _twin(Adam, {}, _optim.Adam, {}),
    "adam, weight_decay, maximize": _twin(
        Adam, {"weight_decay": 0.1}, _optim.Adam, {"weight_decay": 0.1, "maximize": True}, maximize=True
    ),
    "adam, decoupled weight_decay": _twin(Adam, {}, _optim.AdamW, {"weight_decay": 0.3}, weight_decay=0.3),
    "adam, decoupled weight_decay, maximize": _twin(
        Adam, {}, _optim.AdamW, {"weight_decay": 0.3, "maximize": True}, weight_decay=0.3, maximize=True
    ),
    "adamw": _twin(AdamW, {"weight_decay": 0.3}, _optim.AdamW, {"weight_decay": 0.3}),
    "rmsprop": _twin(RMSprop, {}, _optim.RMSprop, {}),
    "rmsprop, weight_decay, centered": _twin(
        RMSprop, {"weight_decay": 0.1, "centered": True}, _optim.RMSprop, {"weight_decay": 0.1, "centered": True}
    ),
    "rmsprop, momentum, maximize": _twin(
        RMSprop, {"momentum": 0.9}, _optim.RMSprop, {"momentum": 0.9, "maximize": True}, maximize=True
    ),
    "nadam": _twin(NAdam, {}, _optim.NAdam, {}),
    "nadam, weight_decay, momentum_decay": _twin(
        NAdam, {"weight_decay": 0.1, "momentum_decay": 6e-3}, _optim.NAdam,
        {"weight_decay": 0.1, "momentum_decay": 6e-3},
    ),
    "nadam, decoupled weight_decay": _twin(
        NAdam, {}, _optim.NAdam, {"weight_decay": 0.3, "decoupled_weight_decay": True}, weight_decay=0.3
    ),
    "nadam, maximize": _twin(NAdam, {}, _optim.NAdam, {"maximize": True}, maximize=True),
}  # fmt: skip
"""The settings that torch's own tests run its optimizers with (``optim_inputs_func_*`` of its ``optim_db``)."""
NEEDS_GROUP_OPTIONS = {k for k, twin in TWINS.items() if twin.ours}


def both(name: str, rate: float, ours: Any, own: Any) -> tuple[LearnedOptimizer, torch.optim.Optimizer]:
    """Return a twin's two optimizers, on two lists of parameters."""
    twin = TWINS[name]
    return learned(twin.rule(), ours, lr=rate, **twin.ours), twin.own(own, lr=rate, **twin.options)
