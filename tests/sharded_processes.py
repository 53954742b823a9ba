"""What two processes do side by side for the tests of sharded parameters: train one net in every way of sharing it."""

from __future__ import annotations

import datetime
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from learnedopt import LearnedOptimizer, UpdateRule
from learnedopt.core.tree import Theta
from learnedopt.optimizers import Adam, Momentum, Muon, make

NUM_STEPS = 20
HALF = NUM_STEPS // 2
WORLD = 2
LAYERS = ("0", "2", "4")


def net() -> nn.Sequential:
    """Matrices whose rows two processes share 2 + 2, 2 + 1 and 1 + 0."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Eight examples; the first four are the first process's where data are shared."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs[:, :1].sin() + 0.1 * torch.randn(8, 1, generator=generator)


def made(name: str) -> str | tuple[UpdateRule, Theta]:
    """Return a rule by the name that the tests call it."""
    rules: dict[str, Callable[[], UpdateRule]] = {
        "adam": lambda: Adam(lr=0.01, eps=1e-3),
        "momentum": lambda: Momentum(lr=0.05),
        "muon": lambda: Muon(lr=0.01),
        "small-mlp": lambda: make("small-mlp", step_scale=0.1),
        "maml": lambda: make("maml", template=dict(net().named_parameters()), lr=0.1),
    }
    if name not in rules:
        return name
    rule = rules[name]()
    return rule, rule.init_theta(torch.Generator().manual_seed(5))


def optimizer_of(params: Iterable[tuple[str, Tensor]], rule: str) -> LearnedOptimizer:
    """Return the optimizer of a model, whole or sharded."""
    return LearnedOptimizer(params, made(rule), num_steps=NUM_STEPS, adopt_start=rule == "maml")


class Way(NamedTuple):
    """A way for processes to share a net."""

    share: Callable[[nn.Sequential], nn.Module]
    shares_data: bool = True


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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], part: slice = slice(None)) -> None:
    """Train on each step's batch, or on a part of it."""
    for step in steps:
        inputs, targets = (x[part] for x in batch(step))
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a shared model, whole, by the names they have alone."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            found = {k: p.detach().clone() for k, p in model.named_parameters()}
    else:
        found = {k: p.detach() for k, p in model.named_parameters()}
    full = {k: p.full_tensor() if isinstance(p, DTensor) else p for k, p in found.items()}
    return {k.removeprefix("module.").removeprefix("_fsdp_wrapped_module."): p.clone() for k, p in full.items()}


def shared(way: str, rule: str) -> dict[str, Tensor]:
    """Return where a net is after 20 steps that the processes take together."""
    model = WAYS[way].share(net())
    if way == "ZeRO":
        options = {"rule": made(rule), "num_steps": NUM_STEPS, "adopt_start": rule == "maml"}
        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=LearnedOptimizer, **options
        )
    else:
        optimizer = optimizer_of(model.named_parameters(), rule)
    train(model, optimizer, range(NUM_STEPS), _part(way))
    return whole(model)


def saved(way: str, rule: str, folder: Path) -> dict[str, Tensor]:
    """Save after half of the steps, and return where the net is after the others.

    The state is asked for before the first step, too, which must change nothing.
    """
    model = WAYS[way].share(net())
    optimizer = optimizer_of(model.named_parameters(), rule)
    get_state_dict(model, optimizer)
    train(model, optimizer, range(HALF), _part(way))
    save(model, optimizer, folder)
    train(model, optimizer, range(HALF, NUM_STEPS), _part(way))
    return whole(model)


def resumed(way: str, rule: str, folder: Path) -> dict[str, Tensor]:
    """Return where a net is that is loaded and takes the second half of the steps."""
    model = WAYS[way].share(net())
    optimizer = optimizer_of(model.named_parameters(), rule)
    load(model, optimizer, folder)
    train(model, optimizer, range(HALF, NUM_STEPS), _part(way))
    return whole(model)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Save a model and its optimizer by ``torch.distributed.checkpoint``."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(parts, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load what ``save`` saved, on however many processes."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def _part(way: str) -> slice:
    count = 8 // WORLD
    return slice(dist.get_rank() * count, (dist.get_rank() + 1) * count) if WAYS[way].shares_data else slice(None)


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
        "gloo", rank=rank, world_size=WORLD, store=dist.FileStore(str(folder / "store"), WORLD),
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
