# %% [markdown]
# # Few-shot learning with implicit gradients
#
# Five points of a sine wave are to be enough. What is learned is where the network starts: each task's own training is
# pulled towards that start by a proximal term and solved, and the gradient of the *solution* with respect to the start
# comes from one linear system (iMAML, Rajeswaran et al. 2019). The way to the solution is not back-propagated through.

# %%
import torch

import learnedopt
from learnedopt import (
    ConjugateGradient,
    Execution,
    FinalLoss,
    Implicit,
    InnerLoop,
    MetaTrainer,
    Proximal,
    Tape,
    Unrolled,
    Validation,
)

family = learnedopt.tasks.make("sine", shots=5, hidden=(20,), dtype="float64")
example = family.init_params(family.sample(1, torch.Generator()))
template = {name: value[0] for name, value in example.items()}  # one task's parameters

rule = learnedopt.optimizers.make("maml", lr=0.01, template=template)  # a learned start, and plain descent
loop = InnerLoop(family, rule, Execution(chunk_size=16), Proximal(template, strength=5.0))

# %% [markdown]
# How exact is the gradient? Beside back-propagation through all 100 steps, on eight waves:

# %%
generator = torch.Generator().manual_seed(0)
theta, tasks = loop.init_theta(generator), family.sample(8, generator)
implicit = Implicit(100, ConjugateGradient(20), tolerance=1.0)
found = implicit.estimate(loop, theta, FinalLoss(), loop.start(tasks))
exact = Unrolled(100).estimate(loop, theta, FinalLoss(), loop.start(tasks))
flat = [torch.cat([estimate.grads[name].flatten() for name in sorted(theta)]) for estimate in (found, exact)]
print(f"cosine between the two {torch.nn.functional.cosine_similarity(*flat, dim=0):.4f}")
print(f"stationarity {found.info['stationarity']:.1e}, residual of the system {found.info['residual']:.1e}")

# %% [markdown]
# The two differ by what the inner problem is short of its solution: `stationarity` is 0 at the solution and 1 at the
# start. `tolerance` says from where on a warning is due. Now meta-train the start:

# %%
held_out = Validation(loop, FinalLoss(), num_steps=100, num_tasks=64, every=60, seed=1)
trainer = MetaTrainer(
    loop, Implicit(40, ConjugateGradient(10), tolerance=1.0), FinalLoss(),
    lambda params: torch.optim.Adam(params, 0.01), num_tasks=16, validation=held_out, tracker=None, theta=theta,
)  # fmt: skip
before = held_out.measure(theta)
result = trainer.run(num_meta_steps=60)
print(f"squared error on other points of fresh waves: {before:.2f} at random, {result.best_value:.2f} learned")
assert result.best_value < 0.9 * before

# %% [markdown]
# Adapt to 200 new waves, step by step, from the random start and from the learned one:

# %%
waves = family.sample(200, torch.Generator().manual_seed(7))
for num_steps in (0, 10, 40, 100):
    errors = []
    for start in (theta, result.best_theta):
        end = loop.run(start, loop.start(waves), num_steps, Tape.NONE).end
        errors.append(float(loop.losses(start, end, "valid").median()))
    print(f"{num_steps:3} steps: median error {errors[0]:.2f} from a random start, {errors[1]:.2f} learned")

# %% [markdown]
# MAML is the same loop without `Proximal`, with `Unrolled(num_steps)`. On images of your own:
# [how to](../how_to/few_shot_images.md).
