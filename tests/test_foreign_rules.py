"""Other people's optimizers as update rules: torch's functional ones, torchopt's, and what higher can differentiate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import TanhMLP, sample, template
from torch import Tensor

from learnedopt import Execution, FinalLoss, InnerLoop, Tape, Unrolled, UpdateRule, optimizers
from learnedopt.bridges.torch_optim import TorchOptim
from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta

torchopt = pytest.importorskip("torchopt", reason="the package torchopt is not installed")
pytest.importorskip("higher", reason="the package higher is not installed")

from learnedopt.bridges.higher_rule import HigherRule  # noqa: E402 - which need these
from learnedopt.bridges.torchopt import TorchOpt  # noqa: E402

pytestmark = pytest.mark.usefixtures("float64")

FAMILY = TanhMLP()
SHAPES = {"weight": (3, 2), "bias": (2,), "scale": ()}
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
RMSPROP: dict[str, Any] = {"lr": 0.1, "alpha": 0.9, "eps": 1e-2, "momentum": 0.5, "centered": True}
TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": ("Adam", ADAM),
    "adam, no eps": ("Adam", {**ADAM, "eps": 0.0}),
    "amsgrad": ("Adam", {**ADAM, "amsgrad": True}),
    "adamw": ("AdamW", ADAM),
    "nadam": ("NAdam", ADAM),
    "radam": ("RAdam", ADAM),
    "adamax": ("Adamax", ADAM),
    "rmsprop": ("RMSprop", {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-2}),
    "rmsprop, centered": ("RMSprop", RMSPROP),
    "adagrad": ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.2}),
    "adadelta": ("Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-3}),
    "asgd": ("ASGD", {"lr": 0.1, "lambd": 0.01, "t0": 3.0}),
    "rprop": ("Rprop", {"lr": 0.1}),
}
"""Label -> the class in ``torch.optim``, and options."""
ALONE = {"nadam", "radam", "adamax", "asgd", "rprop"}
"""Of these, the ones that read their memory as numbers."""
FIXED = {"asgd", "rprop"}
"""The ones whose learning rate cannot be learned."""
OURS = {
    "momentum": lambda: optimizers.make("momentum", lr=0.1, momentum=0.9, weight_decay=0.1, learn=("lr",)),
    "adam": lambda: optimizers.make("adam", lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, learn=("lr",)),
    "adamw": lambda: optimizers.make("adamw", lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, learn=("lr",)),
    "nadam": lambda: optimizers.make("nadam", lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, learn=("lr",)),
    "rmsprop, centered": lambda: optimizers.make(
        "rmsprop", lr=0.1, alpha=0.9, eps=1e-2, momentum=0.5, centered=True, learn=("lr",)
    ),
}
"""The same in this library."""


def torch_optim(label: str, **more: Any) -> UpdateRule:
    kind, options = TORCH[label]
    return TorchOptim(kind.lower(), **options, **more)


def by_higher(label: str, **more: Any) -> UpdateRule:
    kind, options = TORCH[label]
    with warnings.catch_warnings():  # higher's own, about some of them
        warnings.filterwarnings("ignore", "Differentiable ", UserWarning)
        return HigherRule(getattr(torch.optim, kind), **options, **more)


HIGHER = (
    "sgd",
    "momentum",
    "adam, no eps",
    "adamax",
    "rmsprop",
    "rmsprop, centered",
    "adagrad",
    "adadelta",
    "asgd",
    "rprop",
)
"""What it has; its Adam puts eps before the correction of the root, and so is torch's only without."""


def steps(label: str, count: int = 8) -> tuple[list[Params], list[Params]]:
    """Return gradients, one coordinate's always zero, and where ``torch.optim`` itself goes by them."""
    generator = torch.Generator().manual_seed(3)
    start = {k: torch.randn(s, generator=generator) for k, s in SHAPES.items()}
    grads = [{k: torch.randn(s, generator=generator) for k, s in SHAPES.items()} for _ in range(count)]
    for grad in grads:
        grad["bias"][0] = 0.0
    params = {k: torch.nn.Parameter(p.clone()) for k, p in start.items()}
    kind, options = TORCH[label]
    optimizer = getattr(torch.optim, kind)(params.values(), foreach=False, **options)
    path = [start]
    for grad in grads:
        for k, p in params.items():
            p.grad = grad[k].clone()
        optimizer.step()
        path.append({k: p.detach().clone() for k, p in params.items()})
    return grads, path


def require_path(rule: UpdateRule, grads: list[Params], path: list[Params], tolerance: float = 1e-12) -> None:
    theta, params = rule.init_theta(torch.Generator()), path[0]
    params, state = rule.init(theta, params)
    nothing = torch.zeros(())
    for grad, wanted in zip(grads, path[1:], strict=True):
        given = (theta, grad, state, params)
        before = tree.tree_map(torch.clone, given)
        deltas, after = rule.update(*given, nothing)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(given), tree.leaves(before), strict=True))
        params, state = {k: p + deltas[k] for k, p in params.items()}, tree.arrange(after, state)
        for key, p in params.items():
            torch.testing.assert_close(p, wanted[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("learned", [False, True], ids=["constant", "learned"])
@pytest.mark.parametrize("label", TORCH)
def test_functional_optimizers_step_as_torch_does_and_leave_what_they_are_given(label: str, learned: bool) -> None:
    if learned and label in FIXED:
        with pytest.raises(ValueError, match="its memory holds the learning rate"):
            torch_optim(label, learn=("lr",))
        return
    require_path(torch_optim(label, learn=("lr",) if learned else ()), *steps(label))


@pytest.mark.parametrize("label", HIGHER)
def test_what_higher_differentiates_steps_as_torch_does(label: str) -> None:
    require_path(by_higher(label), *steps(label))


def estimate(rule: UpdateRule, chunk_size: int = 1) -> tuple[InnerLoop, Theta, Theta]:
    """Return a loop from a learned start, its theta, and the meta-gradient over three tasks."""
    started = optimizers.make("learned-init", rule=rule, template=template(FAMILY))
    loop = InnerLoop(FAMILY, started, Execution(chunk_size))
    theta = loop.init_theta(torch.Generator().manual_seed(0))
    return loop, theta, Unrolled(4).estimate(loop, theta, FinalLoss(), loop.start(sample(FAMILY, 3))).grads


TORCHOPT: dict[str, Callable[[], Any]] = {
    "sgd": lambda: torchopt.sgd(1.0),
    "momentum": lambda: torchopt.sgd(1.0, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda: torchopt.sgd(1.0, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda: torchopt.adam(1.0, (0.8, 0.9), 1e-3, 0.1),
    "adamw": lambda: torchopt.adamw(1.0, (0.8, 0.9), 1e-3, 0.1),
    "radam": lambda: torchopt.radam(1.0, (0.8, 0.9), 1e-3, 0.1),
    "adamax": lambda: torchopt.adamax(1.0, (0.8, 0.9), 1e-3, 0.1),
    "rmsprop": lambda: torchopt.rmsprop(1.0, weight_decay=0.1, eps=1e-2),
    "adadelta": lambda: torchopt.adadelta(1.0, 0.8, 1e-3),
}


@pytest.mark.parametrize("label", TORCHOPT)
def test_torchopt_steps_as_torch_does(label: str) -> None:
    require_path(TorchOpt(TORCHOPT[label](), lr=TORCH[label][1]["lr"]), *steps(label))


def torch_opt(label: str) -> UpdateRule:
    return TorchOpt(TORCHOPT[label](), lr=TORCH[label][1]["lr"])


THEIRS: dict[str, Callable[[], UpdateRule]] = {
    **{f"torch: {k}": lambda k=k: torch_optim(k, learn=() if k in FIXED else ("lr",)) for k in TORCH},
    **{f"higher: {k}": lambda k=k: by_higher(k, learn=() if k in FIXED else ("lr",)) for k in HIGHER},
    "higher: all of sgd": lambda: HigherRule(
        torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1,
        learn=("lr", "momentum", "dampening", "weight_decay"),
    ),
    **{f"torchopt: {k}": lambda k=k: torch_opt(k) for k in TORCHOPT},
    "torchopt: a schedule": lambda: TorchOpt(torchopt.adam(torchopt.schedule.linear_schedule(0.1, 0.01, 5, 0))),
}  # fmt: skip
NUMBERS = {*(f"torch: {k}" for k in ALONE), *(k for k in THEIRS if k.startswith("higher")), "torchopt: radam"}
"""What reads tensors as numbers, and is run task by task."""


@pytest.mark.parametrize("name", THEIRS)
def test_meta_gradients_are_finite_differences(name: str) -> None:
    loop, theta, grads = estimate(THEIRS[name]())
    tasks, generator = sample(FAMILY, 3), torch.Generator().manual_seed(1)
    direction = {k: torch.randn(x.shape, generator=generator) for k, x in theta.items()}

    def value(scale: float) -> Tensor:
        moved = {k: x + scale * direction[k] for k, x in theta.items()}
        return loop.losses(moved, loop.run(moved, loop.start(tasks), 4, Tape.NONE).end, "valid").mean()

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    found = torch.stack([(grads[k] * direction[k]).sum() for k in theta]).sum()
    assert abs(float(found)) > 1e-3
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in THEIRS if name.partition(": ")[2] in OURS])
def test_meta_gradients_are_those_of_the_same_rule_here(name: str) -> None:
    _, _, found = estimate(THEIRS[name]())
    _, _, expected = estimate(OURS[name.partition(": ")[2]]())
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", THEIRS)
def test_tasks_together_are_tasks_alone_or_refused(name: str) -> None:
    rule = THEIRS[name]()
    if name in NUMBERS:
        with pytest.raises(ValueError, match="chunk_size=1"):
            estimate(rule, 3)
        return
    alone, together = estimate(rule)[2], estimate(rule, 3)[2]
    for key, grad in alone.items():
        torch.testing.assert_close(together[key], grad, rtol=1e-10, atol=1e-12)


ROOTS = {"adam", "adamw", "nadam", "radam", "rmsprop", "adagrad"}
"""Of torch, those that divide by the root of a mean that starts at zero."""
UNTOUCHED: dict[str, tuple[Callable[[], UpdateRule], bool]] = {
    **{
        f"torch: {k}": (lambda k=k: TorchOptim(k, lr=0.1), k in ROOTS)
        for k in {kind.lower() for kind, _ in TORCH.values()}
    },
    **{f"here: {k}": (lambda k=k: optimizers.make(k, lr=0.1), False) for k in ("adam", "adamw", "nadam", "rmsprop")},
    "higher: Adam": (lambda: HigherRule(torch.optim.Adam, lr=0.1), False),
    "higher: Adagrad": (lambda: HigherRule(torch.optim.Adagrad, lr=0.1), False),
    "higher: RMSprop, centered": (lambda: by_higher("rmsprop, centered"), True),
    "torchopt: adam": (lambda: TorchOpt(torchopt.adam(0.1)), True),
    "torchopt: adam, eps_root": (lambda: TorchOpt(torchopt.adam(0.1, eps_root=1e-12)), False),
}  # fmt: skip
"""Rule -> whether its derivative is NaN at a coordinate that never had a gradient."""


@pytest.mark.parametrize("name", sorted(UNTOUCHED))
def test_derivatives_at_a_coordinate_that_never_had_a_gradient(name: str) -> None:
    make, undefined = UNTOUCHED[name]
    rule, x = make(), torch.ones(2, requires_grad=True)
    theta = rule.init_theta(torch.Generator())
    params, state = rule.init(theta, {"x": x})
    for _ in range(8):  # RAdam has no root in the first of them
        grad = {"x": torch.stack([params["x"][0] ** 3, params["x"][1] * 0])}
        deltas, state = rule.update(theta, grad, state, params, torch.zeros(()))
        params = {"x": params["x"] + deltas["x"]}
    slope = torch.autograd.grad(params["x"].sum(), x)[0]
    assert slope.isnan().tolist() == [False, undefined]


def test_clipping_in_torchopt_is_a_constant_to_it_and_is_for_single_tasks() -> None:
    chain = torchopt.combine.chain(torchopt.clip.clip_grad_norm(0.5), torchopt.sgd(1.0))
    theta, params = {}, {"x": torch.tensor([3.0, 4.0], requires_grad=True)}
    rule = TorchOpt(chain)
    params, state = rule.init(theta, params)
    deltas, _ = rule.update(theta, params, state, params, torch.zeros(()))
    torch.testing.assert_close(deltas["x"], torch.tensor([-0.3, -0.4]), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(deltas["x"][0], params["x"])
    torch.testing.assert_close(slope, torch.tensor([-0.1, 0.0]), rtol=1e-6, atol=0)  # and not -0.1 (1 - 0.36)
    with pytest.raises(ValueError, match="chunk_size=1"):
        estimate(rule, 3)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an unknown name": (lambda: TorchOptim("adan"), ValueError, "did you mean 'adam'"),
    "no functional form": (lambda: TorchOptim("lbfgs"), ValueError, "have no functional form"),
    "fused": (lambda: TorchOptim("adam", fused=True), TypeError, "fused kernel writes over"),
    "foreach": (lambda: TorchOptim("sgd", lr=0.1, foreach=True), TypeError, "refused by autograd"),
    "capturable": (lambda: HigherRule(torch.optim.Adam, capturable=True), TypeError, "CUDA graphs"),
    "differentiable": (lambda: TorchOptim("adam", differentiable=True), TypeError, "a rule always is"),
    "an unknown option": (lambda: TorchOptim("adam", momentum=0.9), TypeError, "momentum"),
    "a value torch refuses": (lambda: TorchOptim("adam", lr=-1.0), ValueError, "Invalid learning rate"),
    "a tensor for a rate": (lambda: TorchOptim("adam", lr=torch.tensor(0.1)), TypeError, "learn=\\('lr',\\)"),
    "a beta learned": (lambda: TorchOptim("adam", learn=("beta1",)), ValueError, "plain numbers"),
    "learn is a string": (lambda: TorchOptim("adam", learn="lr"), TypeError, "tuple of names"),  # pyright: ignore
    "dampening": (lambda: TorchOptim("sgd", momentum=0.9, dampening=0.1), ValueError, "leaves it out at the first"),
    "lr_decay": (lambda: TorchOptim("adagrad", lr_decay=0.1), ValueError, "reads the step as a plain number"),
    "higher has none": (lambda: HigherRule(torch.optim.AdamW), TypeError, "no differentiable version of 'AdamW'"),
    "no optimizer": (lambda: HigherRule("adam"), TypeError, "no differentiable version"),  # pyright: ignore
    "higher's pairs": (lambda: HigherRule(torch.optim.Adam, learn=("betas",)), ValueError, "parts of pairs"),
    "higher's ASGD": (lambda: by_higher("asgd", learn=("lr",)), ValueError, "out of the graph"),
    "an optimizer with parameters": (
        lambda: TorchOpt(torchopt.Adam([torch.zeros(1, requires_grad=True)], 0.1)), TypeError, "got a Adam",
    ),
    "momentum that remembers": (
        lambda: TorchOpt(torchopt.sgd(0.1, momentum=0.9, dampening=0.5)), ValueError, "remembers first_call",
    ),
    "a factor that is none": (lambda: TorchOpt(torchopt.sgd(0.1), lr=float("nan")), ValueError, "not a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_when_it_is_made(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()
