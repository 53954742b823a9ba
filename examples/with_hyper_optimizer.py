"""Rates that are learned while one run goes on: Adam's for each tensor, started 100 times too small.

Fashion-MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

import torch
from torch import nn
from torch.nn import functional

from learnedopt import HyperOptimizer
from learnedopt.optimizers import Adam, Reparametrized, per_tensor
from learnedopt.tasks.data import images

NUM_STEPS, LR = 300, 5e-5


def train(learn: bool) -> float:
    """Train and return the loss on held-out images, with rates that are learned or stay where they start."""
    torch.manual_seed(0)
    pixels, labels = images.load("fashion-mnist", "train")
    model = nn.Sequential(nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if learn:
        rule = per_tensor(Adam(LR, learn=("lr",)), dict(model.named_parameters()))
        rule = Reparametrized(rule, {"*/lr": "log"})  # logarithms: a step multiplies a rate
        optimizer = HyperOptimizer(
            model.named_parameters(), rule, meta_optimizer=lambda theta: torch.optim.Adagrad(theta, lr=1.0)
        )
    for _ in range(NUM_STEPS):
        chosen = torch.randint(len(labels), (128,))
        loss = functional.cross_entropy(model(pixels[chosen] / 255), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if isinstance(optimizer, HyperOptimizer):
        rates = {name: float(value.exp()) for name, value in optimizer.theta.items()}
        print("learned:", ", ".join(f"{name} {rate:.1e}" for name, rate in rates.items()))
    pixels, labels = images.load("fashion-mnist", "valid")
    with torch.no_grad():
        return float(functional.cross_entropy(model(pixels / 255), labels))


if __name__ == "__main__":
    print(f"held-out loss with rates of {LR:.0e}: {train(learn=False):.3f}, learned: {train(learn=True):.3f}")
