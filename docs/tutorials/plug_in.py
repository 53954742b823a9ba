# %% [markdown]
# # Plug in, and read the guard's report
#
# A packaged rule trains a small classifier in place of AdamW; then one that is bad for the net is caught.

# %%
import torch
from torch import nn

import learnedopt
from learnedopt import LearnedOptimizer

NUM_STEPS = 150
points = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
labels = (points.norm(dim=1) * 3).long().clamp(max=4)  # five rings


def train(make_optimizer, num_steps=NUM_STEPS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = make_optimizer(model)
    for _ in range(num_steps):
        chosen = torch.randint(512, (64,))
        loss = nn.functional.cross_entropy(model(points[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.step(loss=loss)  # the guard judges by it
        else:
            optimizer.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(points), labels)), optimizer


# %% [markdown]
# AdamW at three rates, and `general` with none:

# %%
for lr in (1e-3, 3e-3, 1e-2):
    loss, _ = train(lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr))
    print(f"AdamW at {lr}: {loss:.3f}")
loss, optimizer = train(lambda model: LearnedOptimizer(model.named_parameters(), "general", num_steps=NUM_STEPS))
print(f"general:        {loss:.3f}")

# %% [markdown]
# Who moved the parameters, and why:

# %%
print(optimizer.guard_report())

# %% [markdown]
# Now a rule that is bad for this net: descent at a rate of 30, as a theta that went wrong may do. Bare, the loss
# explodes; guarded, the fallback takes over from the last good parameters:

# %%
rule = learnedopt.optimizers.make("sgd", lr=30.0, learn=("lr",))
bad = (rule, rule.init_theta(torch.Generator()))
bare, _ = train(lambda model: LearnedOptimizer(model.parameters(), bad, guard=False))
guarded, optimizer = train(lambda model: LearnedOptimizer(model.parameters(), bad))
print(f"bare {bare:.3g}, guarded {guarded:.3g}")
report = optimizer.guard_report()
print(report)
assert report.hand_overs > 0 and guarded < 1.3

# %% [markdown]
# The report is an object too: `report.in_control`, `report.history`, `report.skipped`. What the guard promises, and
# what it cannot see: [the guard](../guard.md). Other loops (Lightning, Accelerate, Hugging Face):
# [plug in](../plug_in.md).
