"""An update rule of one's own, meta-trained on random quadratics: ``delta = -lr g / (|g| + softness)``."""

import torch

import learnedopt
from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, Unrolled, UpdateRule, Validation


class SoftSign(UpdateRule):
    def init_theta(self, generator):
        return {"log_lr": torch.tensor(-4.0), "log_softness": torch.tensor(0.0)}

    def init(self, theta, params):
        return params, ()

    def update(self, theta, grads, state, params, loss):
        lr, softness = theta["log_lr"].exp(), theta["log_softness"].exp()
        return {k: -lr * g / (g.abs() + softness) for k, g in grads.items()}, state


loop = InnerLoop(learnedopt.tasks.make("quadratic"), SoftSign(), Execution(chunk_size=100))
held_out = Validation(loop, FinalLoss(), num_steps=20, num_tasks=100)
trainer = MetaTrainer(loop, Unrolled(20), FinalLoss(), lambda theta: torch.optim.Adam(theta, 0.1), num_tasks=16)
print(f"held-out loss {held_out.measure(trainer.theta):.3f}, trained {held_out.measure(trainer.run(50).theta):.3f}")
