"""A packaged rule, meta-trained further on one's own model and data, saved, and plugged in.

`normalised-mlp-mnist` was meta-trained on sigmoid units and MNIST; here it learns ReLU units and Fashion-MNIST, by
evolution strategies: whole trainings of 50 steps with theta perturbed. Few and noisy meta-steps are enough for that.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import learnedopt
from learnedopt import EvolutionStrategies, FinalLoss, InnerLoop, LearnedOptimizer, LogMeans, MetaTrainer, Validation
from learnedopt.tasks import ModuleFamily
from learnedopt.tasks.data import images

NUM_STEPS = 50


def load(meta_split: images.MetaSplit) -> tuple[Tensor, Tensor]:
    pixels, labels = images.load("fashion-mnist", meta_split)
    return functional.avg_pool2d(pixels.view(-1, 28, 28) / 255, 2).flatten(1), labels


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(14 * 14, 16), nn.ReLU(), nn.Linear(16, 10))


def drawn_from(pixels: Tensor, labels: Tensor) -> Callable[[int, int, str], tuple[Tensor, Tensor]]:
    def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        """A batch, the same whenever it is asked for: a task is a seed, of the model's start and of its batches."""
        mixed = 1_000_003 * seed + 2 * step + (split == "valid")
        chosen = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(mixed % 2**32))
        return pixels[chosen], labels[chosen]

    return data


def train(rule: str | Path) -> float:
    """Train one model by a saved rule and return its loss on held-out images."""
    torch.manual_seed(0)
    model = build()
    optimizer = LearnedOptimizer(model.named_parameters(), rule, num_steps=NUM_STEPS)
    data = drawn_from(*load("train"))
    for step in range(NUM_STEPS):
        pixels, labels = data(0, step, "train")
        loss = functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    pixels, labels = load("valid")
    with torch.no_grad():
        return float(functional.cross_entropy(model(pixels), labels))


if __name__ == "__main__":
    rule, theta = learnedopt.load("normalised-mlp-mnist")
    family = ModuleFamily(build, functional.cross_entropy, drawn_from(*load("train")))
    loop = InnerLoop(family, rule, horizon=NUM_STEPS)
    trainer = MetaTrainer(
        loop, EvolutionStrategies(NUM_STEPS, num_pairs=4, sigma=0.3), LogMeans(),
        lambda params: torch.optim.Adam(params, 0.3, betas=(0.8, 0.95)), theta=theta,
    )  # fmt: skip
    found = trainer.run(20)

    fresh = loop.on(ModuleFamily(build, functional.cross_entropy, drawn_from(*load("valid"))))
    held_out = Validation(fresh, FinalLoss(), NUM_STEPS, num_tasks=16)
    print(f"loss on fresh tasks: packaged {held_out.measure(theta):.3f}, tuned {held_out.measure(found.theta):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        saved = learnedopt.save(f"{folder}/my-rule", rule, found.theta, {"trained_on": "Fashion-MNIST, 16 ReLU units"})
        print(f"plugged into a plain loop: {train(saved):.3f}")
