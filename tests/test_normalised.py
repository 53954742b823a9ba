"""The normalised rules and the general one against their formulas, written out a second time in numpy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from problems import FLOAT, Quadratic, TanhMLP, sample
from torch import Tensor

from learnedopt import InnerLoop, Rollout, Tape
from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import General, Normalised, NormalisedLSTM, NormalisedMLP

pytestmark = pytest.mark.usefixtures("float64")

RULES: dict[str, Any] = {
    "normalised": Normalised(),
    "normalised-mlp": NormalisedMLP(hidden=3),
    "normalised-lstm": NormalisedLSTM(units=2),
    "general": General(),
    "general without directions": General(orthogonalise=False),
}
every_rule = pytest.mark.parametrize("kind", RULES)


class Place(NamedTuple):
    """What the rules know of a tensor of ``SHAPES``, told by hand."""

    rate: int
    """Which of the four rates of ``Normalised``: first matrix, hidden bias or gain, later matrix, last bias."""
    kind: int
    """Which of the seven of ``General``: first, middle, last matrix, hidden bias, last bias, gain, embedding."""
    share: int | None = None
    """Which of its four shares; None of a vector."""
    fan_in: int = 1
    depth: float = 0.0


SHAPES = {
    "embedding.weight": (6, 3), "conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "norm.weight": (4,),
    "mid.weight": (5, 4), "head.weight": (2, 5), "head.bias": (2,),
}  # fmt: skip
PLACES = {
    "embedding.weight": Place(0, 6, 3, 3),
    "conv.weight": Place(0, 0, 0, 12),
    "conv.bias": Place(1, 3),
    "norm.weight": Place(1, 5),
    "mid.weight": Place(2, 1, 1, 4, 0.5),
    "head.weight": Place(2, 2, 2, 5, 1.0),
    "head.bias": Place(3, 4),
}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


class Plain:
    """A run of ``num_steps`` steps of one task, tensor by tensor; ``step`` returns where the next gradient is taken."""

    def __init__(self, rule: Any, theta: Theta, params: Params, num_steps: int) -> None:
        self.rule, self.num_steps, self.taken = rule, num_steps, 0
        self.theta = {k: v.numpy() for k, v in theta.items()}
        self.at = {k: p.numpy() for k, p in params.items()}
        self.average = dict(self.at)
        self.sums = {k: [np.zeros(p.shape) for _ in range(3)] for k, p in self.at.items()}
        self.memory = {k: [np.zeros((p.size, getattr(rule, "units", 0))) for _ in range(2)] for k, p in self.at.items()}

    def step(self, grads: Params) -> dict[str, np.ndarray]:
        theta, general = self.theta, isinstance(self.rule, General)
        long = math.log(self.num_steps / 150) if general else 0.0
        progress, blend = self.taken / self.num_steps, sigmoid(theta["averaging"][1])
        r = np.exp(theta["averaging"][0]) - 1
        longer = theta["length"][1] * long if general else 0.0
        keep = sigmoid(theta["decay"] + np.array([0, longer, longer]))
        knots = [0, 0.04, 0.12, 0.3, 0.6, 0.85, 1]
        rate = theta["log_rate"] + np.interp(progress, knots, theta["schedule"])
        self.taken += 1
        for name, grad in grads.items():
            g = grad.numpy()
            self.sums[name] = [
                k * s + (1 - k) * x for k, s, x in zip(keep, self.sums[name], (g, g, g * g), strict=True)
            ]
            m1, m2, v = (s / (1 - k**self.taken) for s, k in zip(self.sums[name], keep, strict=True))
            z = (self.at[name] - blend * self.average[name]) / (1 - blend)
            move = self.general if general else self.normalised
            z = z - move(name, rate, z, np.stack([g, m1, m2]), v, progress, long)
            x = self.average[name] + (1 + r) / (self.taken + r) * (z - self.average[name])
            self.average[name], self.at[name] = x, z + blend * (x - z)
        return self.at

    def normalised(self, name: str, rate: Any, z: Any, seen: Any, v: Any, progress: float, _: float) -> Any:
        theta, mean = self.theta, v.mean()
        v, mean = v + 1e-8 * mean, mean * (1 + 1e-8)
        outer, norm = v, theta["norm"]
        if v.ndim > 1:
            matrix = v.reshape(len(v), -1)
            outer = (np.outer(matrix.mean(1), matrix.mean(0)) / matrix.mean()).reshape(v.shape)
        bracket = np.tensordot(theta["mix"], seen, 1) / (
            v ** (norm[0] / 2) * outer ** (norm[1] / 2) * mean ** (norm[2] / 2)
        )
        bracket = bracket + np.exp(theta["weight_decay"]) * z
        if not isinstance(self.rule, Normalised):
            features = [*seen / np.sqrt(v), *seen / np.sqrt(mean), np.log(v / mean) / 4]
            features.append(z / np.sqrt((z * z).mean() + 1e-6))
            clocks = [2 * progress - 1, math.tanh((self.taken - 1) / 10 - 1)]
            columns = [f.clip(-5, 5).reshape(-1) for f in features] + [np.full(z.size, c) for c in clocks]
            direction, size = self.network(name, np.stack(columns, 1)).T
            bracket = bracket + (direction * np.exp(size)).reshape(z.shape)
        return np.exp(rate + theta["kind_rate"][PLACES[name].rate]) * bracket

    def network(self, name: str, features: Any) -> Any:
        theta = self.theta
        if isinstance(self.rule, NormalisedMLP):
            units = np.tanh(features @ theta["hidden/weight"].T + theta["hidden/bias"])
        else:
            units, cell = self.memory[name]
            gates = features @ theta["input/weight"].T + units @ theta["recurrent/weight"].T + theta["bias"]
            opened, kept, candidate, shown = np.split(gates, 4, axis=1)
            cell = sigmoid(kept) * cell + sigmoid(opened) * np.tanh(candidate)
            units = sigmoid(shown) * np.tanh(cell)
            self.memory[name] = [units, cell]
        return units @ theta["output/weight"].T + theta["output/bias"]

    def general(self, name: str, rate: Any, z: Any, seen: Any, v: Any, _: float, long: float) -> Any:
        theta, place, mean, a = self.theta, PLACES[name], v.mean(), self.theta["power"]
        matrix = place.share is not None
        inputs, outputs = math.log(place.fan_in / 64), math.log(z.shape[0] / 64)
        u = np.tensordot(theta["mix"], seen, 1) * (v + mean * np.exp(theta["eps"])) ** (-a / 2) * mean ** ((a - 1) / 2)
        if matrix and self.rule.orthogonalise:
            q = theta["size"] @ [1, inputs, outputs]
            turned = orthogonalised(np.tensordot(theta["orthogonal_mix"], seen, 1))
            u = u + sigmoid(theta["share"][place.share]) * (np.exp(q) * turned - u)
        size = math.log((z * z).mean() + 1e-6) / 2 + 2.5
        log = rate + theta["kind_rate"][place.kind] + theta["entries"][int(not matrix)] * size
        log = log + theta["length"][0] * long
        if matrix:
            log = log + theta["fan"] * inputs + theta["depth"] * (place.depth - 0.5)
        return np.exp(log) * (u + (np.exp(theta["weight_decay"]) * z if matrix else 0))


def orthogonalised(x: Any) -> Any:
    """Take four Newton-Schulz steps on the singular values alone."""
    left, s, right = np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(4):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = left * s @ right
    return (found / np.sqrt((found**2).mean())).reshape(x.shape)


def generic(rule: Any, seed: int = 0) -> Theta:
    generator = torch.Generator().manual_seed(seed)
    return {k: v.to(FLOAT) + 0.15 * normal(generator, *v.shape) for k, v in rule.init_theta(generator).items()}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=FLOAT)


def drawn(seed: int, scale: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: scale * normal(generator, *shape) for k, shape in SHAPES.items()}


def start(rule: Any, theta: Theta, params: Params, num_steps: int) -> Any:
    return rule.init_for(theta, params, torch.tensor(float(num_steps)))[1]


@every_rule
def test_the_steps_are_those_of_the_formula(kind: str) -> None:
    """Of one coordinate gradients are a thousand times smaller: what networks see of it is in part clamped."""
    rule, num_steps = RULES[kind], 7
    theta, params = generic(rule), drawn(1)
    plain, state = Plain(rule, theta, params, num_steps), start(rule, theta, params, num_steps)
    for i in range(num_steps):
        grads = drawn(2 + i, 3.0)
        grads["mid.weight"][1, 2] *= 1e-3
        progress = torch.tensor(i / num_steps)
        deltas, state = rule.update(theta, grads, state, params, torch.zeros(()), progress=progress)
        params = {k: p + deltas[k] for k, p in params.items()}
        expected = {k: torch.from_numpy(x) for k, x in plain.step(grads).items()}
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "rule", [Normalised(), NormalisedMLP(), NormalisedLSTM(), General()], ids=lambda rule: type(rule).__name__
)
def test_how_many_numbers_a_theta_is(rule: Any) -> None:
    counts = {"Normalised": 24, "NormalisedMLP": 130, "NormalisedLSTM": 886, "General": 42}
    assert sum(v.numel() for v in rule.init_theta(torch.Generator()).values()) == counts[type(rule).__name__]


# Where they start.


def run(rule: Any, theta: Theta, num_steps: int = 6, horizon: int = 6) -> Rollout:
    loop = InnerLoop(TanhMLP(), rule, horizon=horizon)
    return loop.run(theta, loop.start(sample(loop.family)), num_steps, Tape.NONE)


def assert_same_run(found: Rollout, expected: Rollout) -> None:
    assert torch.equal(found.losses, expected.losses)
    assert all(torch.equal(found.end.params[k], p) for k, p in expected.end.params.items())
    assert expected.losses[-1].sum() < expected.losses[0].sum()


@pytest.mark.parametrize("kind", ["normalised-mlp", "normalised-lstm"])
def test_a_network_starts_as_the_rule_without_one(kind: str) -> None:
    shared, base = generic(Normalised()), RULES["normalised"]
    theta = {**RULES[kind].init_theta(torch.Generator().manual_seed(0)), **shared}
    assert theta.keys() > shared.keys()
    assert_same_run(run(RULES[kind], theta), run(base, shared))
    theta["output/bias"] = theta["output/bias"] + 0.1
    assert not torch.equal(run(RULES[kind], theta).losses, run(base, shared).losses)


def test_the_general_rule_without_shares_is_the_one_without_directions() -> None:
    theta, base = generic(General()), RULES["general without directions"]
    shared = {k: theta[k] for k in base.init_theta(torch.Generator())}
    none = {**theta, "share": torch.full((4,), -math.inf)}
    assert_same_run(run(General(), none), run(base, shared))
    assert not torch.equal(run(General(), theta).losses, run(base, shared).losses)


# The horizon.


@every_rule
def test_a_longer_run_is_another_one(kind: str) -> None:
    theta = generic(RULES[kind])
    short, long = run(RULES[kind], theta, 4, 4), run(RULES[kind], theta, 4, 8)
    # The first steps are both at progress 0: the length itself is what only the general rule reads.
    first = torch.equal(short.losses[1], long.losses[1])
    assert torch.equal(short.losses[0], long.losses[0]) and first == ("general" not in kind)
    assert not torch.isclose(short.losses[-1], long.losses[-1], rtol=1e-6).any()


@pytest.mark.parametrize("kind", [kind for kind in RULES if "-" not in kind])
def test_a_schedule_is_a_factor_of_steps(kind: str) -> None:
    """Of rules without a network, which sees the clock as well."""
    rule = RULES[kind]
    theta, params, grads = generic(rule), drawn(0), drawn(1)
    state = start(rule, theta, params, 9)
    theta["schedule"] = torch.arange(7.0)

    def moved(progress: float) -> Tensor:
        deltas = rule.update(theta, grads, state, params, torch.zeros(()), progress=torch.tensor(progress))[0]
        return deltas["conv.bias"]

    for early, late, expected in ((0.0, 0.3, 3.0), (0.6, 1.0, 2.0), (0.6, 0.725, 0.5)):
        torch.testing.assert_close(moved(late) / moved(early), torch.full((4,), math.exp(expected)))


# Nothing to go by.


@every_rule
@pytest.mark.parametrize("zeros", ["gradients", "parameters", "both"])
def test_zeros_give_finite_values_and_derivatives(kind: str, zeros: str) -> None:
    rule = RULES[kind]
    theta = {k: v.requires_grad_() for k, v in generic(rule).items()}
    params = {k: (0.0 if zeros != "gradients" else 1.0) * p for k, p in drawn(0).items()}
    grads = {k: (0.0 if zeros != "parameters" else 1.0) * g for k, g in drawn(1, 0.01).items()}
    leaves = [*theta.values(), *(x.requires_grad_() for x in (*params.values(), *grads.values()))]
    state, at = start(rule, theta, params, 3), params
    for i in range(3):
        deltas, state = rule.update(theta, grads, state, at, torch.zeros(()), progress=torch.tensor(i / 3))
        at = {k: p + deltas[k] for k, p in at.items()}
    assert all(x.isfinite().all() for x in (*tree.leaves(state), *at.values()))
    total = torch.stack([p.square().sum() + p.sum() for p in at.values()]).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in found) and any(g.any() for g in found)
    if zeros == "both":
        assert not any(p.any() for p in at.values())


@every_rule
@pytest.mark.parametrize("size", ["1e-18", "1e-12", "1e12", "1e18"])
def test_tiny_and_huge_gradients_give_finite_steps_in_float32(kind: str, size: str) -> None:
    rule = RULES[kind]
    theta = {k: v.float() for k, v in generic(rule).items()}
    params, grads = ({k: x.float() for k, x in drawn(i, scale).items()} for i, scale in ((0, 1.0), (1, float(size))))
    state = start(rule, theta, params, 3)
    deltas, _ = rule.update(theta, grads, state, params, torch.zeros(()), progress=torch.zeros((), dtype=torch.float32))
    assert all(d.isfinite().all() for d in deltas.values())


@every_rule
@pytest.mark.parametrize("empty", ["0", "0x3", "3x0"])
def test_empty_tensors_change_nothing(kind: str, empty: str) -> None:
    rule = RULES[kind]
    theta, params, grads = generic(rule), drawn(0), drawn(1)
    name = "table.bias" if empty == "0" else "embedding.other"  # which the others' order leaves out
    nothing = {name: torch.zeros(*map(int, empty.split("x")))}
    found = []
    for own, g in ((params, grads), ({**params, **nothing}, {**grads, **nothing})):
        deltas, _ = rule.update(theta, g, start(rule, theta, own, 3), own, torch.zeros(()), progress=torch.zeros(()))
        found.append(deltas)
        assert {k: d.shape for k, d in deltas.items()} == {k: p.shape for k, p in own.items()}
    assert all(torch.equal(found[1][k], d) for k, d in found[0].items())


@every_rule
@pytest.mark.parametrize("first", ["float32", "float64"])
def test_tensors_may_differ_in_dtype(kind: str, first: str) -> None:
    """What is computed is computed in the widest of them."""
    rule, theta = RULES[kind], generic(RULES[kind])
    wide = {k: p.float().double() for k, p in drawn(0).items()}
    grads = {k: g.float().double() for k, g in drawn(1).items()}
    dtypes = {k: getattr(torch, first) if i < 3 else torch.float64 for i, k in enumerate(wide)}
    if first == "float64":
        dtypes = {k: torch.float32 if i >= 3 else torch.float64 for i, k in enumerate(wide)}
    mixed, mixed_grads = ({k: x.to(dtypes[k]) for k, x in each.items()} for each in (wide, grads))
    found, expected = (
        rule.update(theta, g, start(rule, theta, p, 3), p, torch.zeros(()), progress=torch.tensor(0.5))[0]
        for p, g in ((mixed, mixed_grads), (wide, grads))
    )
    assert {k: d.dtype for k, d in found.items()} == dtypes
    for k, d in expected.items():
        torch.testing.assert_close(found[k].double(), d, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["normalised-mlp", "normalised-lstm"])
def test_a_coordinate_without_a_gradient_gets_nothing_from_the_network(kind: str) -> None:
    """But for the decay, and it begins to where it has one for the first time."""
    rule, base = RULES[kind], RULES["normalised"]
    theta, params = generic(rule), drawn(0)
    grads = drawn(1, 0.01)
    grads["mid.weight"][0], grads["head.bias"][:] = 0, 0
    states = {r: start(r, theta, params, 5) for r in (rule, base)}
    for i in range(2):
        found, expected = {}, {}
        for r, deltas in ((rule, found), (base, expected)):
            moved, states[r] = r.update(theta, grads, states[r], params, torch.zeros(()), progress=torch.tensor(i / 5))
            deltas.update(moved)
        same = {k: found[k] == expected[k] for k in found}
        assert same.pop("head.bias").all() and same["mid.weight"][0].all() and not same.pop("mid.weight")[1:].any()
        assert not any(each.any() for each in same.values())
    grads["mid.weight"][0, 1] = 1e-9
    found, expected = (
        r.update(theta, grads, states[r], params, torch.zeros(()), progress=torch.tensor(0.4))[0]["mid.weight"][0]
        for r in (rule, base)
    )
    assert (found == expected).tolist() == [True, False, True, True]


# What is refused.

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no rate": (lambda: Normalised(lr=0.0), ValueError, "lr"),
    "a negative rate": (lambda: NormalisedMLP(lr=-0.1), ValueError, "lr"),
    "a rate that is no number": (lambda: NormalisedLSTM(lr="0.1"), TypeError, "lr"),  # pyright: ignore[reportArgumentType]
    "an infinite rate": (lambda: Normalised(lr=math.inf), ValueError, "lr"),
    "no hidden units": (lambda: NormalisedMLP(hidden=0), ValueError, "hidden"),
    "half a hidden unit": (lambda: NormalisedMLP(hidden=2.5), ValueError, "hidden"),  # pyright: ignore[reportArgumentType]
    "no units": (lambda: NormalisedLSTM(units=0), ValueError, "units"),
    "directions by count": (lambda: General(orthogonalise=4), TypeError, "orthogonalise=4 is neither True nor False"),  # pyright: ignore[reportArgumentType]
    "a dtype for bfloat16": (lambda: General(bfloat16="yes"), TypeError, "bfloat16='yes'"),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


@every_rule
def test_without_a_horizon_no_loop_begins(kind: str) -> None:
    with pytest.raises(ValueError, match=r"reads how far a run is.*horizon=T"):
        InnerLoop(Quadratic(), RULES[kind])


@every_rule
def test_every_number_of_theta_moves_a_run(kind: str) -> None:
    """Every entry, the schedule's at the knots that are close together included."""
    rule, num_steps = RULES[kind], 10
    theta = {k: v.requires_grad_() for k, v in generic(rule).items()}
    params = drawn(1)
    state = start(rule, theta, params, num_steps)
    for i in range(num_steps):
        progress = torch.tensor(i / (num_steps - 1))
        deltas, state = rule.update(theta, drawn(2 + i, 0.01), state, params, torch.zeros(()), progress=progress)
        params = {k: p + deltas[k] for k, p in params.items()}
    total = torch.stack([p.square().sum() for p in params.values()]).sum()
    for name, grad in zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True):
        assert grad.all(), name
