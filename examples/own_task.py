"""A task family of one's own, curved valleys of random steepness, where Adam's rate and momentum are meta-trained."""

import torch

from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, TaskFamily, Unrolled, Validation, optimizers


class Valley(TaskFamily):
    def sample(self, num_tasks, generator):
        return {k: torch.rand(num_tasks, generator=generator) for k in ("x", "y", "steepness")}

    def init_params(self, tasks):
        return {"x": -tasks["x"], "y": tasks["y"]}

    def batch(self, tasks, step, split):
        return tasks

    def loss(self, params, batch):
        return (1 - params["x"]) ** 2 + 10 * batch["steepness"] * (params["y"] - params["x"] ** 2) ** 2


loop = InnerLoop(Valley(), optimizers.make("adam", lr=0.01, learn=("lr", "beta1")), Execution(chunk_size=100))
held_out = Validation(loop, FinalLoss(), num_steps=20, num_tasks=100)
trainer = MetaTrainer(loop, Unrolled(20), FinalLoss(), lambda theta: torch.optim.Adam(theta, 3e-3), num_tasks=16)
print(f"held-out loss {held_out.measure(trainer.theta):.3f}, trained {held_out.measure(trainer.run(50).theta):.3f}")
