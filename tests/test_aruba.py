"""ARUBA: its recursion through MetaTrainer against the published one, resume, and what it learns as ``meta-sgd``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative_error
from plug_in_cases import bare
from problems import Quadratic, TanhMLP, generic_theta, sample, template
from test_regret_bound import SHARED, shown_by_hand
from torch import Tensor, nn
from torch.nn import functional

import learnedopt
from learnedopt import (
    ARUBA,
    Execution,
    FinalLoss,
    InnerLoop,
    LastIterate,
    MetaTrainer,
    MomentMatching,
    PerName,
    Tape,
    TargetMatching,
    TaskFamily,
    Unrolled,
    optimizers,
)
from learnedopt.core.named_tensors import NamedTensors
from learnedopt.core.registry import Choice
from learnedopt.core.tree import Params, Theta
from learnedopt.evaluation.few_shot import adapt
from learnedopt.meta_optimizers import registry
from learnedopt.optimizers import as_meta_sgd
from learnedopt.recipes import HeldOut, MetaLearning, Recipe
from learnedopt.run import train
from learnedopt.training.tracking import Tracking
from learnedopt.training.validation import task_generator

EPS, ZETA, NUM_STEPS = 0.3, 0.8, 4


def loop_of(family: TaskFamily, rates: str, eps: float = EPS, zeta: float = ZETA, chunk_size: int = 2) -> InnerLoop:
    rule = optimizers.make("aruba", template=template(family), rates=rates, eps=eps, zeta=zeta)
    return InnerLoop(family, rule, Execution(chunk_size))


def trained(loop: InnerLoop, num_meta_steps: int, factor: float = 0.5, num_tasks: int = 1, **options: Any) -> Theta:
    """Return theta after ARUBA's meta-training."""
    power = options.pop("power", 1.0)
    trainer = MetaTrainer(
        loop, Unrolled(0), MomentMatching(NUM_STEPS, factor=factor), lambda p: ARUBA(p, power), None,
        num_tasks=num_tasks, seed=7, **options,
    )  # fmt: skip
    return trainer.run(num_meta_steps).theta


def by_hand(
    loop: InnerLoop, rates: str, num_rounds: int, factor: float, power: float, num_tasks: int
) -> tuple[Params, Params, list[tuple[Params, Params]]]:
    """Return start and rates of the algorithm as published, written out, and what each round showed (b, g)."""
    family = loop.family
    start = {k.removeprefix("init/"): v for k, v in loop.init_theta(torch.Generator()).items() if "init/" in k}
    b, g = ({k: torch.full_like(v, x**2) for k, v in start.items()} for x in (EPS, ZETA))
    eta, seen = rates_of(b, g, rates), []
    for t in range(1, num_rounds + 1):
        tasks = family.sample(num_tasks, task_generator(7, t - 1))
        descent = InnerLoop(family, optimizers.make("meta-sgd", template=start))
        theta = {f"init/{k}": v for k, v in start.items()} | {f"rule/lr/{k}": v for k, v in eta.items()}
        ends, squares = shown_by_hand(descent, theta, tasks, NUM_STEPS)
        shown = ({k: factor * ((ends[k] - v) ** 2).mean(0) for k, v in start.items()},
                 {k: x.mean(0) for k, x in squares.items()})  # fmt: skip
        b = {k: v + shown[0][k] + EPS**2 / (t + 1) ** power for k, v in b.items()}
        g = {k: v + shown[1][k] + ZETA**2 / (t + 1) ** power for k, v in g.items()}
        eta = rates_of(b, g, rates)
        start = {k: v + (ends[k].mean(0) - v) / t for k, v in start.items()}
        seen.append(shown)
    return start, eta, seen


def rates_of(b: Params, g: Params, rates: str) -> Params:
    """Return sqrt(b / g) for each coordinate, or of the sums over what shares a rate."""
    if rates == "all":
        sums = [torch.stack([x.sum() for x in each.values()]).sum() for each in (b, g)]
        one = (sums[0] / sums[1]).sqrt()
        return {k: one.expand_as(x) for k, x in b.items()}
    if rates == "tensor":
        return {k: (x.sum() / g[k].sum()).sqrt().expand_as(x) for k, x in b.items()}
    return {k: (x / g[k]).sqrt() for k, x in b.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("factor", "power", "num_tasks"), [(0.5, 1.0, 1), (1.0, 0.6, 1), (0.5, 2.0, 3)])
@pytest.mark.parametrize("rates", SHARED)
@pytest.mark.parametrize("family", [Quadratic(), TanhMLP()], ids=lambda f: type(f).__name__)
def test_theta_follows_the_published_recursion(
    family: TaskFamily, rates: str, factor: float, power: float, num_tasks: int
) -> None:
    loop = loop_of(family, rates)
    start, eta, _ = by_hand(loop, rates, 40, factor, power, num_tasks)
    theta = trained(loop, 40, factor, num_tasks, power=power)
    _, exported = as_meta_sgd(loop.rule, theta)
    assert relative_error({k: theta[f"init/{k}"] for k in start}, start) < 1e-12
    for k, x in eta.items():
        assert relative_error({k: exported[f"rule/lr/{k}"].expand_as(x)}, {k: x}) < 1e-12
        assert not torch.allclose(x, torch.full_like(x, EPS / ZETA), rtol=0.01)  # the rates have moved


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rates", SHARED)
def test_without_a_prior_the_rates_minimise_the_bounds_of_all_tasks_so_far(rates: str) -> None:
    """With the factor 1 and vanishing eps and zeta."""
    loop = loop_of(Quadratic(), rates, 1e-9 * EPS / ZETA, 1e-9)
    _, found = as_meta_sgd(loop.rule, trained(loop, 12, 1.0))
    seen = watch(loop, 12)
    distances, squares = ({k: torch.stack([s[i][k] for s in seen]).sum(0) for k in seen[0][i]} for i in (0, 1))

    def slopes(scale: float) -> Params:
        """Return the derivative of the accumulated bound with respect to each rate, by coordinates."""
        rates_at = {k: scale * found[f"rule/lr/{k}"] for k in distances}
        return {k: (squares[k] - distances[k] / rates_at[k] ** 2) / 2 for k in distances}

    def by_rate(x: Params) -> list[Tensor]:
        """Return the sums over what shares a rate."""
        if rates == "coordinate":
            return [*x.values()]
        each = [v.sum() for v in x.values()]
        return each if rates == "tensor" else [torch.stack(each).sum()]

    for zero, below, above, scale in zip(*map(by_rate, (slopes(1), slopes(0.9), slopes(1.1), squares)), strict=True):
        assert (zero.abs() <= 1e-12 * scale).all()
        assert (below < 0).all() and (above > 0).all()


def watch(loop: InnerLoop, num_rounds: int) -> list[tuple[Params, Params]]:
    """Return each round's squared distances and squared gradients in the run with the factor 1, from theta's course."""
    seen = []
    for t in range(num_rounds):
        theta = trained(loop, t, 1.0)
        tasks = loop.family.sample(1, task_generator(7, t))
        ends, squares = shown_by_hand(loop, theta, tasks, NUM_STEPS)
        seen.append(({k: ((e - theta[f"init/{k}"]) ** 2)[0] for k, e in ends.items()},
                     {k: x[0] for k, x in squares.items()}))  # fmt: skip
    return seen


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rates", SHARED)
def test_a_run_that_was_stopped_goes_on_to_the_bit(rates: str, tmp_path: Path) -> None:
    loop, path = loop_of(TanhMLP(), rates), tmp_path / "checkpoint.pt"
    whole = trained(loop, 9, num_tasks=2)
    for steps in (4, 5, 9):
        resumed = trained(loop, steps, num_tasks=2, checkpoint=path)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole) and resumed.keys() == whole.keys()


@pytest.mark.usefixtures("float64")
def test_the_state_dict_holds_counters_and_priors() -> None:
    theta = {"init/x": torch.ones(2), "distance/x": torch.full((2,), 0.25), "squares/x": torch.ones(2)}
    optimizer = ARUBA(NamedTensors(theta), power=2.0)
    for p in theta.values():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    optimizer.step()
    state = optimizer.state_dict()
    assert [s["step"] for s in state["state"].values()] == [2, 2, 2]
    assert [group["leader"] for group in state["param_groups"]] == [True, False]
    priors = [s["prior"] for s in state["state"].values() if "prior" in s]
    torch.testing.assert_close(priors, [torch.full((2,), 0.25), torch.ones(2)])
    first = 0.25 + (0.25 / 4 - 0.1) / 2
    torch.testing.assert_close(theta["distance/x"], torch.full((2,), first + (0.25 / 9 - 0.1) / 3))
    torch.testing.assert_close(theta["init/x"], torch.full((2,), 1 - 0.1 - 0.05))


@pytest.mark.usefixtures("float64")
def test_the_start_may_move_as_in_reptile(tmp_path: Path) -> None:
    """Its gradient is Reptile's, so Adam moves it the same while ARUBA moves the rates; resumed to the bit."""
    loop = loop_of(TanhMLP(), "coordinate")
    theta, tasks = loop.init_theta(torch.Generator()), sample(loop.family, 3)
    reptile = InnerLoop(loop.family, as_meta_sgd(loop.rule, theta)[0])
    target = TargetMatching(LastIterate(NUM_STEPS))
    exported = as_meta_sgd(loop.rule, theta)[1]
    end = reptile.run(exported, reptile.start(tasks), NUM_STEPS, Tape.NONE).end.params
    found = Unrolled(0).estimate(loop, theta, MomentMatching(NUM_STEPS), loop.start(tasks)).grads
    expected = {f"init/{k}": theta[f"init/{k}"] - end[k].mean(0) for k in end}
    assert relative_error({k: found[k] for k in expected}, expected) < 1e-12
    maml = InnerLoop(loop.family, optimizers.make("maml", template=template(loop.family), lr=EPS / ZETA))
    plain = Unrolled(0).estimate(maml, {k: theta[k] for k in expected}, target, maml.start(tasks)).grads
    assert relative_error({k: found[k] for k in expected}, plain) < 1e-12

    def run(num_meta_steps: int, **options: Any) -> Theta:
        split = PerName({"init/*": lambda p: torch.optim.Adam(p, 0.01), "rule/*": ARUBA})
        trainer = MetaTrainer(loop, Unrolled(0), MomentMatching(NUM_STEPS), split, None, num_tasks=2, **options)
        return trainer.run(num_meta_steps).theta

    whole = run(6)
    run(2, checkpoint=tmp_path / "checkpoint.pt")
    resumed = run(6, checkpoint=tmp_path / "checkpoint.pt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert all((whole[k] != theta[k]).all() for k in whole)


def test_a_plain_list_and_a_wrong_power_are_refused() -> None:
    with pytest.raises(TypeError, match="ARUBA tells the tensors of theta apart by name"):
        ARUBA([torch.zeros(2)])
    for power in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be a finite number, 0 or more"):
            ARUBA(NamedTensors({"distance": torch.ones(())}), power)
    with pytest.raises(ValueError, match=r"ARUBA: lr=0\.0"):
        ARUBA(NamedTensors({"distance": torch.ones(())}), lr=0.0)
    made = registry.make("aruba", lr=1.0, power=0.5)(NamedTensors({"distance": torch.ones(())}))
    assert isinstance(made, ARUBA) and made.param_groups[0]["power"] == 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps=0.0 must be positive"),
        ({"zeta": -1.0}, ValueError, "zeta=-1.0 is out of range"),
        ({"zeta": "1"}, TypeError, "zeta"),
        ({"rates": "step"}, ValueError, "rates"),
        ({"template": {}}, ValueError, "template must be one task's parameters"),
    ],
)
def test_a_rule_with_wrong_options_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"template": {"w": torch.zeros(2)}, **options}
    with pytest.raises(error, match=message):
        optimizers.make("aruba", **given)


@pytest.mark.usefixtures("float64")
def test_other_optimizers_learn_the_moments_too() -> None:
    """Plain descent at rate 1 forgets all but the last round: what it showed is then theta itself."""
    loop = loop_of(Quadratic(), "coordinate")
    theta = {k: v.clone().requires_grad_() for k, v in loop.init_theta(torch.Generator()).items()}
    tasks = sample(loop.family, 3)
    ends, squares = shown_by_hand(loop, theta, tasks, NUM_STEPS)
    before = {k: v.detach().clone() for k, v in theta.items()}
    found = Unrolled(0).estimate(loop, theta, MomentMatching(NUM_STEPS), loop.start(tasks))
    for k, p in theta.items():
        p.grad = found.grads[k]
    torch.optim.SGD([*theta.values()], 1.0).step()
    for k, end in ends.items():
        shown = 0.5 * (end - before[f"init/{k}"]).square().mean(0)
        torch.testing.assert_close(theta[f"rule/distance/{k}"], shown, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(theta[f"rule/squares/{k}"], squares[k].mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rates", SHARED)
def test_as_meta_sgd_it_moves_the_same_to_the_bit_also_from_a_file(rates: str, tmp_path: Path) -> None:
    loop = loop_of(TanhMLP(), rates)
    theta, tasks = generic_theta(loop.rule), sample(loop.family, 3)
    rule, exported = learnedopt.load(learnedopt.save(tmp_path / "theta", *as_meta_sgd(loop.rule, theta)))
    other = InnerLoop(loop.family, rule, Execution(2))
    ends = [x.run(t, x.start(tasks), 6, Tape.NONE).end.params for x, t in ((loop, theta), (other, exported))]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert (
        exported.keys()
        == optimizers.make("meta-sgd", template=template(loop.family)).init_theta(torch.Generator()).keys()
    )


def test_only_arubas_rule_becomes_meta_sgd() -> None:
    rule = optimizers.make("maml", template={"w": torch.zeros(2)})
    with pytest.raises(TypeError, match="takes a learned start with balanced rates"):
        as_meta_sgd(rule, rule.init_theta(torch.Generator()))


def test_a_recipe_of_it_trains_and_leaves_what_can_be_exported(tmp_path: Path) -> None:
    recipe = Recipe(
        "aruba-sine", Choice("sine"), Choice("aruba", {"eps": 0.01}), Unrolled(0), MomentMatching(5), 4, num_tasks=3,
        meta=MetaLearning(lr=1.0, optimizer=Choice("aruba", {"power": 2.0})), validation=HeldOut(FinalLoss(), 5, 4, 2),
    )  # fmt: skip
    assert train(recipe, tmp_path / "run", Tracking("disabled")) is not None
    rule, theta = as_meta_sgd(*learnedopt.load(tmp_path / "run"))
    assert isinstance(rule.rule, optimizers.LearnedRates) and len(theta) == 2 * len(rule.template)
    assert not torch.equal(theta["rule/lr/layer0.bias"], torch.full_like(theta["rule/lr/layer0.bias"], 0.01))


def test_what_it_learned_trains_a_model_through_the_plug_in() -> None:
    model = nn.Linear(3, 2)
    like = {name: p.detach().clone() for name, p in model.named_parameters()}
    rule = optimizers.make("aruba", template=like, eps=0.3, zeta=1.0)
    theta = {k: v + 0.1 * (k[0] == "i") for k, v in rule.init_theta(torch.Generator()).items()}
    optimizer = bare(model.named_parameters(), as_meta_sgd(rule, theta), adopt_start=True)
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    expected = {k: v + 0.1 for k, v in like.items()}
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        leaves = {k: v.detach().requires_grad_() for k, v in expected.items()}
        loss = functional.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
        grads = torch.autograd.grad(loss, [*leaves.values()])
        expected = {k: (v - 0.3 * g).detach() for (k, v), g in zip(leaves.items(), grads, strict=True)}
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[k])


def test_what_it_learned_adapts_to_characters(data_root: Path) -> None:
    family = learnedopt.tasks.make("omniglot", ways=5, shots=4, queries=3, batch_shots=2, width=8)
    loop = loop_of(family, "coordinate", 0.1, 1.0)
    theta = trained(loop, 2, num_tasks=2)
    test = learnedopt.tasks.make("omniglot", ways=5, shots=1, queries=3, width=8, meta_split="test")
    found = [adapt(rule, t, test, 3, 4) for rule, t in ((loop.rule, theta), as_meta_sgd(loop.rule, theta))]
    assert torch.equal(found[0].values["accuracy"], found[1].values["accuracy"])
    assert found[0].values["loss"].isfinite().all() and len(found[0].steps) == 4
