"""Few-shot methods as rules and estimators of the one engine: worked values, closed forms, and another library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import relative_error
from problems import TanhMLP, generic_theta, sample, template
from torch import Tensor, nn

from learnedopt import (
    BootstrappedTarget,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    InnerLoop,
    ModuleFamily,
    Params,
    TaskFamily,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
)

pytestmark = pytest.mark.usefixtures("float64")
START = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)


class Ray(TaskFamily):
    """``(w.x)^2 / 2`` for one point x of the support set and one of the query set."""

    def __init__(self, support: Tensor, query: Tensor) -> None:
        self.points = {"train": support, "valid": query}

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {"start": START.repeat(num_tasks, 1)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w": tasks["start"]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return {"x": self.points[split].repeat(len(tasks["start"]), 1)}

    def loss(self, params: Params, batch: Any) -> Tensor:
        return 0.5 * (params["w"] @ batch["x"]).square()


def meta_gradient(family: TaskFamily, rule: UpdateRule, estimator: GradientEstimator) -> Theta:
    loop = InnerLoop(family, rule)
    theta = {k: v.double() for k, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    carry = loop.start(family.sample(1, torch.Generator()))
    return estimator.estimate(loop, theta, FinalLoss(), carry).grads


@pytest.mark.parametrize(("estimator", "value"), [(FirstOrder(1), 9.7), (Unrolled(1), 9.409)])
def test_worked_values_with_the_support_point_as_query(estimator: GradientEstimator, value: float) -> None:
    rule = optimizers.make("maml", template={"w": START}, lr=0.01)
    found = meta_gradient(Ray(ONES, ONES), rule, estimator)
    torch.testing.assert_close(found["init/w"], value * ONES, rtol=1e-12, atol=0)


def test_worked_values_with_another_query_point() -> None:
    # By hand: one step leads to w = (2, 3, 5) - 0.01 * 10 * (1, 1, 1) = (1.9, 2.9, 4.9). On x = (1, -2, 3), w.x = 10.8,
    # so the gradient there is 10.8 x = (10.8, -21.6, 32.4), of which (1 - 0.01 * 11^T) takes 0.01 * 21.6 off each.
    query = torch.tensor([1.0, -2.0, 3.0])
    rule = optimizers.make("maml", template={"w": START}, lr=0.01)
    first = meta_gradient(Ray(ONES, query), rule, FirstOrder(1))["init/w"]
    exact = meta_gradient(Ray(ONES, query), rule, Unrolled(1))["init/w"]
    torch.testing.assert_close(first, torch.tensor([10.8, -21.6, 32.4]), rtol=1e-12, atol=0)
    torch.testing.assert_close(exact, torch.tensor([10.584, -21.816, 32.184]), rtol=1e-12, atol=0)


def test_meta_sgd_closed_form() -> None:
    support, query = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.3, 1.0, -1.0])
    rates = torch.tensor([0.05, 0.1, -0.02])
    rule = optimizers.make("meta-sgd", template={"w": START}, lr=0.1)
    family = Ray(support, query)
    theta = {"init/w": START, "rule/lr/w": rates}
    loop = InnerLoop(family, rule)
    found = Unrolled(1).estimate(loop, theta, FinalLoss(), loop.start(family.sample(1, torch.Generator()))).grads
    slope = (START @ support) * support
    end = START - rates * slope
    pull = (end @ query) * query
    torch.testing.assert_close(found["rule/lr/w"], -slope * pull, rtol=1e-12, atol=1e-14)
    hessian = torch.outer(support, support)
    expected = (torch.eye(3) - hessian @ torch.diag(rates)) @ pull
    torch.testing.assert_close(found["init/w"], expected, rtol=1e-12, atol=1e-14)


def test_rates_per_step_are_those_of_the_steps() -> None:
    family = TanhMLP()
    rule = optimizers.make("learned-rates", template=template(family), rates="step", lr=0.1, num_steps=2)
    rates = [torch.tensor([0.3, -0.1]), torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.1])]
    theta = dict(zip(("lr/w1", "lr/b1", "lr/w2"), rates, strict=True))
    loop = InnerLoop(family, rule)
    carry = loop.start(sample(family, 1))
    at = {k: p[0] for k, p in carry.params.items()}
    for step in range(3):
        point = {k: p.clone().requires_grad_() for k, p in at.items()}
        batch = {k: x[0] for k, x in family.batch(carry.tasks, step, "train").items()}
        slopes = torch.autograd.grad(family.loss(point, batch), [*point.values()])
        now = min(step, 1)
        at = {k: p - theta[f"lr/{k}"][now] * g for (k, p), g in zip(at.items(), slopes, strict=True)}
    end = loop.run(theta, carry, 3).end
    assert relative_error({k: p[0] for k, p in end.params.items()}, at) < 1e-14


@pytest.mark.parametrize(
    "options", [{"rates": "step"}, {"rates": "step", "num_steps": 0}, {"rates": "tensor", "num_steps": 3}]
)
def test_rates_per_step_need_their_number(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_steps="):
        optimizers.make("meta-sgd", template={"w": START}, **options)


def test_anil_moves_the_head_and_learns_the_body() -> None:
    family = TanhMLP()
    rule = optimizers.make("anil", template=template(family), head="w2", lr=0.3)
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    carry = loop.start(sample(family, 2))
    rollout = loop.run(theta, carry, 3)
    for name in ("w1", "b1"):
        assert torch.equal(rollout.end.params[name], theta[f"init/{name}"].expand_as(rollout.end.params[name]))
    assert (rollout.end.params["w2"] - theta["init/w2"]).abs().max() > 1e-3
    found = Unrolled(3).estimate(loop, theta, FinalLoss(), carry).grads

    # The same by MAML on the head alone, the body held in the loss.
    def final(theta: Theta) -> Tensor:
        values = []
        for task in range(2):
            body, head = {k: theta[f"init/{k}"] for k in ("w1", "b1")}, theta["init/w2"]
            for step in range(3):
                batch = {k: x[task] for k, x in family.batch(carry.tasks, step, "train").items()}
                loss = family.loss({**body, "w2": head}, batch)
                head = head - 0.3 * torch.autograd.grad(loss, head, create_graph=True)[0]
            batch = {k: x[task] for k, x in family.batch(carry.tasks, 3, "valid").items()}
            values.append(family.loss({**body, "w2": head}, batch))
        return torch.stack(values).mean()

    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    expected = dict(zip(leaves, torch.autograd.grad(final(leaves), [*leaves.values()]), strict=True))
    assert relative_error(found, expected) < 1e-12


def test_anil_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head='fc\.\*' matches none of the parameters \['w'\]"):
        optimizers.make("anil", template={"w": START}, head="fc.*")


def test_an_outer_step_of_reptile_interpolates_to_the_adapted_parameters() -> None:
    family, epsilon, rate = TanhMLP(), 0.3, 0.4
    rule = optimizers.make("maml", template=template(family), lr=rate)
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    carry = loop.start(sample(family, 1))
    objective = BootstrappedTarget(num_target_steps=5, step_size=rate, split="train")
    grads = Unrolled(0).estimate(loop, theta, objective, carry).grads
    adapted = loop.run(theta, carry, 5).end.params
    found = {k: theta[k] - epsilon * g for k, g in grads.items()}
    expected = {k: v + epsilon * (adapted[k.removeprefix("init/")][0] - v) for k, v in theta.items()}
    assert relative_error(found, expected) < 1e-12


def test_a_learned_optimizer_on_a_learned_start_adapts_and_learns() -> None:
    family = TanhMLP()
    lstm = {"name": "lstm", "options": {"hidden_size": 3, "output_scale": 0.1}}
    rule = optimizers.make("learned-init", template=template(family), rule=lstm)
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    carry = loop.start(sample(family, 2))
    estimator = Unrolled(3)
    found = estimator.estimate(loop, theta, FinalLoss(), carry)
    assert {"init/w1", "rule/readout/weight"} <= set(found.grads)
    for name in ("init/w1", "rule/readout/weight", "rule/lstm1/weight"):
        direction = torch.randn(theta[name].shape, generator=torch.Generator().manual_seed(1))
        ends = []
        for sign in (1, -1):
            moved = {**theta, name: theta[name] + sign * 1e-5 * direction}
            ends.append(loop.losses(theta, loop.run(moved, carry, 3).end, "valid").mean())
        slope = (ends[0] - ends[1]).item() / 2e-5
        assert (found.grads[name] * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert Truncated(3, 6).estimate(loop, theta, FinalLoss(), carry).carry is not None
    for _ in range(20):
        grads = estimator.estimate(loop, theta, FinalLoss(), carry).grads
        theta = {k: v - 0.2 * grads[k] for k, v in theta.items()}
    assert estimator.estimate(loop, theta, FinalLoss(), carry).loss < 0.8 * found.loss


class ConvNet(nn.Sequential):
    """Four blocks of 3x3 convolutions with batch statistics, and a linear layer."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        for channels in (1, 4, 4, 4):
            norm = nn.BatchNorm2d(4, track_running_stats=False)
            blocks += [nn.Conv2d(channels, 4, 3, stride=2, padding=1), norm, nn.ReLU()]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(4, 5))


def test_maml_on_a_convolutional_network_equals_higher() -> None:
    higher = pytest.importorskip("higher")
    generator = torch.Generator().manual_seed(4)
    drawn = {
        split: (torch.randn(5 * size, 1, 16, 16, generator=generator), torch.arange(5).repeat_interleave(size))
        for split, size in (("train", 1), ("valid", 3))
    }
    family = ModuleFamily(ConvNet, nn.functional.cross_entropy, lambda seed, step, split: drawn[split])
    carry = (loop := InnerLoop(family, _maml(family))).start(_one(family))
    theta = loop.rule.init_theta(torch.Generator())
    found = Unrolled(3).estimate(loop, theta, FinalLoss(), carry).grads

    module = ConvNet()
    module.load_state_dict({k.removeprefix("init/"): v for k, v in theta.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (moving, steps):
        for _ in range(3):
            steps.step(nn.functional.cross_entropy(moving(drawn["train"][0]), drawn["train"][1]))
        nn.functional.cross_entropy(moving(drawn["valid"][0]), drawn["valid"][1]).backward()
    expected = {f"init/{k}": p.grad for k, p in module.named_parameters()}
    # As one vector: the biases before a normalisation have no gradient but rounding.
    assert relative_error(*({"all": torch.cat([x[k].flatten() for k in found])} for x in (found, expected))) < 1e-10


def _one(family: TaskFamily) -> Tasks:
    return family.sample(1, torch.Generator().manual_seed(9))


def _maml(family: TaskFamily) -> UpdateRule:
    start = {k: p[0] for k, p in family.init_params(_one(family)).items()}
    return optimizers.make("maml", template=start, lr=0.2)
