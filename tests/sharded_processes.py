"""What two processes do side by side for the tests of sharded parameters: train one net in every way of sharing it."""

from __future__ import annotations

import datetime
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from learnedopt import Guard, LearnedOptimizer, UpdateRule
from learnedopt.core import tree
from learnedopt.core.tree import Theta
from learnedopt.optimizers import Adam, Momentum, Muon, make

NUM_STEPS = 20
HALF = NUM_STEPS // 2
WORLD = 2


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a net whose matrices' rows two processes share 2 + 2, 2 + 1 and 1 + 0."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return eight examples; the first four are the first process's where data are shared."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs[:, :1].sin() + 0.1 * torch.randn(8, 1, generator=generator)


def made(name: str) -> str | tuple[UpdateRule, Theta]:
    """Return a rule by the name that the tests call it."""
    rules: dict[str, Callable[[], UpdateRule]] = {
        "adam": lambda: Adam(lr=0.01, eps=1e-3),
        "too fast": lambda: Momentum(lr=3.0),
        "muon": lambda: Muon(lr=0.01),
        "small-mlp": lambda: make("small-mlp", step_scale=0.1),
        "maml": lambda: make("maml", template=dict(net().named_parameters()), lr=0.1),
    }
    if name not in rules:
        return name
    rule = rules[name]()
    return rule, rule.init_theta(torch.Generator().manual_seed(5))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    parts: Sequence[slice],
    *,
    with_loss: bool = False,
) -> None:
    """Train on the mean loss of these parts of each step's batch."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for part in parts:
            inputs, targets = (x[part].to(dtype) for x in batch(step))
            loss = (model(inputs) - targets).square().mean() / len(parts)
            loss.backward()
            total += loss.detach()
        told: dict[str, Any] = {"loss": total} if with_loss else {}
        optimizer.step(**told)


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by the names that they have in the net alone."""
    return {
        name.removeprefix("module.").removeprefix("_fsdp_wrapped_module."): p for name, p in model.named_parameters()
    }


def optimizer_of(model: nn.Module, rule: str, **options: Any) -> LearnedOptimizer:
    """Return the optimizer of a model, whole or sharded."""
    options = {"num_steps": NUM_STEPS, "adopt_start": rule == "maml", "guard": False, **options}
    return LearnedOptimizer(named(model).items(), made(rule), **options)


class Way(NamedTuple):
    """A way for processes to share a net.

    Where they share the data as well, one process has the same gradients, to the bit, of the parts added up. A net that
    is shared inside sums otherwise; in float64, so that no rule makes more of that than can be told from a mistake.
    """

    share: Callable[[nn.Sequential], nn.Module]
    shares_data: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.float32 if self.shares_data else torch.float64

    @property
    def parts(self) -> list[slice]:
        """Of a batch, for each process."""
        size = 8 // WORLD
        everything = [slice(None)] * WORLD
        return [slice(i * size, (i + 1) * size) for i in range(WORLD)] if self.shares_data else everything


def _fully_sharded(model: nn.Sequential, mesh: Any) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _tensor_parallel(model: nn.Sequential, mesh: Any) -> nn.Module:
    # The last layer stays an ordinary one on both processes.
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _both(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("data", "tensor"))
    return _fully_sharded(_tensor_parallel(model, mesh["tensor"]), mesh["data"])  # pyright: ignore[reportArgumentType]


def _flat(model: nn.Module, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


WAYS: dict[str, Way] = {
    "DDP": Way(DistributedDataParallel),
    "ZeRO": Way(DistributedDataParallel),
    "FSDP1": Way(lambda m: _flat(m, True)),
    "FSDP1 flat": Way(lambda m: _flat(m, False)),
    "FSDP2": Way(lambda m: _fully_sharded(m, init_device_mesh("cpu", (WORLD,)))),
    "tensor parallel": Way(lambda m: _tensor_parallel(m, init_device_mesh("cpu", (WORLD,))), shares_data=False),
    "FSDP2 of tensor parallel": Way(_both),
}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a shared model, whole, by the names they have alone."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {k: p.detach().clone() for k, p in named(model).items()}
    found = {k: p.detach() for k, p in named(model).items()}
    return {k: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for k, p in found.items()}


def shared(way: str, rule: str) -> dict[str, Tensor]:
    """Return where a net is after 20 steps that the processes take together."""
    model = WAYS[way].share(net(WAYS[way].dtype))
    if way == "ZeRO":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch's own doings

        options = {"rule": made(rule), "num_steps": NUM_STEPS, "adopt_start": rule == "maml", "guard": False}
        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=LearnedOptimizer, **options
        )
    else:
        optimizer = optimizer_of(model, rule)
    train(model, optimizer, range(NUM_STEPS), _own(way))
    return whole(model)


def alone(
    way: str,
    rule: str,
    steps: Iterable[int] = range(NUM_STEPS),
    load_from: Path | None = None,
    save_to: Path | None = None,
) -> dict[str, Tensor]:
    """Return where one process is after the same steps, of a net that is loaded before or saved afterwards."""
    model = net(WAYS[way].dtype)
    optimizer = optimizer_of(model, rule)
    if load_from is not None:
        load(model, optimizer, load_from)
    parts = WAYS[way].parts if WAYS[way].shares_data else WAYS[way].parts[:1]
    train(model, optimizer, steps, parts)
    if save_to is not None:
        save(model, optimizer, save_to)
    return whole(model)


def late(rule: str, model: nn.Module, parts: Sequence[slice]) -> LearnedOptimizer:
    """Train at half the rate, with decay, and one matrix in the second half of the steps alone."""
    optimizer = optimizer_of(model, rule, lr=0.5, weight_decay=0.1)
    param = named(model)["2.weight"]
    hook = optimizer.register_step_pre_hook(lambda *_: setattr(param, "grad", None))
    train(model, optimizer, range(HALF), parts)
    hook.remove()
    train(model, optimizer, range(HALF, NUM_STEPS), parts)
    return optimizer


def late_and_sharded(rule: str) -> dict[str, Tensor]:
    """Return where FSDP2 is after ``late``, and how many numbers this process keeps of the first matrix's memory."""
    model = WAYS["FSDP2"].share(net())
    optimizer = late(rule, model, _own("FSDP2"))
    memory = [x for x in optimizer.state[named(model)["0.weight"]].values() if isinstance(x, DTensor)]
    held = [x.numel() for cohort in optimizer._together for x in tree.leaves(cohort.state)]
    counts = [sum(x.to_local().numel() for x in memory), sum(x.numel() for x in memory), sum(held)]
    return {**whole(model), "counts": torch.tensor(counts)}


def guarded(model: nn.Module, parts: Sequence[slice]) -> LearnedOptimizer:
    """Train by a rule that fails here, under a guard with short trials that is told the loss."""
    optimizer = optimizer_of(model, "too fast", guard=Guard(window=6))
    train(model, optimizer, range(NUM_STEPS), parts, with_loss=True)
    return optimizer


def guarded_and_shared(way: str) -> dict[str, Tensor]:
    """Return where a guarded net is, and how often who moves it has changed."""
    model = WAYS[way].share(net(WAYS[way].dtype))
    report = guarded(model, _own(way)).guard_report()
    return {**whole(model), "hand-overs": torch.tensor([report.hand_overs, report.trials])}


def one_has_nothing() -> dict[str, Tensor]:
    """Return the only parameter of a net that ``ZeroRedundancyOptimizer`` gives to one process, under a guard."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Linear(6, 1, bias=False))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LearnedOptimizer, rule=made("adam"))
    train(model, optimizer, range(3), _own("ZeRO"), with_loss=True)
    optimizer.optim.state_dict()
    return whole(model)


def with_half_the_memory() -> dict[str, Tensor]:
    """Return where FSDP2 is by Adam with its averages in bfloat16, and a piece of one of them."""
    model = WAYS["FSDP2"].share(net())
    optimizer = optimizer_of(model, "adam", state_dtype=torch.bfloat16)
    train(model, optimizer, range(NUM_STEPS), _own("FSDP2"))
    memory = optimizer.state[named(model)["0.weight"]]["memory.mean"]
    return {**whole(model), "mean": memory.to_local(), "shape": torch.tensor(memory.shape)}


def saved(way: str, rule: str, folder: Path) -> dict[str, Tensor]:
    """Save after half of the steps, and return where the net is after the others.

    The state is asked for before the first step, too, which must change nothing.
    """
    model = WAYS[way].share(net(WAYS[way].dtype))
    optimizer = optimizer_of(model, rule)
    get_state_dict(model, optimizer)
    train(model, optimizer, range(HALF), _own(way))
    save(model, optimizer, folder)
    train(model, optimizer, range(HALF, NUM_STEPS), _own(way))
    return whole(model)


def resumed(way: str, rule: str, folder: Path) -> dict[str, Tensor]:
    """Return where a net is that is loaded and takes the second half of the steps."""
    model = WAYS[way].share(net(WAYS[way].dtype))
    optimizer = optimizer_of(model, rule)
    load(model, optimizer, folder)
    train(model, optimizer, range(HALF, NUM_STEPS), _own(way))
    return whole(model)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Save a model and its optimizer by ``torch.distributed.checkpoint``."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load what ``save`` saved, on however many processes."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state_dict_loader.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


def _own(way: str) -> list[slice]:
    return [WAYS[way].parts[dist.get_rank()]]


class Job(NamedTuple):
    """Something for all processes to do together; ``run`` returns tensors."""

    name: str
    run: Callable[..., dict[str, Tensor]]
    arguments: tuple[Any, ...]


def work(rank: int, jobs: list[Job], folder: Path) -> None:
    """Do every job; write what each returned, or the error that it raised, to a file of the process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder / 'store'}",
        timeout=datetime.timedelta(seconds=300),
    )  # fmt: skip
    answers: dict[str, Any] = {}
    for job in jobs:
        try:
            answers[job.name] = job.run(*job.arguments)
        except (ValueError, TypeError) as error:
            answers[job.name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        torch.save(answers, folder / f"answers{rank}.pt")
    dist.destroy_process_group()
