# %% [markdown]
# # Meta-train in five minutes
#
# An LSTM becomes an optimizer. It sees one coordinate's gradient at a time, keeps a memory for it, and says where it
# goes; its weights are trained through the steps that it takes (Andrychowicz et al. 2016). Small settings: seconds on
# one core.

# %%
import torch

import learnedopt
from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, SumOfLosses, Tape, Truncated, Validation

family = learnedopt.tasks.make("quadratic", dim=4)  # f(x) = |W x - y|^2, W and y random: each task another one
rule = learnedopt.optimizers.make("lstm", hidden_size=8)
loop = InnerLoop(family, rule, Execution(chunk_size=64))  # 64 quadratics run together

# %% [markdown]
# Theta, all that is learned, is a dict of tensors:

# %%
theta = loop.init_theta(torch.Generator().manual_seed(0))
print({name: tuple(entry.shape) for name, entry in theta.items()})

# %% [markdown]
# Episodes have 20 steps, cut into windows of 10 through which gradients flow. The objective is the sum of the losses on
# the way. Held-out quadratics say how good theta is, before and after.

# %%
held_out = Validation(loop, FinalLoss(), num_steps=20, num_tasks=64, every=20)
trainer = MetaTrainer(
    loop, Truncated(10, horizon=20), SumOfLosses(), lambda params: torch.optim.Adam(params, 0.01),
    num_tasks=64, validation=held_out, tracker=None,
)  # fmt: skip
print(f"untrained: loss {held_out.measure(trainer.theta):.2f} after 20 steps")
result = trainer.run(num_meta_steps=100)
print(f"trained:   loss {result.best_value:.2f}")
assert result.best_value < 0.5 * held_out.measure(theta)

# %% [markdown]
# Beside gradient descent at its best rate, step by step on quadratics that neither saw:

# %%
tasks = family.sample(64, torch.Generator().manual_seed(123))


def losses(rule, theta):
    own = InnerLoop(family, rule, Execution(chunk_size=64))
    return own.run(theta, own.start(tasks), 21, Tape.NONE).losses.mean(1)


curves = {f"sgd at {lr}": losses(learnedopt.optimizers.make("sgd", lr=lr, learn=()), {}) for lr in (0.01, 0.03, 0.1)}
curves["lstm"] = losses(rule, result.best_theta)
for name, curve in curves.items():
    print(f"{name:11}", " ".join(f"{float(curve[step]):7.2f}" for step in (0, 5, 10, 20)))

# %% [markdown]
# What was learned is an optimizer for any module, as good as its training was long: this one knows quadratics of four
# numbers.

# %%
path = learnedopt.save("my-lstm", rule, result.best_theta)
model = torch.nn.Linear(4, 4)
optimizer = learnedopt.LearnedOptimizer(model.parameters(), path)
print(learnedopt.card(path))

# %% [markdown]
# Next: [the engine on one page](../engine.md), and the same from the command line: `learnedopt train lstm-quadratic`.
