"""Families that wrap others: mixtures of families, and rescaled ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import InnerLoop, MetaTrainer, SumOfLosses, Tape, TaskByTask, Unrolled, Validation
from learnedopt.core import tree
from learnedopt.core.execution import Execution
from learnedopt.core.task import TaskFamily
from learnedopt.optimizers import make as make_rule
from learnedopt.tasks import Mixture, Quadratic, Rescaled, Sine, TextRNN, build, describe, make

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]

TEXT = TextRNN(width=4, batch_size=2, context=5)
MIXTURE = Mixture(((3.0, Quadratic(dim=3, start_scale=1.0)), (1.0, TEXT)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_equal(found: Any, expected: Any) -> None:
    (flat, _), (other, _) = tree.flatten(found), tree.flatten(expected)
    assert len(flat) == len(other) > 0
    for a, b in zip(flat, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# Mixtures.


def test_tasks_are_of_each_family_by_its_weight_and_differ() -> None:
    tasks = MIXTURE.sample(4000, seeded())
    assert float((tasks["member"] == 0).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert set(tasks["member"].tolist()) == {0, 1} and tasks["member"].dtype == torch.int64
    assert len(set(tasks["seed"].tolist())) == 4000
    assert_equal(MIXTURE.sample(4000, seeded()), tasks)
    assert not torch.equal(MIXTURE.sample(4000, seeded(1))["member"], tasks["member"])


def test_a_task_is_what_its_family_draws_by_its_seed_whatever_stands_beside_it() -> None:
    tasks = MIXTURE.sample(9, seeded())
    before = torch.get_rng_state()
    parts = MIXTURE.split(tasks)
    assert torch.equal(torch.get_rng_state(), before)
    assert [family for family, _, _ in parts] == [*MIXTURE.families]
    assert sorted(i for _, _, positions in parts for i in positions) == [*range(9)]
    for family, own, positions in parts:
        assert family is MIXTURE.families[int(tasks["member"][positions[0]])]
        assert tree.size(own) == len(positions) >= 2
        for place, position in enumerate(positions):
            generator = seeded(int(tasks["seed"][position]))
            assert_equal(tree.narrow(own, place, place + 1), family.sample(1, generator))
            ((alone, task, (first,)),) = MIXTURE.split(tree.narrow(tasks, position, position + 1))
            assert alone is family and first == 0
            assert_equal(task, tree.narrow(own, place, place + 1))
        assert not torch.equal(*(x for x in family.init_params(tree.narrow(own, 0, 2)).popitem()[1]))


def test_members_run_in_loops_of_their_own() -> None:
    for family, own, _ in MIXTURE.split(MIXTURE.sample(6, seeded())):
        loop = InnerLoop(family, make_rule("sgd", lr=0.01))
        losses = loop.run(loop.init_theta(seeded()), loop.start(own), 3, Tape.NONE).losses
        assert losses.shape == (3, tree.size(own)) and bool((losses[2].sum() < losses[0].sum()).all())


def test_a_mixture_goes_into_a_configuration_and_hands_on_its_options() -> None:
    members = [[0.5, {"name": "quadratic", "options": {"dim": 3}}], [2, describe(TEXT)]]
    family = make("mixture", members=members, meta_split="test", dtype="float32")
    assert isinstance(family, Mixture)
    assert [weight for weight, _ in family.members] == [0.5, 2]
    expected = (
        Quadratic(dim=3, dtype="float32", meta_split="test"),
        dataclasses.replace(TEXT, dtype="float32", meta_split="test"),
    )
    assert family.families == expected
    assert build(json.loads(json.dumps(describe(family)))) == family != make("mixture", members=members)
    assert hash(family) == hash(build(describe(family)))
    nested = make("mixture", members=((1.0, Rescaled(TEXT, tensor_scale=0.1)), (1.0, TEXT)), meta_split="valid")
    assert nested == build(describe(nested)) and isinstance(nested, Mixture)
    assert nested.families[0] == Rescaled(TEXT, tensor_scale=0.1, meta_split="valid")


@pytest.mark.parametrize("call", ["start", "batch", "loss"])
def test_no_loop_runs_a_mixture_itself(call: str) -> None:
    tasks = MIXTURE.sample(2, seeded())
    calls = {
        "start": lambda: InnerLoop(MIXTURE, make_rule("sgd", lr=0.1)).start(tasks),
        "batch": lambda: MIXTURE.batch(tasks, 0, "train"),
        "loss": lambda: MIXTURE.loss({}, {}),
    }
    with pytest.raises(ValueError, match=r"a mixture \(Quadratic, TextRNN\) differ in shape.*TaskByTask.*families"):
        calls[call]()


class Own(TaskFamily):
    """A user's own family, without options."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        return {"c": torch.randn(num_tasks, 2, generator=generator)}

    def init_params(self, tasks: Any) -> Any:
        return {"x": torch.zeros_like(tasks["c"])}

    def batch(self, tasks: Any, step: int, split: Any) -> Any:
        return tasks

    def loss(self, params: Any, batch: Any) -> Tensor:
        return (params["x"] - batch["c"]).square().sum()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("mixture", {}, ValueError, "needs members="),
        ("mixture", {"members": ()}, ValueError, "no families to draw from"),
        ("mixture", {"members": (TEXT,)}, TypeError, "members="),
        ("mixture", {"members": ((0, TEXT),)}, ValueError, r"weight of members\[0\] is 0"),
        ("mixture", {"members": ((1.0, TEXT), (-1.0, Quadratic()))}, ValueError, r"weight of members\[1\]=-1.0"),
        ("mixture", {"members": ((1.0, TEXT), (2.0, TEXT))}, ValueError, r"members\[1\] is there twice"),
        ("mixture", {"members": ((1.0, MIXTURE),)}, ValueError, "Mixture is itself made of families"),
        ("rescaled", {"family": MIXTURE}, ValueError, "Mixture is itself made of families"),
        ("mixture", {"members": ((1.0, Own()),), "meta_split": "test"}, ValueError, "Own has no option meta_split"),
        ("mixture", {"members": ((1.0, TEXT),), "meta_split": "tset"}, ValueError, "did you mean 'test'"),
        ("rescaled", {"family": TEXT, "tensor_scale": -0.1}, ValueError, "tensor_scale=-0.1"),
        ("rescaled", {"family": TEXT, "probability": 1.5}, ValueError, "probability=1.5"),
        ("rescaled", {"family": "text-rnn"}, TypeError, "family='text-rnn'"),
        ("rescaled", {"family": Own(), "dtype": "float32"}, ValueError, "Own has no option dtype"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(name: str, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    "members", [((1.0, "text-rnn"),), [(1.0, TEXT)], ((1.0, TEXT, 2),)], ids=["name", "list", "three"]
)
def test_members_are_pairs(members: Any) -> None:
    with pytest.raises(TypeError, match="are no pairs of a weight and a family"):
        Mixture(members)


def test_only_a_family_is_rescaled() -> None:
    with pytest.raises(TypeError, match=r"'quadratic'.*is no task family"):
        Rescaled("quadratic")  # pyright: ignore[reportArgumentType]


def test_a_mixture_is_meta_trained_task_by_task_and_validated() -> None:
    rule = make_rule("recurrent-hyperparameters")
    loop, estimator = InnerLoop(MIXTURE, rule), TaskByTask(Unrolled(3))
    validation = Validation(loop, SumOfLosses(), num_steps=2, num_tasks=4, every=1)
    trainer = MetaTrainer(loop, estimator, SumOfLosses(), num_tasks=5, validation=validation)
    tasks, theta = MIXTURE.sample(5, seeded()), loop.init_theta(seeded())
    found = estimator.estimate(loop, theta, SumOfLosses(), estimator.start(loop, theta, tasks, seeded()))
    expected = 0.0
    for family, own, positions in MIXTURE.split(tasks):
        member = InnerLoop(family, rule)
        carry = Unrolled(3).start(member, theta, own, seeded())
        expected += len(positions) * float(Unrolled(3).estimate(member, theta, SumOfLosses(), carry).loss)
    assert float(found.loss) == pytest.approx(expected / 5, rel=1e-12)
    before = {k: v.clone() for k, v in trainer.theta.items()}
    result = trainer.run(2)
    assert any(not torch.equal(v, before[k]) for k, v in result.theta.items())


def test_what_a_mixture_cannot_be_trained_with_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = MIXTURE.families[0].sample(1, seeded())
    rule = make_rule("learned-rates", template=tree.squeeze(MIXTURE.families[0].init_params(tasks)))
    monkeypatch.setattr(InnerLoop, "move", lambda *_: pytest.fail("a step was taken"))
    cases = [
        (rule, TaskByTask(Unrolled(3)), "No template serves a mixture"),
        (make_rule("recurrent-hyperparameters"), Unrolled(3), "TaskByTask"),
    ]
    for own, estimator, message in cases:
        trainer = MetaTrainer(InnerLoop(MIXTURE, own), estimator, SumOfLosses(), num_tasks=5)
        with pytest.raises(ValueError, match=message):
            trainer.run(1)


TEMPLATES = ("learned-rates", "meta-sgd", "maml", "balanced-rates", "aruba", "iterate")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("of", [0, 1])
def test_a_template_of_one_member_is_refused_by_the_others_before_the_first_step(name: str, of: int) -> None:
    families = (*MIXTURE.families, Quadratic(dim=4))
    for i, family in enumerate(families):
        tasks = families[of].sample(1, seeded())
        rule = make_rule(name, template=tree.squeeze(families[of].init_params(tasks)))
        loop = InnerLoop(family, rule)
        theta, carry = loop.init_theta(seeded()), loop.start(family.sample(2, seeded()))
        if i == of:
            assert loop.begin(theta, carry).state is not None
            continue
        with pytest.raises(ValueError, match=r"template of this family\. No template serves a mixture of families"):
            loop.begin(theta, carry)


@pytest.mark.parametrize("name", ["learned-rates", "balanced-rates"])
def test_rates_of_tensors_serve_other_shapes_of_the_same_names(name: str) -> None:
    family = Quadratic(dim=4, start_scale=1.0)
    rule = make_rule(name, template={"x": torch.zeros(3)}, rates="tensor")
    loop = InnerLoop(family, rule)
    rollout = loop.run(loop.init_theta(seeded()), loop.start(family.sample(2, seeded())), 2, Tape.NONE)
    assert rollout.losses.isfinite().all()


# Rescaled families.


SCALED = Rescaled(Quadratic(dim=3, start_scale=1.0), initial_scale=0.3, tensor_scale=0.4, coordinate_scale=0.5)


def test_a_rescaled_loss_is_the_familys_at_the_factors_times_the_parameters() -> None:
    tasks = SCALED.sample(2, seeded())
    params, batch = SCALED.init_params(tasks), SCALED.batch(tasks, 0, "train")
    inner = SCALED.family.init_params(tasks["inner"])
    task = 1
    one, data = tree.tree_map(lambda x: x[task], (params, batch))
    factors = data["factors"]["x"]
    assert factors.shape == (3,) and len(set(factors.tolist())) == 3 and bool((factors > 0).all())
    own = factors * one["x"]
    torch.testing.assert_close(own, inner["x"][task] * tasks["start"][task], rtol=1e-14, atol=0)
    gap = data["inner"]["W"] @ own - data["inner"]["y"]
    assert float(SCALED.loss(one, data)) == pytest.approx(float(gap @ gap), rel=1e-13)
    grad = torch.func.grad(SCALED.loss)(one, data)["x"]
    torch.testing.assert_close(grad, 2 * factors * (data["inner"]["W"].T @ gap), rtol=1e-12, atol=1e-12)


def test_factors_are_lognormal_of_the_chosen_widths_in_a_share_of_the_tasks() -> None:
    family = Rescaled(Sine(hidden=(5,)), initial_scale=0.35, tensor_scale=0.4, probability=0.25)
    tasks = family.sample(8000, seeded())
    assert float(tasks["start"].log().std()) == pytest.approx(0.35, rel=0.05)
    assert float(tasks["start"].log().mean()) == pytest.approx(0, abs=0.02)
    logs = {name: factor.flatten(1).log() for name, factor in tasks["factors"].items()}
    assert len(logs) == 4 and all(log.shape == (8000, 1) for log in logs.values())
    moved = next(iter(logs.values())) != 0
    assert float(moved.double().mean()) == pytest.approx(0.25, abs=0.02)
    for log in logs.values():
        assert torch.equal(log != 0, moved)  # of a task all tensors, or none
        assert float(log[moved].std()) == pytest.approx(0.4, rel=0.06)
    both = torch.cat([*logs.values()], dim=1)[moved.flatten()]
    assert float(torch.corrcoef(both.T).fill_diagonal_(0).abs().max()) < 0.1  # each tensor's is its own
    every = Rescaled(Sine(hidden=(5,)), tensor_scale=0.3, coordinate_scale=0.4).sample(2000, seeded())
    log = every["factors"]["layer0.weight"].log().flatten(1)
    within = log.var(dim=1).mean()
    assert float(within) == pytest.approx(0.16, rel=0.06)
    assert float(log.var()) == pytest.approx(0.25, rel=0.06)


def test_without_factors_a_rescaled_family_is_the_family() -> None:
    plain = Rescaled(TEXT)
    tasks = plain.sample(2, seeded())
    assert_equal(plain.init_params(tasks), TEXT.init_params(tasks["inner"]))
    params, batch = tree.squeeze(tree.narrow((plain.init_params(tasks), plain.batch(tasks, 3, "valid")), 0, 1))
    assert_equal(plain.loss(params, batch), TEXT.loss(params, batch["inner"]))
    assert_equal(plain.metrics(params, batch), TEXT.metrics(params, batch["inner"]))
    assert_equal(plain.outputs(params, batch), TEXT.outputs(params, batch["inner"]))


def test_steps_of_a_rescaled_family_are_the_familys_at_rates_times_the_squared_factors() -> None:
    lr = 0.01
    tasks = SCALED.sample(1, seeded())
    loop = InnerLoop(SCALED, make_rule("sgd", lr=lr))
    end = loop.run(loop.init_theta(seeded()), loop.start(tasks), 4, Tape.NONE).end.params["x"][0]
    factors, inner = tasks["factors"]["x"][0], tree.squeeze(tasks["inner"])
    x = inner["start"] * tasks["start"][0]
    for _ in range(4):
        x = x - lr * factors**2 * 2 * (inner["W"].T @ (inner["W"] @ x - inner["y"]))
    torch.testing.assert_close(end * factors, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "family",
    [
        Rescaled(TEXT, tensor_scale=0.4, coordinate_scale=0.2),
        make("text-transformer", dim=4, num_layers=1, batch_size=2, context=4),
    ],
    ids=["rescaled", "transformer"],
)
def test_meta_gradients_are_the_same_however_tasks_are_run(family: TaskFamily) -> None:
    rule = make_rule("small-mlp")
    found = []
    for execution in (Execution(), Execution(chunk_size=3), Execution(mixed_mode=True)):
        loop = InnerLoop(family, rule, execution)
        theta = {k: v + 0.05 for k, v in loop.init_theta(seeded()).items()}
        estimator, tasks = Unrolled(3), family.sample(3, seeded(1))
        estimate = estimator.estimate(loop, theta, SumOfLosses(), estimator.start(loop, theta, tasks, seeded()))
        found.append((estimate.loss, estimate.grads))
    assert any(float(g.abs().max()) > 1e-6 for g in found[0][1].values())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-12)
