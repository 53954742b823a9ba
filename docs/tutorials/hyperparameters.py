# %% [markdown]
# # Hyperparameters by gradients
#
# Two ways to learn a rate: through many short trainings, and within one training while it goes on, where a
# *bootstrapped target* looks further ahead than the window does (Flennerhag et al. 2022).

# %%
import torch
from torch import nn

import learnedopt
from learnedopt import (
    Bootstrap,
    Execution,
    FinalLoss,
    HyperOptimizer,
    InnerLoop,
    MetaTrainer,
    TargetMatching,
    Unrolled,
    Validation,
)
from learnedopt.optimizers import Momentum, Reparametrized

# %% [markdown]
# ## Many short trainings: unroll
#
# Rate and momentum of heavy ball on random quadratics, through 20 steps. Rates are kept as logarithms, so that a step
# multiplies them.

# %%
rule = Reparametrized(Momentum(lr=1e-3, momentum=0.5, learn=("lr", "momentum")), {"lr": "log"})
loop = InnerLoop(learnedopt.tasks.make("quadratic", dim=4), rule, Execution(chunk_size=32))
held_out = Validation(loop, FinalLoss(), num_steps=20, num_tasks=64)
trainer = MetaTrainer(
    loop, Unrolled(20), FinalLoss(), lambda theta: torch.optim.Adam(theta, 0.1), num_tasks=32, tracker=None
)
before = held_out.measure(trainer.theta)
theta = trainer.run(40).theta
print(f"rate {theta['rule/lr'].exp():.3f}, momentum {theta['rule/momentum']:.2f}")
print(f"loss after 20 steps: {before:.2f} -> {held_out.measure(theta):.2f}")
assert held_out.measure(theta) < 0.5 * before

# %% [markdown]
# ## One training, while it goes on
#
# A regression, and a rate that starts a hundred times too small. `HyperOptimizer` moves the rate by the gradient of the
# loss after its last step; or of the distance to where the run is five steps later, and the rate then moves every fifth
# step only, so by more.

# %%
x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
y = (x.sin() @ torch.linspace(-1, 1, 8)).unsqueeze(1)


def train(make_optimizer, num_steps=300):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = make_optimizer(model)
    for _ in range(num_steps):
        chosen = torch.randint(512, (64,))
        loss = nn.functional.mse_loss(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y)), optimizer


def learned(objective, meta_rate):
    rule = Reparametrized(Momentum(lr=1e-3, momentum=0.0, learn=("lr",)), {"lr": "log"})
    return lambda model: HyperOptimizer(
        model.named_parameters(), rule, 1, objective, lambda theta: torch.optim.Adam(theta, meta_rate)
    )


fixed, _ = train(lambda model: torch.optim.SGD(model.parameters(), lr=1e-3))
tuned = min(train(lambda model, lr=lr: torch.optim.SGD(model.parameters(), lr=lr))[0] for lr in (0.03, 0.1, 0.3))
unrolled, first = train(learned(FinalLoss(), meta_rate=0.1))
ahead, second = train(learned(TargetMatching(Bootstrap(5, 0.1)), meta_rate=0.5))
print(f"SGD at 0.001: {fixed:.3f}, at the best of three rates: {tuned:.3f}")
print(f"learned by the window's end: {unrolled:.3f}, rate {first.theta['rule/lr'].exp():.3f}")
print(f"learned by a bootstrap:      {ahead:.3f}, rate {second.theta['rule/lr'].exp():.3f}")
assert unrolled < fixed and ahead < fixed

# %% [markdown]
# A penalty that is solved to its end, and what cannot be differentiated: [how to](../how_to/hyperparameters.md).
