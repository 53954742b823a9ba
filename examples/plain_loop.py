"""The plainest loop: one line makes a learned optimizer of torch's, and step() is told the loss.

Fashion-MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

import torch
from torch import nn
from torch.nn import functional

from learnedopt import LearnedOptimizer
from learnedopt.tasks.data import images

NUM_STEPS = 200

if __name__ == "__main__":
    torch.manual_seed(0)
    pixels, labels = images.load("fashion-mnist", "train")
    model = nn.Sequential(nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
    # optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LearnedOptimizer(model.named_parameters(), "general", num_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        chosen = torch.randint(len(labels), (128,))
        loss = functional.cross_entropy(model(pixels[chosen] / 255), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)  # without the loss it works too; with it, the guard sees whether there is progress
    pixels, labels = images.load("fashion-mnist", "valid")
    with torch.no_grad():
        held_out = functional.cross_entropy(model(pixels / 255), labels)
    print(f"held-out loss after {NUM_STEPS} steps: {held_out:.3f}")
