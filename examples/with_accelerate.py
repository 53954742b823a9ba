"""A loop with Accelerate in which one line changes: the optimizer.

Fashion-MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from learnedopt import LearnedOptimizer
from learnedopt.tasks.data import images

EPOCHS, BATCH_SIZE, NUM_IMAGES = 2, 128, 12_800

if __name__ == "__main__":
    set_seed(0)
    accelerator = Accelerator()
    model = nn.Sequential(nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
    pixels, labels = images.load("fashion-mnist", "train")
    data = TensorDataset(pixels[:NUM_IMAGES] / 255, labels[:NUM_IMAGES])
    batches = DataLoader(data, BATCH_SIZE, shuffle=True)

    num_steps = EPOCHS * len(batches) // accelerator.num_processes
    # optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LearnedOptimizer(model.named_parameters(), "general", num_steps=num_steps)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    for _ in range(EPOCHS):
        for pixels, labels in batches:
            loss = functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            # Accelerate hands on a closure but no loss=; step() works too, the guard then sees gradients alone.
            optimizer.step(lambda: loss)  # noqa: B023 - called at once

    pixels, labels = (x.to(accelerator.device) for x in images.load("fashion-mnist", "valid"))
    with torch.no_grad():
        held_out = functional.cross_entropy(model(pixels / 255), labels)
    accelerator.print(f"held-out loss after {num_steps} steps: {held_out:.3f}")
