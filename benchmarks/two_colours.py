"""The two-colours grid: a bootstrapped target against the ordinary meta-gradient and a fixed entropy weight.

The experiment of Flennerhag et al. 2022, "Bootstrapped Meta-Learning", section 5.1: an actor-critic learns on, from one
stream of experience, in a world whose rewards change sign every 100,000 steps. To learn again it has to explore again,
and it can do so by its entropy weight alone, which a small network of the last rewards says. What the network learns
from is the difference between the methods:

- ``bmg``: KL to the policy sixteen updates ahead, back-propagated through one update (K = 1, L = 16);
- ``mg``: the policy loss after one update (K = 1), less the entropy times ``outer_entropy``;
- ``fixed``: nothing; the weight stays at ``start``.

Agent and numbers are those of the paper as far as it and Luketina et al. 2022, "Meta-Gradients in Non-Stationary
Environments" (appendix A.2 and A.3, the same experiment), say them: two networks of two layers of 256 ReLU units, an
update by gradient descent at 0.1 every 16 steps, losses averaged over these, discount .99, Adam with eps = 1e-4 on a
network of 32 ReLU units and a sigmoid that sees the mean rewards of the last ten rollouts. Choices of ours where
nothing is said: returns run to the end of a rollout and go on with the value there; weights start from N(0, 1/fan_in),
cut off at two standard deviations, so that the entropy weight starts close to a half; the divergence is summed over the
16 states of the target's last rollout (with a mean the gradients vanish against Adam's eps); the meta-rates below.

Run ``python benchmarks/two_colours.py bmg``, then with ``mg`` and ``fixed``, then ``report``. A run goes on from its
checkpoint where it was stopped, and writes its curve to ``<name>.json`` as it goes. On a free core an update of all six
agents with its rollout takes about 4 ms, and about twice that where it is back-propagated through: a whole life should
take half an hour with ``bmg`` or ``fixed``, an hour with ``mg``. None has been run to its end yet.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

import learnedopt
from benchmarks.two_colours_agent import EntropyWeighted, NextPolicyLoss, PlayedBootstrap, TwoColours
from benchmarks.two_colours_report import report
from learnedopt import InnerLoop, MetaTrainer, Unrolled
from learnedopt.core.files import write_atomically

META_RATES = {"bmg": 1e-3, "mg": 1e-4, "fixed": 0.0}
"""Not tuned: a life has 16 times as many meta-steps of one update as of sixteen, and these go about as far."""


@final
@dataclass(frozen=True)
class Run:
    """One method on several agents for their whole life.

    Args:
        method: "bmg", "mg" or "fixed".
        num_steps: environment steps of each agent.
        num_agents: agents, each with random numbers of its own.
        seed: of all of them.
        lr: of the agents' gradient descent, and of the target's plain step.
        meta_rate: of Adam on the entropy weight's network; by default ``META_RATES``.
        num_target_steps: L of the bootstrapped target.
        start: the entropy weight at the beginning.
        outer_entropy: weight of the entropy in the ordinary meta-gradient's outer loss.
        hidden: units of the agents' layers.
        swap_every: environment steps between two changes of the colours' rewards.
        record_every: environment steps between two points of the curve.
    """

    method: str
    num_steps: int = 6_400_000
    num_agents: int = 6
    seed: int = 1
    lr: float = 0.1
    meta_rate: float | None = None
    num_target_steps: int = 16
    start: float = 0.5
    outer_entropy: float = 0.1
    hidden: int = 256
    swap_every: int = 100_000
    record_every: int = 6_400

    def __post_init__(self) -> None:
        if self.method not in META_RATES:
            raise ValueError(f"method={self.method!r} is none of {sorted(META_RATES)}")

    def trainer(self, checkpoint: Path) -> MetaTrainer:
        """Return the meta-training: windows of one inner step."""
        family = TwoColours(self.num_agents, self.hidden, swap_every=self.swap_every)
        weights = EntropyWeighted(
            self.num_agents,
            start=self.start,
            constant=self.method == "fixed",
            outer_entropy=self.outer_entropy if self.method == "mg" else 0.0,
        )
        rule = learnedopt.optimizers.make("sgd", lr=self.lr, learn=())
        meta_rate = META_RATES[self.method] if self.meta_rate is None else self.meta_rate
        return MetaTrainer(
            InnerLoop(family, rule, inner_objective=weights),
            Unrolled(1),
            NextPolicyLoss() if self.method == "mg" else PlayedBootstrap(self.num_target_steps, self.lr),
            lambda params: torch.optim.Adam(params, meta_rate, eps=1e-4),
            tracker=None,
            seed=self.seed,
            checkpoint=checkpoint,
            checkpoint_every=10**9,
        )

    @property
    def steps_per_window(self) -> int:
        """Environment steps of one meta-step."""
        return TwoColours.rollout_length * (1 if self.method == "mg" else self.num_target_steps)

    def go_on(self, folder: Path, name: str) -> list[dict[str, Any]]:
        """Train to the end, from where it was left, and return the curve.

        Its points hold the environment steps and, of each agent, the total reward and the present entropy weight.

        Raises:
            ValueError: the files under that name are another run's, or do not belong together.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        curve, trainer = self._curve(path), self.trainer(folder / f"{name}.pt")
        every = max(1, self.record_every // self.steps_per_window)
        while len(curve) * every * self.steps_per_window < self.num_steps:
            windows = (len(curve) + 1) * every
            trainer.run(windows)
            if trainer.progress.meta_step != windows:
                raise ValueError(f"{path} ends before its checkpoint, which has no past; remove both to start anew")
            curve.append({"steps": windows * self.steps_per_window, **_point(trainer)})
            _write(path, {"run": asdict(self), "curve": curve})
        return curve

    def _curve(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        found = json.loads(path.read_text())
        if found["run"] != asdict(self):
            raise ValueError(f"{path} is of another run, {found['run']}; choose another name, or remove it")
        return found["curve"]


def _write(path: Path, content: dict[str, Any]) -> None:
    def write(partial: Path) -> None:
        partial.write_text(json.dumps(content))

    write_atomically(path, write)


def _point(trainer: MetaTrainer) -> dict[str, list[float]]:
    tasks, weighted = trainer.progress.carry.tasks, trainer.loop.inner_objective
    assert isinstance(weighted, EntropyWeighted)
    weights = weighted.weights({k: v.detach() for k, v in trainer.theta.items()}, tasks["history"][0])
    return {"total": tasks["total"][0].tolist(), "weight": weights.tolist()}


def main() -> None:
    """Run one method, or report on all that were run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=(*META_RATES, "report"))
    parser.add_argument("--folder", type=Path, default=Path("runs/two-colours"))
    parser.add_argument("--name", help="of the files; by default the method")
    for field, kind in Run.__annotations__.items():
        if field != "method":
            parser.add_argument(f"--{field.replace('_', '-')}", type=int if kind == "int" else float)
    options = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    folder, name = options.pop("folder"), options.pop("name", options["method"])
    if options["method"] == "report":
        print(report(folder, folder / "two-colours.png"))
    else:
        Run(**options).go_on(folder, name)


if __name__ == "__main__":
    main()
