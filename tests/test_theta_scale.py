"""Scales of meta-parameters: what says them, what checks them, and what a meta-optimizer does on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import FLOAT, Quadratic, template
from test_resume import LAST, Killed, Killer, same
from torch import Tensor, nn

from learnedopt import (
    ARUBA,
    DualAveraging,
    Execution,
    FinalLoss,
    FollowTheLeader,
    InnerLoop,
    InnerObjective,
    MetaTrainer,
    PerName,
    SumOfLosses,
    Tape,
    TaskFamily,
    TaskLoss,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.tree import Params
from learnedopt.meta_optimizers.guess_and_grow import GuessAndGrow
from learnedopt.optimizers.bases.convex_sets import Ball
from learnedopt.optimizers.bases.wrapper import Wrapper
from learnedopt.plug_in.hyper import HyperOptimizer
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import Trackers

pytestmark = pytest.mark.usefixtures("float64")

MetaOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
SCALE: dict[str, float | Tensor] = {"rate": 0.25, "tilt": torch.tensor([4.0, 0.5, 2.0, 1.0, 0.1], dtype=FLOAT)}
"""One number, and one for each entry; ``plain`` is left out."""


class Sloped(UpdateRule):
    """Descent at a learned rate with learned additions; its scales are what it is given."""

    def __init__(self, scale: Any = SCALE) -> None:
        self.scale = scale

    def init_theta(self, generator: torch.Generator) -> Theta:
        tilt = torch.linspace(-0.2, 0.3, 5, dtype=FLOAT)
        one = {"rate": torch.tensor(0.1, dtype=FLOAT), "plain": torch.tensor(0.3, dtype=FLOAT)}
        return {"rate": one["rate"], "tilt": tilt, "plain": one["plain"]}

    def theta_scale(self) -> dict[str, float | Tensor]:
        return self.scale

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        tilt = {"w": theta["tilt"][:4].reshape(2, 2), "b": theta["tilt"][4:]}
        return {k: -theta["rate"] * g + tilt[k] * (theta["plain"] * g).tanh() for k, g in grads.items()}, state


class Weighed(InnerObjective):
    """The loss times a learned factor on a scale of its own."""

    def __init__(self, scale: Any = None) -> None:
        self.scale: dict[str, float | Tensor] = {"factor": 3.0} if scale is None else scale

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"factor": torch.tensor(0.9, dtype=FLOAT)}

    def theta_scale(self) -> dict[str, float | Tensor]:
        return self.scale

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return theta["factor"] * family.loss(params, batch)


def loop_of(scale: Any = SCALE, inner: InnerObjective | None = None) -> InnerLoop:
    return InnerLoop(Quadratic(), Sloped(scale), Execution(chunk_size=8), inner or TaskLoss())


def trained(loop: InnerLoop, meta_optimizer: MetaOptimizer, steps: int = 6, **options: Any) -> Theta:
    settings: dict[str, Any] = {"num_tasks": 2, "tracker": None, **options}
    return MetaTrainer(loop, Unrolled(3), FinalLoss(), meta_optimizer, **settings).run(steps).theta


def full(scale: dict[str, float | Tensor], theta: Theta) -> Theta:
    return {k: torch.as_tensor(scale.get(k, 1.0), dtype=FLOAT).expand(v.shape) for k, v in theta.items()}


# What a loop says


def test_a_loop_has_the_rules_scales_and_the_inner_objectives_and_ones_for_the_rest() -> None:
    loop = loop_of(inner=Weighed())
    theta = loop.init_theta(torch.Generator())
    scale = loop.theta_scale(theta)
    assert [*scale] == [*theta]
    assert {k: s.tolist() for k, s in scale.items()} == {
        "rate": 0.25, "tilt": [4.0, 0.5, 2.0, 1.0, 0.1], "plain": 1.0, "factor": 3.0
    }  # fmt: skip
    assert all((theta[k] * s).shape == theta[k].shape for k, s in scale.items())
    narrow = loop.theta_scale({k: v.float() for k, v in theta.items()})
    assert {s.dtype for s in narrow.values()} == {torch.float32} and {s.dtype for s in scale.values()} == {FLOAT}
    scale.clear()  # what is returned is the caller's
    assert [*loop.theta_scale(theta)] == [*theta]


ALWAYS_SCALED = ("normalised", "normalised-mlp", "normalised-lstm", "general", "tensor-gru", "rnnprop", "celo2")
"""Rules of which nothing was published before they had scales."""


def test_scales_are_none_by_default() -> None:
    family = Quadratic()
    for name in optimizers.names():
        rule = optimizers.example(name, template(family))
        if name in ALWAYS_SCALED:
            assert rule.theta_scale().keys() <= rule.init_theta(torch.Generator()).keys() and rule.theta_scale()
            continue
        said = {"lr": 0.3} if name == "step-rates" else {}
        assert rule.theta_scale() == said, f"{name}: what was published with it would be another training"
    loop = InnerLoop(family, optimizers.make("sgd"))
    assert loop.theta_scale({"lr": torch.tensor(0.1)})["lr"] == 1 and TaskLoss().theta_scale() == {}


BAD: dict[str, tuple[Any, str]] = {
    "unknown": ({"rat": 0.1}, r"Sloped\.theta_scale names \['rat'\].*did you mean 'rate'"),
    "the other's": ({"factor": 0.1}, r"Sloped\.theta_scale names \['factor'\]"),
    "zero": ({"rate": 0.0}, r"theta_scale\['rate'\] must be positive and finite .* got 0\.0"),
    "negative": ({"rate": -1}, "must be positive and finite .* got -1"),
    "nan": ({"rate": float("nan")}, "must be positive and finite"),
    "infinite": ({"rate": float("inf")}, "must be positive and finite"),
    "vanishing": ({"rate": torch.tensor(1e-320).double().item() / 1e10}, "must be positive and finite"),
    "one entry": ({"tilt": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])}, r"theta_scale\['tilt'\] must be positive"),
    "shape": ({"tilt": torch.ones(4)}, r"of shape \(4,\); return a number, or a .* of its shape, \(5,\)"),
    "larger": ({"rate": torch.ones(2)}, r"of shape \(2,\); return a number, or a .* of its shape, \(\)"),
    "integers": ({"tilt": torch.ones(5, dtype=torch.int64)}, r"torch\.int64 of shape \(5,\)"),
    "a truth value": ({"rate": True}, "is True; return a number"),
    "a word": ({"rate": "large"}, "is 'large'; return a number"),
    "no dict": ([0.1], "must return a dict of scales by name, got list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_scale_that_cannot_be_is_refused_before_the_first_step(case: str) -> None:
    scale, message = BAD[case]
    loop = loop_of(scale, Weighed())
    with pytest.raises(ValueError, match=message):
        loop.theta_scale(loop.init_theta(torch.Generator()))
    with pytest.raises(ValueError, match=message):
        MetaTrainer(loop, Unrolled(1), FinalLoss(), tracker=None)


def test_an_inner_objectives_scales_are_of_its_own_names() -> None:
    with pytest.raises(ValueError, match=r"Weighed\.theta_scale names \['rate'\]"):
        MetaTrainer(loop_of(inner=Weighed({"rate": 0.1})), Unrolled(1), FinalLoss(), tracker=None)
    with pytest.raises(ValueError, match="this theta is not one of Sloped"):
        loop_of().theta_scale({"rate": torch.tensor(0.1)})


LIKE = template(Quadratic())
WRAPPERS: dict[str, tuple[Callable[[], UpdateRule], dict[str, float | Tensor]]] = {
    "wrapper": (lambda: Wrapper(Sloped()), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}),
    "clip": (lambda: optimizers.Clip(Sloped(), max_norm=1.0), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}),
    "averaged": (lambda: optimizers.Averaged(Sloped()), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}),
    "recorded": (lambda: optimizers.Recorded(Sloped(), 3), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}),
    "scheduled": (lambda: optimizers.Scheduled(Sloped()), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}),
    "projected": (lambda: optimizers.Projected(Sloped(), Ball(9.0)), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}),
    "learned start": (
        lambda: optimizers.LearnedInit(Sloped(), LIKE), {"rule/rate": 0.25, "rule/tilt": SCALE["tilt"]}
    ),
    # A logarithm's size is not the rate's.
    "reparametrized": (lambda: optimizers.Reparametrized(Sloped(), {"rate": "log"}), {"rule/tilt": SCALE["tilt"]}),
    "partition": (
        lambda: optimizers.Partition({"a": ("w", Sloped({"rate": 5.0})), "b": ("*", Sloped())}),
        {"a/rate": 5.0, "b/rate": 0.25, "b/tilt": SCALE["tilt"]},
    ),
    "of wrappers": (
        lambda: optimizers.LearnedInit(optimizers.Clip(Sloped(), max_norm=1.0), LIKE),
        {"rule/rule/rate": 0.25, "rule/rule/tilt": SCALE["tilt"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_hand_scales_on(name: str) -> None:
    make, expected = WRAPPERS[name]
    loop = InnerLoop(Quadratic(), make(), horizon=9)
    theta = loop.init_theta(torch.Generator())
    found = loop.theta_scale(theta)
    wanted = full(expected, theta)
    assert all(torch.equal(found[k].expand(theta[k].shape), wanted[k]) for k in theta) and expected.keys() <= {*theta}


def test_every_wrapper_is_walked() -> None:
    public = [getattr(optimizers, name) for name in optimizers.__all__ if name[0].isupper()]
    kinds = {x for x in public if isinstance(x, type) and issubclass(x, Wrapper)}
    assert kinds <= {type(make()) for make, _ in WRAPPERS.values()} and len(kinds) >= 6


# What a meta-optimizer does on them


NUMBERS: dict[str, float | Tensor] = {"rate": 0.25, "tilt": 3.0}


def sgd(scale: float) -> MetaOptimizer:
    return lambda params: torch.optim.SGD(params, 0.05 * scale**2, momentum=0.8)


def adam(scale: float) -> MetaOptimizer:
    # It adds eps to the root of phi's squared gradients, which is theta's times the scale.
    return lambda params: torch.optim.Adam(params, 0.05 * scale, eps=1e-3 / scale)


@pytest.mark.parametrize("kind", [sgd, adam], ids=["sgd", "adam"])
def test_a_step_on_scales_is_the_step_in_theta_at_another_rate(kind: Callable[[float], MetaOptimizer]) -> None:
    theta = loop_of({}).init_theta(torch.Generator())
    found = trained(loop_of(NUMBERS), kind(1.0))
    expected = trained(loop_of({}), PerName({k: kind(float(NUMBERS.get(k, 1.0))) for k in theta}))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert all((found[k] - v).abs().max() > 1e-3 for k, v in theta.items())


def test_every_entry_has_its_own_scale() -> None:
    scale = full(SCALE, loop_of().init_theta(torch.Generator()))
    found, start = trained(loop_of(), lambda p: torch.optim.SGD(p, 0.05), 1), loop_of().init_theta(torch.Generator())
    plain = trained(loop_of({}), lambda p: torch.optim.SGD(p, 0.05), 1)
    for k, v in start.items():
        torch.testing.assert_close(found[k] - v, scale[k].square() * (plain[k] - v), rtol=1e-12, atol=1e-15)


def test_the_length_of_the_gradient_is_phis(tmp_path: Path) -> None:
    def first(scale: Any, limit: float | None) -> tuple[Theta, float]:
        trainer = MetaTrainer(
            loop_of(scale), Unrolled(3), FinalLoss(), lambda p: torch.optim.SGD(p, 1.0),
            JsonLinesTracker(tmp_path / f"{len(scale)}-{limit}.jsonl"), num_tasks=2, max_grad_norm=limit,
        )  # fmt: skip
        theta = trainer.run(1).theta
        return theta, read_metrics(tmp_path / f"{len(scale)}-{limit}.jsonl")[-1]["grad_norm"]

    start = loop_of().init_theta(torch.Generator())
    grads = {k: start[k] - v for k, v in first({}, None)[0].items()}
    scale = full(SCALE, start)
    norm = torch.cat([(g * scale[k]).reshape(-1) for k, g in grads.items()]).norm()
    clipped, logged = first(SCALE, 0.01)
    assert logged == pytest.approx(float(norm), rel=1e-10) and norm > 0.02
    for k, v in start.items():  # each entry of phi moves by its share of 0.01
        torch.testing.assert_close(v - clipped[k], scale[k].square() * grads[k] * (0.01 / norm), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("scale", [{}, {"rate": 1.0, "tilt": torch.ones(5, dtype=FLOAT)}], ids=["none", "ones"])
def test_without_scales_theta_itself_is_moved(scale: Any) -> None:
    made: list[Tensor] = []

    def kept(params: list[Tensor]) -> torch.optim.Optimizer:
        made.extend(params)
        return torch.optim.Adam(params, 0.05)

    trainer = MetaTrainer(loop_of(scale), Unrolled(3), FinalLoss(), kept, None, num_tasks=2)
    assert all(p is v for p, v in zip(made, trainer.theta.values(), strict=True))
    assert same(trainer.run(4).theta, trained(loop_of({}), kept, 4))


class Far(TaskFamily):
    """``(x/0.001 - 1)² + (y/10 + 1)²`` from 0: of its coordinates one lives at 1e-3 and the other at 10."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        return {"x": torch.zeros(num_tasks)}

    def init_params(self, tasks: Any) -> Params:
        return {"x": tasks["x"], "y": tasks["x"]}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        return tasks

    def loss(self, params: Params, batch: Any) -> Tensor:
        return (params["x"] / 1e-3 - 1).square() + (params["y"] / 10 + 1).square()


class At(UpdateRule):
    """Goes where theta is."""

    def __init__(self, scale: dict[str, float | Tensor]) -> None:
        self.scale = scale

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"x": torch.zeros(()), "y": torch.zeros(())}

    def theta_scale(self) -> dict[str, float | Tensor]:
        return self.scale

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: theta[k] - p for k, p in params.items()}, state


def test_a_learning_rate_means_the_same_for_small_and_large_entries() -> None:
    def left(lr: float, scale: dict[str, float | Tensor]) -> float:
        """Return how far the worse of the two is off in the end, in its own size."""
        loop = InnerLoop(Far(), At(scale))
        theta = MetaTrainer(loop, Unrolled(1), FinalLoss(), lambda p: torch.optim.Adam(p, lr), None).run(50).theta
        return max(abs(float(theta["x"]) / 1e-3 - 1), abs(float(theta["y"]) / 10 + 1))

    assert left(0.1, {"x": 1e-3, "y": 10.0}) < 0.05
    assert min(left(lr, {}) for lr in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)) > 0.5  # no rate serves both


# What keeps parameters of its own


@pytest.mark.parametrize("form", ["euclidean", "adagrad"])
def test_dual_averaging_works_on_scales(form: Any) -> None:
    def learner(lr: float) -> MetaOptimizer:
        return lambda p: DualAveraging(p, lr, "linear", "last-gradient", form, averaged=False)

    found = trained(loop_of(NUMBERS), learner(0.01))
    power = 2 if form == "euclidean" else 1
    rates = {k: learner(0.01 * float(NUMBERS.get(k, 1.0)) ** power) for k in found}
    expected = trained(loop_of({}), PerName(rates))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_guess_grows_by_the_same_factor_on_scales() -> None:
    def learner(params: list[Tensor]) -> torch.optim.Optimizer:
        factories = {"tilt": lambda p: torch.optim.SGD(p, 0.0), "rate": GuessAndGrow, "plain": GuessAndGrow}
        return PerName(factories)(params)

    found, expected = (trained(loop_of(scale), learner) for scale in (SCALE, {}))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)
    assert found["plain"] > 0.3 or found["rate"] > 0.1


OF_THETA_ITSELF: dict[str, MetaOptimizer] = {
    "follow the leader": FollowTheLeader,
    "aruba": ARUBA,
    "a member": PerName({"plain": torch.optim.Adam, "[rt]*": FollowTheLeader}),
    "by groups": lambda p: FollowTheLeader([{"params": p[:1]}, {"params": p[1:], "lr": 0.5}]),
}


@pytest.mark.parametrize("name", OF_THETA_ITSELF)
def test_what_takes_gradients_for_distances_of_theta_refuses_scales(name: str) -> None:
    with pytest.raises(ValueError, match=r"takes gradients for distances in theta itself.*\['rate', 'tilt'\]"):
        MetaTrainer(loop_of(), Unrolled(1), FinalLoss(), OF_THETA_ITSELF[name], None)
    with pytest.raises(ValueError, match="takes gradients for distances in theta itself"):
        HyperOptimizer([*variables().items()], Sloped(), meta_optimizer=OF_THETA_ITSELF[name])
    MetaTrainer(loop_of({}), Unrolled(1), FinalLoss(), OF_THETA_ITSELF[name], None)


def test_it_may_move_what_has_no_scale() -> None:
    own = PerName({"plain": FollowTheLeader, "[rt]*": lambda p: torch.optim.Adam(p, 0.01)})
    found, alone = trained(loop_of(), own, 1), trained(loop_of({}), own, 1)
    assert torch.equal(found["plain"], alone["plain"]) and not torch.equal(found["rate"], alone["rate"])


# What goes on


@pytest.mark.parametrize("kills", [[1], [3], [5, 5, 8]], ids=["at the start", "in an episode", "again and again"])
def test_a_training_on_scales_goes_on_to_the_bit(kills: list[int], tmp_path: Path) -> None:
    def make(folder: Path, kill_at: int | None = None) -> MetaTrainer:
        loop = loop_of(inner=Weighed())
        tracker = Trackers([JsonLinesTracker(folder / "metrics.jsonl"), Killer(kill_at)])
        return MetaTrainer(
            loop, Truncated(2, 6, Tape.FULL), SumOfLosses(), lambda p: torch.optim.Adam(p, 0.03), tracker, num_tasks=2,
            max_grad_norm=3.0, checkpoint=folder / "checkpoint.pt", checkpoint_every=2,
            scheduler=lambda outer: torch.optim.lr_scheduler.MultiStepLR(outer, [2, 5]),
        )  # fmt: skip

    expected = make(tmp_path / "whole").run(LAST)
    for kill_at in kills:
        with pytest.raises(Killed):
            make(tmp_path / "killed", kill_at).run(LAST)
    assert same(make(tmp_path / "killed").run(LAST), expected)
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed")]
    assert same(*states)
    assert same(states[0]["theta"], expected.theta)  # a file holds theta, whatever it was moved by


# The plug-in that learns


def variables() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {k: nn.Parameter(torch.randn(v.shape, generator=generator)) for k, v in LIKE.items()}


def test_a_rule_that_learns_while_it_trains_does_so_on_its_scales() -> None:
    def run(scale: Any, meta_optimizer: MetaOptimizer) -> Theta:
        params = variables()
        optimizer = HyperOptimizer([*params.items()], Sloped(scale), 2, SumOfLosses(), meta_optimizer)
        for _ in range(9):
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in params.values()]).sum()
            loss.backward()
            optimizer.step(loss=loss.detach())
        return optimizer.theta

    found = run(NUMBERS, lambda p: torch.optim.SGD(p, 1e-3))
    theta = Sloped({}).init_theta(torch.Generator())
    rates = {k: 1e-3 * float(NUMBERS.get(k, 1.0)) ** 2 for k in theta}
    expected = run({}, PerName({k: lambda p, lr=lr: torch.optim.SGD(p, lr) for k, lr in rates.items()}))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert all((found[k] - v).abs().max() > 1e-4 for k, v in theta.items())
