"""Every registered inner objective against closed forms, finite differences and its own contract; and the registry."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional

import learnedopt
from learnedopt import (
    L2,
    DistilledData,
    InnerObjective,
    LearnedLoss,
    Params,
    Penalty,
    Proximal,
    TaskFamily,
    TaskLoss,
    Theta,
    WeightedExamples,
    inner_objectives,
)
from learnedopt.core import tree
from learnedopt.optimizers import SGD, Clip, LearnedInit

pytestmark = pytest.mark.usefixtures("float64")

NUM_EXAMPLES, NUM_CLASSES, NUM_TASKS = 12, 3, 4
TEMPLATE = {"weight": torch.zeros(NUM_CLASSES, 2, dtype=torch.float64), "bias": torch.zeros(3, dtype=torch.float64)}


class Blobs(TaskFamily):
    """Softmax regression on 5 of 12 points with 2 features; the batch says which ones they are."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        def normal(*shape: int) -> Tensor:
            return torch.randn(num_tasks, *shape, generator=generator)

        index = torch.stack([torch.randperm(NUM_EXAMPLES, generator=generator)[:5] for _ in range(num_tasks)])
        data = {"inputs": normal(5, 2), "targets": torch.arange(5).remainder(3).repeat(num_tasks, 1), "index": index}
        return {"data": data, "start": {"weight": normal(3, 2), "bias": normal(3)}}

    def init_params(self, tasks: Any) -> Params:
        return tasks["start"]

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        return tasks["data"]

    def outputs(self, params: Params, batch: Any) -> Tensor:
        return batch["inputs"] @ params["weight"].mT + params["bias"]

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])


class Line(Blobs):
    """The same points with one output each, and values for targets."""

    def outputs(self, params: Params, batch: Any) -> Tensor:
        return batch["inputs"] @ params["weight"][0] + params["bias"][0]

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        return {**tasks["data"], "targets": tasks["data"]["inputs"].sin().sum(-1)}

    def loss(self, params: Params, batch: Any) -> Tensor:
        return 0.5 * (self.outputs(params, batch) - batch["targets"]).square().mean()


@dataclass
class Case:
    """An inner objective on tasks of a family, with a theta at which nothing is zero by chance."""

    objective: InnerObjective
    family: TaskFamily
    theta: Theta
    params: Params
    batch: Any

    def one(self, task: int = 0) -> tuple[Params, Any]:
        return tree.squeeze(tree.narrow(self.params, task, task + 1)), tree.squeeze(
            tree.narrow(self.batch, task, task + 1)
        )

    def loss(self, theta: Theta, params: Params, batch: Any) -> Tensor:
        return self.objective.loss(theta, self.family, params, batch)


def case(objective: InnerObjective, family: TaskFamily | None = None) -> Case:
    """Return the objective at a theta that is moved away from its start, beside a learned start of a wrapped rule."""
    family, generator = family or Blobs(), torch.Generator().manual_seed(3)
    tasks = family.sample(NUM_TASKS, generator)
    theta = {
        **Clip(LearnedInit(SGD(0.1), TEMPLATE), 1.0).init_theta(generator),
        **objective.init_theta(generator),
    }
    theta = {k: v + 0.3 * torch.rand(v.shape, generator=generator) + 0.1 for k, v in theta.items()}
    return Case(objective, family, theta, family.init_params(tasks), family.batch(tasks, 0, "train"))


VARIANTS: dict[str, tuple[InnerObjective, TaskFamily]] = {
    "proximal, tensor": (Proximal(TEMPLATE, 0.7, per="tensor", learn=True), Blobs()),
    "proximal, coordinate": (Proximal(TEMPLATE, 0.7, per="coordinate", learn=True), Blobs()),
    "proximal, scalar, learned": (Proximal(TEMPLATE, 0.7, learn=True), Blobs()),
    "l2, tensor": (L2(TEMPLATE, 0.7, per="tensor"), Blobs()),
    "l2, coordinate": (L2(TEMPLATE, 0.7, per="coordinate"), Blobs()),
    "l2, fixed": (L2(TEMPLATE, 0.7, learn=False), Blobs()),
    "weighted-examples, squared": (WeightedExamples(NUM_EXAMPLES, "squared"), Line()),
    "learned-loss, values": (LearnedLoss(1, "values", (4, 3), "softplus", 0.5), Line()),
    "learned-loss, alone": (LearnedLoss(NUM_CLASSES, base=0.0), Blobs()),
}
ALL = [*inner_objectives.names(), *VARIANTS]
PENALIZED = [name for name in ALL if name.startswith(("proximal", "l2"))]


def named(name: str) -> Case:
    """Return the case of a registered name or of a variant; a name that is registered is enrolled by that alone."""
    if name in VARIANTS:
        return case(*VARIANTS[name])
    return case(inner_objectives.example(name, TEMPLATE, NUM_EXAMPLES, NUM_CLASSES, (2,)))


@pytest.fixture(params=ALL)
def each(request: pytest.FixtureRequest) -> Case:
    return named(request.param)


# Every inner objective.


def test_first_and_second_derivatives_are_those_of_differences(each: Case) -> None:
    params, batch = each.one()
    values = {**each.theta, **{f"x/{k}": p for k, p in params.items()}}
    values = {k: v.clone().requires_grad_() for k, v in values.items()}

    def loss(*moved: Tensor) -> Tensor:
        found = {**values, **dict(zip(names, moved, strict=True))}
        return each.loss(found, {k: found[f"x/{k}"] for k in params}, batch)

    names = [*values]
    reached = torch.autograd.grad(loss(*values.values()), [*values.values()], allow_unused=True)
    names = [name for name, g in zip(names, reached, strict=True) if g is not None]
    inputs = tuple(values[name] for name in names)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(loss, inputs, atol=1e-6, rtol=1e-5)


def test_theta_moves_the_gradient_of_the_inner_loss(each: Case) -> None:
    params, batch = each.one()
    own = {k: each.theta[k].clone().requires_grad_() for k in each.objective.init_theta(torch.Generator())}
    params = {k: p.clone().requires_grad_() for k, p in params.items()}
    value = each.loss({**each.theta, **own}, params, batch)
    gradients = torch.autograd.grad(value, [*params.values()], create_graph=True, allow_unused=True)
    length = torch.stack([g.square().sum() for g in gradients if g is not None]).sum()
    for name, g in zip(own, torch.autograd.grad(length, [*own.values()]) if own else (), strict=True):
        assert g.abs().max() > 1e-6, name  # raises, too, where there is no path at all


def test_tasks_together_are_tasks_one_by_one(each: Case) -> None:
    def gradient(params: Params, batch: Any) -> tuple[Params, Tensor]:
        return torch.func.grad_and_value(lambda p: each.loss(each.theta, p, batch))(params)

    together = vmap(gradient)(each.params, each.batch)
    for task in range(NUM_TASKS):
        torch.testing.assert_close(
            tree.squeeze(tree.narrow(together, task, task + 1)), gradient(*each.one(task)), rtol=1e-12, atol=1e-14
        )


def test_one_theta_a_task_is_the_same_as_each_alone(each: Case) -> None:
    thetas = {k: torch.stack([v * (1 + 0.1 * i) for i in range(NUM_TASKS)]) for k, v in each.theta.items()}
    together = vmap(each.loss)(thetas, each.params, each.batch)
    alone = [each.loss(tree.squeeze(tree.narrow(thetas, i, i + 1)), *each.one(i)) for i in range(NUM_TASKS)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-14)


def test_outside_the_familys_loss_counts(each: Case) -> None:
    params, batch = each.one()
    outer = each.objective.outer_loss(each.theta, each.family, params, batch)
    assert torch.equal(outer, each.family.loss(params, batch))


def test_the_configuration_makes_the_same_objective(each: Case) -> None:
    config = json.loads(json.dumps(inner_objectives.describe(each.objective)))
    built = inner_objectives.build(config)
    assert type(built) is type(each.objective)
    assert inner_objectives.describe(built) == config
    first, second = (o.init_theta(torch.Generator().manual_seed(1)) for o in (each.objective, built))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    params, batch = each.one()
    assert torch.equal(built.loss(each.theta, each.family, params, batch), each.loss(each.theta, params, batch))


@pytest.mark.parametrize("name", ALL)
def test_theta_is_made_where_the_generator_is(name: str) -> None:
    objective = named(name).objective
    template = {k: torch.empty_like(v, device="meta") for k, v in TEMPLATE.items()}
    if isinstance(objective, Proximal | L2):  # a template counts by shapes and types, not by where it lies
        options = {**inner_objectives.describe(objective)["options"], "template": template}
        objective = inner_objectives.make(inner_objectives.describe(objective)["name"], **options)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        theta = objective.init_theta(torch.Generator(device))
        assert {v.device.type for v in theta.values()} <= {device}


def test_theta_takes_no_other_dtype_into_the_parameters(each: Case) -> None:
    params, batch = (tree.to(x, None, torch.float32) for x in each.one())
    params = {k: p.requires_grad_() for k, p in params.items()}
    starts = {k: v.float() for k, v in each.theta.items() if "init/" in k}
    theta = {**each.theta, **starts}  # in float64, but for the start
    value = each.loss(theta, params, batch)
    assert value.dtype == torch.float32
    if each.objective.penalty is not None:
        gradient = each.objective.penalty.gradient(theta, params)
        assert {g.dtype for g in gradient.values()} == {torch.float32}


def test_only_quadratic_ones_are_penalties() -> None:
    assert all(isinstance(named(name).objective, Proximal | L2) == (name in PENALIZED) for name in ALL)


@pytest.mark.parametrize("name", PENALIZED)
def test_a_penalty_is_what_the_objective_adds_and_has_the_gradient_of_its_value(name: str) -> None:
    it = named(name)
    params, batch = it.one()
    theta = {k: v.clone().requires_grad_() for k, v in it.theta.items()}
    params = {k: p.clone().requires_grad_() for k, p in params.items()}
    penalty = it.objective.penalty
    assert penalty is not None
    value = penalty.value(theta, params)
    assert torch.equal(it.loss(theta, params, batch), it.family.loss(params, batch) + value)
    closed, plain = penalty.gradient(theta, params), torch.autograd.grad(value, [*params.values()], create_graph=True)
    assert [*closed] == [*params]
    torch.testing.assert_close([*closed.values()], [*plain], rtol=1e-13, atol=1e-14)
    # Once more, along one direction, with respect to all that enters it.
    inputs = {**params, **theta}
    ours, theirs = (
        torch.autograd.grad(
            sum(x.sin().sum() for x in g), [*inputs.values()], allow_unused=True, materialize_grads=True
        )
        for g in (closed.values(), plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    moving = {k for k, g in zip(inputs, ours, strict=True) if g.any()}
    assert moving == {k for k in inputs if k in params or k in it.objective.init_theta(torch.Generator())} | {
        k for k in theta if "init/" in k and isinstance(it.objective, Proximal)
    }


# Closed forms.


def test_the_order_of_the_proximal_terms_operations() -> None:
    """Pinned bit by bit: recorded runs of implicit MAML were made with it."""
    for per, learn in (("scalar", False), ("scalar", True), ("tensor", True), ("coordinate", True)):
        it = case(Proximal(TEMPLATE, 0.7, per=per, learn=learn))
        params, _ = it.one()
        offsets = {k: p - it.theta[f"rule/init/{k}"] for k, p in params.items()}
        if per == "scalar":
            strengths = dict.fromkeys(params, it.theta["strength"] if learn else 0.7)
            distance = torch.stack([x.square().sum() for x in offsets.values()]).sum()
            value = 0.5 * strengths["bias"] * distance
        else:
            strengths = {k: it.theta[f"strength/{k}"] for k in params}
            value = 0.5 * torch.stack([(strengths[k] * x.square()).sum() for k, x in offsets.items()]).sum()
        penalty = it.objective.penalty
        assert penalty is not None
        assert torch.equal(penalty.value(it.theta, params), value)
        gradient = {k: strengths[k] * x for k, x in offsets.items()}
        torch.testing.assert_close(penalty.gradient(it.theta, params), gradient, rtol=0, atol=0)


def test_proximal_by_hand() -> None:
    objective = Proximal({"w": torch.zeros(2), "b": torch.zeros(1)}, per="tensor", learn=True)
    theta = {"a/rule/init/w": torch.tensor([1.0, 2.0]), "init/b": torch.tensor([-1.0])}
    theta |= {"strength/w": torch.tensor(3.0), "strength/b": torch.tensor(0.5)}
    params = {"w": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0])}
    assert objective.penalty.value(theta, params).item() == pytest.approx(0.5 * (3 * (1 + 4) + 0.5 * 4))
    assert {k: g.tolist() for k, g in objective.penalty.gradient(theta, params).items()} == {"w": [3, -6], "b": [1]}


def test_l2_by_hand() -> None:
    objective = L2({"w": torch.zeros(2)}, 2.0, per="coordinate")
    theta = objective.init_theta(torch.Generator())
    assert theta["log_l2/w"].tolist() == pytest.approx([math.log(2)] * 2)
    theta["log_l2/w"] = torch.tensor([0.0, -1.0])
    params = {"w": torch.tensor([2.0, 3.0])}
    assert objective.penalty.value(theta, params).item() == pytest.approx(0.5 * (4 + 9 / math.e))
    assert objective.penalty.gradient(theta, params)["w"].tolist() == pytest.approx([2, 3 / math.e])


def test_weights_per_example_by_hand() -> None:
    for it in (named("weighted-examples"), named("weighted-examples, squared")):
        params, batch = it.one()
        outputs, targets = it.family.outputs(params, batch), batch["targets"]
        terms = []
        for i in range(5):
            raw = it.theta["example_weights"][int(batch["index"][i])]
            if outputs.ndim == 2:
                loss = outputs[i].exp().sum().log() - outputs[i, int(targets[i])]
            else:
                loss = 0.5 * (outputs[i] - targets[i]) ** 2
            terms.append(loss / (1 + (-raw).exp()))
        torch.testing.assert_close(it.loss(it.theta, params, batch), torch.stack(terms).sum() / 5)
    # Equal weights of one half are half the family's loss, and examples out of the batch have no gradient.
    params, batch = it.one()
    raw = torch.zeros(NUM_EXAMPLES, requires_grad=True)
    value = it.loss({"example_weights": raw}, params, batch)
    torch.testing.assert_close(value, 0.5 * it.family.loss(params, batch))
    (gradient,) = torch.autograd.grad(value, raw)
    assert set(gradient.nonzero().flatten().tolist()) == set(batch["index"].tolist())


def test_a_learned_loss_is_its_network_and_starts_at_the_tasks_loss() -> None:
    it = named("learned-loss")
    params, batch = it.one()
    start = it.objective.init_theta(torch.Generator().manual_seed(0))
    assert torch.equal(it.loss(start, params, batch), it.family.loss(params, batch))
    network = torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1, bias=False)
    ).requires_grad_(False)
    for ours, theirs in (("layer0.weight", "0.weight"), ("layer0.bias", "0.bias"), ("layer1.weight", "2.weight")):
        network.get_parameter(theirs).copy_(it.theta[f"loss/{ours}"])
    features = torch.cat([it.family.outputs(params, batch), functional.one_hot(batch["targets"], 3)], 1)
    expected = it.family.loss(params, batch) + functional_call(network, {}, (features,)).mean()
    torch.testing.assert_close(it.loss(it.theta, params, batch), expected)


def test_distilled_data_are_the_familys_loss_on_the_images_and_on_nothing_else() -> None:
    objective = DistilledData((2,), NUM_CLASSES, per_class=2)
    it = case(objective)
    params, batch = it.one()
    learned = {"inputs": it.theta["images"], "targets": torch.tensor([0, 0, 1, 1, 2, 2])}
    assert torch.equal(it.loss(it.theta, params, batch), it.family.loss(params, learned))
    other = {**batch, "inputs": batch["inputs"] + 1, "targets": batch["targets"].flip(0)}
    assert torch.equal(it.loss(it.theta, params, other), it.loss(it.theta, params, batch))
    logits = it.theta["images"] @ params["weight"].mT + params["bias"]
    by_hand = [x.exp().sum().log() - x[i // 2] for i, x in enumerate(logits)]
    torch.testing.assert_close(it.loss(it.theta, params, batch), torch.stack(by_hand).mean())


def test_distilled_images_start_from_noise_of_the_given_size() -> None:
    images = DistilledData((50, 40), 10, std=0.3).init_theta(torch.Generator().manual_seed(0))["images"]
    assert images.shape == (10, 50, 40)
    assert float(images.std()) == pytest.approx(0.3, rel=0.02) and float(images.mean()) == pytest.approx(0, abs=0.01)


def test_base_scales_the_familys_part_of_a_learned_loss() -> None:
    it = named("learned-loss, values")
    params, batch = it.one()
    whole, alone = (LearnedLoss(1, "values", (4, 3), "softplus", base) for base in (0.5, 0.0))
    value = alone.loss(it.theta, it.family, params, batch)
    expected = 0.5 * it.family.loss(params, batch) + value
    torch.testing.assert_close(whole.loss(it.theta, it.family, params, batch), expected)


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Proximal({}, 1.0), ValueError, "Proximal: template must be one task's parameters.*an empty one"),
        (lambda: Proximal(torch.zeros(3)), ValueError, "Proximal: template.*got Tensor"),  # pyright: ignore
        (lambda: L2({"w": torch.zeros(2, dtype=torch.int64)}, 1.0), ValueError, "no floating-point tensors"),
        (lambda: Proximal(TEMPLATE, 0.0), ValueError, "strength=0.0 is not positive"),
        (lambda: L2(TEMPLATE, -1.0), ValueError, "L2: strength=-1.0 is not positive"),
        (lambda: L2(TEMPLATE, math.inf), ValueError, "L2: strength=inf cannot be used"),
        (lambda: L2(TEMPLATE, "1"), TypeError, "L2: strength='1' is a str; pass a number"),  # pyright: ignore
        (lambda: Proximal(TEMPLATE, per="tensor"), ValueError, "all the same unless they are learned"),
        (lambda: L2(TEMPLATE, 1.0, per="layer"), ValueError, "per='layer' is none of 'scalar', 'tensor'"),  # pyright: ignore
        (lambda: WeightedExamples(0), ValueError, "num_examples=0 is not a count"),
        (lambda: WeightedExamples(5, "hinge"), ValueError, "per_example='hinge' is none of"),  # pyright: ignore
        (lambda: DistilledData(784), ValueError, "shape=784 is not a tuple"),  # pyright: ignore
        (lambda: DistilledData((28, 0)), ValueError, r"shape\[1\]=0 is not a count"),
        (lambda: DistilledData((784,), per_class=0), ValueError, "per_class=0 is not a count"),
        (lambda: DistilledData((784,), num_classes=True), ValueError, "num_classes=True is not a count"),
        (lambda: DistilledData((784,), std=-0.1), ValueError, "std=-0.1 is negative"),
        (lambda: DistilledData((784,), std="1"), TypeError, "std='1' is a str; pass a number"),  # pyright: ignore
        (lambda: LearnedLoss(0), ValueError, "num_outputs=0 is not a count"),
        (lambda: LearnedLoss(3, hidden=()), ValueError, r"hidden=\(\) is not a tuple of widths"),
        (lambda: LearnedLoss(3, hidden=(4, 0)), ValueError, r"hidden\[1\]=0 is not a count"),
        (lambda: LearnedLoss(3, activation="relu"), ValueError, "'relu' is none of 'tanh', 'softplus'"),  # pyright: ignore
        (lambda: LearnedLoss(3, base=math.nan), ValueError, "base=nan cannot be used"),
        (lambda: LearnedLoss(3, targets="logits"), ValueError, "targets='logits' is none of"),  # pyright: ignore
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def changed(name: str, **entries: Any) -> None:
    """Compute the loss on a batch with other entries; None takes one out."""
    it = named(name)
    params, batch = it.one()
    it.loss(it.theta, params, {k: v for k, v in {**batch, **entries}.items() if v is not None})


@pytest.mark.parametrize(
    ("name", "entries", "error", "message"),
    [
        ("weighted-examples", {"index": None}, ValueError, r"reads batch\['index'\].*keys \['inputs', 'targets'\]"),
        ("weighted-examples", {"targets": None}, ValueError, r"reads batch\['targets'\]"),
        ("weighted-examples", {"index": [0, 1]}, ValueError, "is a list there"),
        ("weighted-examples", {"index": torch.arange(4)}, ValueError, r"shape \(4,\), the batch has 5 examples"),
        ("weighted-examples", {"index": torch.arange(5.0)}, ValueError, "index'] is torch.float"),
        ("weighted-examples", {"index": torch.arange(5) + 8}, ValueError, "outside 0 to 11"),
        ("weighted-examples", {"index": torch.arange(5) - 1}, ValueError, "outside 0 to 11"),
        ("weighted-examples", {"targets": torch.zeros(5)}, ValueError, "needs logits .* and integer classes"),
        ("weighted-examples, squared", {"targets": torch.zeros(5, 1)}, ValueError, "of one shape"),
        ("distilled", {"inputs": None}, ValueError, r"DistilledData reads batch\['inputs'\]"),
        ("distilled", {"targets": None}, ValueError, r"DistilledData reads batch\['targets'\]"),
        ("distilled", {"inputs": torch.zeros(5, 3)}, ValueError, r"inputs of shape \(2,\).*pass shape=\(3,\)"),
        ("distilled", {"inputs": torch.zeros(5, 2).long()}, ValueError, "torch.int64 of shape .* cannot be learned"),
        ("distilled", {"targets": torch.zeros(5)}, ValueError, "are integer classes"),
        ("distilled", {"targets": torch.zeros(5, 2).long()}, ValueError, "are integer classes"),
        ("learned-loss", {"targets": None}, ValueError, r"LearnedLoss reads batch\['targets'\]"),
        ("learned-loss", {"targets": torch.zeros(5)}, ValueError, "as targets integer classes"),
        ("learned-loss, values", {"targets": torch.zeros(5, 1)}, ValueError, "as targets values of the outputs' shape"),
    ],
)
def test_a_batch_that_lacks_something_is_refused(
    name: str, entries: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        changed(name, **entries)


def test_an_index_out_of_range_is_refused_for_tasks_together() -> None:
    it = named("weighted-examples")
    with pytest.raises(ValueError, match="outside 0 to 11"):
        vmap(lambda p, b: it.loss(it.theta, p, b))(it.params, {**it.batch, "index": it.batch["index"] + 8})


def test_a_batch_that_is_no_dict_is_refused() -> None:
    for name in ("weighted-examples", "distilled"):
        it = named(name)
        params, batch = it.one()
        with pytest.raises(ValueError, match="the family's batch is a tuple"):
            it.loss(it.theta, params, tuple(batch.values()))


def test_a_learned_loss_of_another_width_is_refused() -> None:
    it = named("learned-loss")
    with pytest.raises(ValueError, match=r"LearnedLoss\(num_outputs=4\) needs outputs \(n, 4\)"):
        LearnedLoss(4).loss(it.theta, it.family, *it.one())


def test_parameters_unlike_the_template_are_refused() -> None:
    objective = L2({"w": torch.zeros(2)}, 1.0)
    with pytest.raises(ValueError, match=r"L2 was made for parameters \{'w': \(2,\)\}, the task's are"):
        objective.penalty.value({"log_l2": torch.tensor(0.0)}, {"w": torch.zeros(3)})


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        ({"lr": torch.tensor(0.1)}, r"has none: its entries are \['lr'\]; use a rule with one learned start"),
        ({"init/bias": torch.zeros(3), "minit/weight": torch.zeros(3, 2)}, "'init/weight' .* has none"),
        ({"init/weight": torch.zeros(3, 2), "rule/init/weight": torch.zeros(3, 2)}, "has 2 of them"),
    ],
)
def test_proximal_without_one_learned_start_is_refused(theta: Theta, message: str) -> None:
    params, _ = named("proximal").one()
    with pytest.raises(ValueError, match=message):
        Proximal(TEMPLATE).penalty.value(theta, params)


# The registry and the public names.


def test_the_registry_makes_by_name_and_hands_the_template_to_those_that_take_one() -> None:
    known = set(inner_objectives.names())
    assert {"task-loss", "proximal", "l2", "weighted-examples", "learned-loss", "distilled"} <= known
    objective = learnedopt.inner_objectives.make("proximal", template=TEMPLATE, strength=2.0)
    assert isinstance(objective, Proximal) and objective.strength == 2.0
    assert isinstance(inner_objectives.make("task-loss", template=TEMPLATE), TaskLoss)
    assert issubclass(learnedopt.Penalty, Penalty)
    with pytest.raises(ValueError, match="did you mean 'proximal'"):
        inner_objectives.make("proximate", template=TEMPLATE)
    with pytest.raises(ValueError, match="'l2' needs strength="):
        inner_objectives.make("l2", template=TEMPLATE)
    with pytest.raises(TypeError, match="num_examples='many'"):
        inner_objectives.make("weighted-examples", num_examples="many")


def test_a_users_own_joins_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from learnedopt.inner_objectives import registry

    @dataclass(frozen=True)
    class Scaled(InnerObjective):
        factor: float = 2.0

        def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
            return self.factor * family.loss(params, batch)

    monkeypatch.setattr(registry.INNER_OBJECTIVES, "registered", {**registry.INNER_OBJECTIVES.registered})
    inner_objectives.register("scaled", Scaled)
    assert inner_objectives.build(inner_objectives.describe(Scaled(3.0))) == Scaled(3.0)
