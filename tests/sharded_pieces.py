"""Tensors cut in every way between two processes, and what becomes of their pieces."""

from __future__ import annotations

from typing import Any

import torch
from sharded_processes import WORLD
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from learnedopt.plug_in import shards


def pieces() -> dict[str, Tensor]:
    """Return of each way to cut a tensor whether its pieces, and those of its memory, are what they should be."""
    right: dict[str, Tensor] = {}
    line, grid = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (1, WORLD))
    cuts: list[tuple[Any, list[Any]]] = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    cuts += [(grid, [Shard(1), Shard(0)]), (grid, [Replicate(), Shard(1)]), (grid, [Shard(0), Shard(0)])]
    for mesh, placements in cuts:
        for shape in ((4, 6), (3, 5), (1, 1), (2, 3, 2)):
            values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
            param = distribute_tensor(values, mesh, placements)
            here = shards.local(param)
            memory = torch.stack([values, -values])
            name = f"{placements} of {shape}"
            for gather, seen in ((True, memory), (False, torch.stack([here, -here]))):
                kept = shards.kept(seen, param, gather)
                again = shards.recalled(kept, param, gather)
                same = shards.gathered(kept).equal(memory) and again.equal(seen)
                cut = shards.local(kept).equal(torch.stack([here, -here])) and kept.shape == memory.shape
                loaded = shards.recalled(memory, param, gather).equal(seen)
                right[f"{name}, {gather}"] = torch.tensor(same and cut and loaded)
            summed = DTensor.from_local(values, mesh, [Partial()] * mesh.ndim, run_check=False)
            gradient = shards.local(summed, param).equal(WORLD * here)
            right[f"{name}, gradient"] = torch.tensor(gradient and shards.own_piece(values, param, True).equal(here))
            odd = distribute_tensor((values == values.numel() - 1).float(), mesh, placements)
            right[f"{name}, zero"] = torch.tensor(
                shards.all_zero([0 * param]) and not shards.all_zero([0 * param, odd])
            )
    try:
        shards.require_known([("w", summed)])
    except ValueError as error:
        right["partial"] = torch.tensor("'w' is a DTensor with placements (Partial" in str(error))
    return right
