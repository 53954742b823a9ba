"""Parameters that two processes share, in every way that torch has: where one process goes, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from plug_in_cases import bare
from sharded_pieces import pieces
from sharded_processes import (
    HALF,
    NUM_STEPS,
    WAYS,
    Job,
    alone,
    guarded,
    guarded_and_shared,
    late,
    late_and_sharded,
    net,
    one_has_nothing,
    optimizer_of,
    resumed,
    saved,
    shared,
    train,
    whole,
    with_half_the_memory,
    work,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.testing._internal.two_tensor import TwoTensor

from learnedopt import HyperOptimizer, LearnedOptimizer
from learnedopt.core.rule import Kernel
from learnedopt.core.tree import Params
from learnedopt.optimizers import Adam, Momentum, make
from learnedopt.plug_in import shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process saves, too

COORDINATEWISE = ("adam", "lstm-mnist")
RULES = ("adam", "lstm-mnist", "general", "normalised-mlp-mnist", "maml")
GUARDED = ("DDP", "FSDP1", "FSDP2", "tensor parallel", "FSDP2 of tensor parallel")
LATE = ("lstm-mnist", "adam", "general", "normalised-mlp-mnist")
SAVED = (
    ("FSDP2", "lstm-mnist"),
    ("FSDP2", "general"),
    ("tensor parallel", "adam"),
    ("FSDP2 of tensor parallel", "normalised-lstm-mnist"),
)  # fmt: skip
# What says why: a rule that reads whole tensors has no way to them there.
REFUSED = {
    "ZeRO": "ZeroRedundancyOptimizer gives each process some of the tensors",
    "FSDP1": "FullyShardedDataParallel has left of",
    "FSDP1 flat": "FullyShardedDataParallel has left of",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where two processes have left what they did; they are started once, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    found = (base if worker_id == "master" else base.parent) / "sharded"
    with FileLock(f"{found}.lock"):
        if not found.is_dir():
            found.mkdir()
            jobs = [Job("pieces", pieces, ()), Job("half the memory", with_half_the_memory, ())]
            jobs += [Job("one has nothing", one_has_nothing, ())]
            jobs += [Job(f"guarded, {way}", guarded_and_shared, (way,)) for way in GUARDED]
            jobs += [Job(f"late, {rule}", late_and_sharded, (rule,)) for rule in LATE]
            jobs += [Job(f"{way}, {rule}", shared, (way, rule)) for way in WAYS for rule in RULES]
            for way, rule in SAVED:
                by_one, by_two = found / f"one, {way}, {rule}", found / f"two, {way}, {rule}"
                alone(way, rule, range(HALF), save_to=by_one)
                jobs.append(Job(f"saved {way}, {rule}", saved, (way, rule, by_two)))
                jobs.append(Job(f"resumed {way}, {rule}", resumed, (way, rule, by_one)))
            torch.multiprocessing.spawn(work, (jobs, found), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    return found


def answers(folder: Path, job: str) -> list[Any]:
    return [torch.load(folder / f"answers{rank}.pt")[job] for rank in range(2)]


def assert_there(found: Any, expected: dict[str, Tensor]) -> None:
    assert not isinstance(found, str), found
    tolerance = 1e-6 if expected["0.weight"].dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_where_one_goes_or_say_why_not(folder: Path, way: str, rule: str) -> None:
    found = answers(folder, f"{way}, {rule}")
    if way in REFUSED and rule not in COORDINATEWISE:
        assert all(isinstance(each, str) and REFUSED[way] in each and "fully_shard" in each for each in found), found
        return
    expected = alone(way, rule)
    for each in found:
        assert_there(each, expected)


@pytest.mark.parametrize(("way", "rule"), SAVED, ids=[f"{way}, {rule}" for way, rule in SAVED])
def test_a_state_goes_through_a_checkpoint_to_other_numbers_of_processes(folder: Path, way: str, rule: str) -> None:
    expected = alone(way, rule)
    for found in (*answers(folder, f"saved {way}, {rule}"), *answers(folder, f"resumed {way}, {rule}")):
        assert_there(found, expected)
    assert_there(alone(way, rule, range(HALF, NUM_STEPS), load_from=folder / f"two, {way}, {rule}"), expected)


def test_pieces_come_together_again(folder: Path) -> None:
    for found in answers(folder, "pieces"):
        assert not isinstance(found, str), found
        assert len(found) > 20
        assert all(found.values()), [k for k, right in found.items() if not right]


@pytest.mark.parametrize("rule", LATE)
def test_rates_decay_and_parameters_without_gradients_are_what_they_are_in_one_process(folder: Path, rule: str) -> None:
    model = net()
    late(rule, model, WAYS["FSDP2"].parts)
    for found in answers(folder, f"late, {rule}"):
        assert not isinstance(found, str), found
        here, everywhere, held = found.pop("counts").tolist()
        assert_there(found, whole(model))
        assert everywhere == 2 * here > 0
        # What is gathered is gone after the step; coordinatewise rules hold what lies here, views of it in the state.
        assert (held > 0) == (rule in COORDINATEWISE)


@pytest.mark.parametrize("way", GUARDED)
def test_a_guard_says_the_same_on_all_processes(folder: Path, way: str) -> None:
    model = net(WAYS[way].dtype)
    report = guarded(model, WAYS[way].parts if WAYS[way].shares_data else WAYS[way].parts[:1]).guard_report()
    assert report.hand_overs > 0
    for found in answers(folder, f"guarded, {way}"):
        assert not isinstance(found, str), found
        assert found.pop("hand-overs").tolist() == [report.hand_overs, report.trials]
        assert_there(found, whole(model))


def test_a_process_may_have_no_parameters(folder: Path) -> None:
    one, other = answers(folder, "one has nothing")
    assert not isinstance(one, str), one
    assert one["weight"].equal(other["weight"])


def test_a_piece_of_the_memory_may_be_kept_in_bfloat16(folder: Path) -> None:
    for found in answers(folder, "half the memory"):
        assert not isinstance(found, str), found
        assert found.pop("mean").dtype == torch.bfloat16
        assert found.pop("shape").tolist() == [4, 6]
        torch.testing.assert_close(found, alone("FSDP2", "adam"), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rule", ["adam", "lstm-mnist", "general"])
def test_asking_for_the_state_before_the_first_step_changes_nothing(rule: str) -> None:
    model = net()
    optimizer = optimizer_of(model, rule)
    get_state_dict(model, optimizer)
    assert {entry["step"] for entry in optimizer.state.values()} == {0}
    train(model, optimizer, range(NUM_STEPS), WAYS["DDP"].parts)
    torch.testing.assert_close(whole(model), alone("DDP", rule), rtol=0, atol=0)


def with_odd(param: Tensor) -> Iterable[tuple[str, Tensor]]:
    return [("weight", torch.nn.Parameter(torch.ones(2))), ("odd", param)]


def test_a_tensor_subclass_that_is_not_known_is_refused_by_name() -> None:
    halves = [torch.ones(3), torch.ones(3)]
    param = torch.nn.Parameter(TwoTensor(*halves))
    rule = Adam()
    for optimizer in (LearnedOptimizer, HyperOptimizer):
        with pytest.raises(TypeError, match=r"'odd' is a torch\.testing\S*\.TwoTensor, a tensor subclass"):
            optimizer(with_odd(param), (rule, rule.init_theta(torch.Generator())))  # pyright: ignore[reportArgumentType]
    assert all(half.eq(1).all() for half in halves)


def test_a_name_of_its_own_makes_no_other_tensor_of_a_parameter() -> None:
    class Tagged(torch.nn.Parameter):
        pass

    rule, param = Momentum(lr=0.5), Tagged(torch.ones(3))
    optimizer = bare(with_odd(param), (rule, rule.init_theta(torch.Generator())))
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.detach().eq(0.5).all()


def test_one_run_does_not_learn_from_pieces() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue] - as FullyShardedDataParallel marks it
    with pytest.raises(ValueError, match=r"HyperOptimizer learns from whole parameters, and of 'odd'"):
        HyperOptimizer(with_odd(param), Momentum())


@pytest.mark.parametrize("name", ["lstm", "small-mlp", "normalised-mlp"])
def test_no_kernel_reads_the_pointer_of_a_subclass(name: str) -> None:
    rule = make(name).within(10)
    theta = rule.init_theta(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    params, grads = ({"w": torch.randn(3, 2, generator=generator)} for _ in range(2))
    odd: Params = {"w": TwoTensor(grads["w"], grads["w"])}
    state, loss, kernel = rule.init(theta, params)[1], torch.tensor(0.0), rule.kernel or Kernel()
    with torch.no_grad():
        assert kernel.step(theta, odd, state, params, loss) is None
        assert kernel.update_in_place(theta, odd, state, params, loss) is None
        assert not kernel.step_in_place(theta, odd, state, params, loss)
        found = rule.update(theta, odd, state, params, loss)[0]["w"]
        expected = rule.update(theta, grads, state, params, loss)[0]["w"]
    torch.testing.assert_close(found.a if isinstance(found, TwoTensor) else found, expected, rtol=1e-5, atol=1e-7)


def test_a_parameter_that_is_not_sharded_is_seen_and_kept_as_it_is() -> None:
    param, leaf = torch.nn.Parameter(torch.ones(3)), torch.ones(4, 3)
    assert shards.local(param) is param
    assert shards.gathered(param) is param
    for gather in (True, False):
        assert shards.kept(leaf, param, gather) is leaf
        assert shards.recalled(leaf, param, gather) is leaf
        assert shards.own_piece(leaf, param, gather) is leaf
