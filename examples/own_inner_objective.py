"""An inner objective of one's own: regressions on 5 points are pulled to a centre, which is meta-trained."""

import torch

import learnedopt
from learnedopt import Execution, FinalLoss, InnerLoop, InnerObjective, MetaTrainer, Unrolled, Validation


class Pull(InnerObjective):
    def init_theta(self, generator):
        return {"center": torch.zeros(10), "log_strength": torch.tensor(-2.0)}

    def loss(self, theta, family, params, batch):
        distance = (params["weight"] - theta["center"]).square().sum()
        return family.loss(params, batch) + theta["log_strength"].exp() * distance


family = learnedopt.tasks.make("linear-regression", num_train=5, condition_number=1.0)
rule = learnedopt.optimizers.make("sgd", lr=0.1, learn=())
loop = InnerLoop(family, rule, Execution(chunk_size=100), Pull())
held_out = Validation(loop, FinalLoss(), num_steps=20, num_tasks=100)
trainer = MetaTrainer(loop, Unrolled(20), FinalLoss(), lambda theta: torch.optim.Adam(theta, 0.1), num_tasks=16)
print(f"held-out loss {held_out.measure(trainer.theta):.3f}, trained {held_out.measure(trainer.run(50).theta):.3f}")
