"""A plain training loop on MNIST in which one line changes: the optimizer.

MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from learnedopt import LearnedOptimizer
from learnedopt.tasks.data import images


def train(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> float:
    """Train for 100 steps and return the loss on held-out images; the seed gives the start and the batches."""
    torch.manual_seed(seed)
    pixels, labels = images.load("mnist", "train")
    model = nn.Sequential(nn.Linear(28 * 28, 20), nn.Sigmoid(), nn.Linear(20, 10))
    optimizer = make_optimizer(model)
    for _ in range(100):
        chosen = torch.randint(len(labels), (128,))
        loss = functional.cross_entropy(model(pixels[chosen] / 255), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels, labels = images.load("mnist", "valid")
    with torch.no_grad():
        return float(functional.cross_entropy(model(pixels / 255), labels))


if __name__ == "__main__":
    optimizers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.03),  # the best of a grid of rates
        "lstm-mnist": lambda model: LearnedOptimizer(model.parameters(), "lstm-mnist"),
        "general": lambda model: LearnedOptimizer(model.named_parameters(), "general", num_steps=100),
    }
    for name, make_optimizer in optimizers.items():
        losses = [train(make_optimizer, seed) for seed in range(3)]
        print(f"{name:12} loss after 100 steps: {sum(losses) / len(losses):.3f}, mean of {len(losses)} runs")
