"""A plain training loop on MNIST in which one line changes: the optimizer.

Run ``python examples/plug_into_mnist.py``. MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from learnedopt import LearnedOptimizer
from learnedopt.tasks import images


def train(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[float, float]:
    """Train for 100 steps; return loss and accuracy on held-out images."""
    torch.manual_seed(0)  # the same start and the same batches for each optimizer
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
        logits = model(pixels / 255)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return float(functional.cross_entropy(logits, labels)), float(accuracy)


if __name__ == "__main__":
    optimizers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.03),  # the best of a grid of rates
        "lstm-mnist": lambda model: LearnedOptimizer(model.parameters(), "lstm-mnist"),
    }
    for name, make_optimizer in optimizers.items():
        loss, accuracy = train(make_optimizer)
        print(f"{name:12} loss after 100 steps {loss:.3f}, accuracy {accuracy:.1%}")
