"""Fully sharded parameters (FSDP2) with a learned optimizer: two processes on the CPU, each with a half of the model.

Fashion-MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from learnedopt import LearnedOptimizer
from learnedopt.tasks.data import images

WORLD_SIZE, NUM_STEPS, BATCH_SIZE = 2, 100, 64


def train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(0)  # the same start in both
    model = nn.Sequential(nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    # optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LearnedOptimizer(model.named_parameters(), "general", num_steps=NUM_STEPS)

    pixels, labels = images.load("fashion-mnist", "train")
    generator = torch.Generator().manual_seed(rank)  # batches of its own for each
    for _ in range(NUM_STEPS):
        chosen = torch.randint(len(labels), (BATCH_SIZE,), generator=generator)
        loss = functional.cross_entropy(model(pixels[chosen] / 255), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # leaves the mean gradient of both in .grad, each its part
        optimizer.step(loss=loss)

    pixels, labels = images.load("fashion-mnist", "valid")
    with torch.no_grad():
        held_out = functional.cross_entropy(model(pixels / 255), labels)
    if rank == 0:
        print(f"held-out loss after {NUM_STEPS} steps: {held_out:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, (folder,), nprocs=WORLD_SIZE)
