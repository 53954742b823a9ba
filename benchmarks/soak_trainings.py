"""The small trainings of ``soak.py``: every kind of recipe and estimator, sixty meta-steps each."""

from __future__ import annotations

from typing import NamedTuple


class Training(NamedTuple):
    """A recipe with the settings that make it small; ``data``: it reads LEARNEDOPT_DATA."""

    recipe: str
    settings: tuple[str, ...]
    data: bool = False
    compiled: bool = False


_TINY = ("num_meta_steps=60", "num_tasks=2", "checkpoint_every=2", "meta.lr=0.01")
_HELD_OUT = ("validation.num_tasks=3", "validation.num_steps=4", "validation.every=7")
_QUADRATIC = (*_TINY, *_HELD_OUT, "family.dim=3", "estimator.num_steps=2", "rule.hidden_size=3")
_IMAGES = ("family.batch_size=4", "family.hidden=[3]")
TRAININGS = {
    "LSTM, truncated": Training("lstm-quadratic", (*_QUADRATIC, "estimator.horizon=6")),
    "learned start, truncated": Training(
        "lstm-quadratic",
        (
            *_TINY, *_HELD_OUT, "family.dim=3", "estimator.num_steps=2", "estimator.horizon=6", "rule=learned-init",
            'rule.rule={"name": "lstm", "options": {"hidden_size": 3}}',
        ),
    ),
    "bootstrapped target": Training(
        "lstm-quadratic",
        (
            *_QUADRATIC, "estimator.horizon=12", "objective=BootstrappedTarget", "objective.num_target_steps=3",
            "objective.step_size=0.01",
        ),
    ),
    "evolution strategies": Training(
        "lstm-quadratic",
        (
            *_QUADRATIC, "estimator=EvolutionStrategies", "estimator.horizon=6", "estimator.num_pairs=3",
            "estimator.sigma=0.01",
        ),
    ),
    "persistent evolution strategies": Training(
        "pes-quadratic", (*_QUADRATIC, "estimator.horizon=6", "estimator.num_pairs=4", "estimator.sigma=0.01")
    ),
    "MAML, unrolled": Training("maml-sine", (*_TINY, *_HELD_OUT, "estimator.num_steps=2", "execution.compile=false")),
    "implicit": Training("imaml-regression", (*_TINY, *_HELD_OUT, "checkpoint_every=1")),
    "LSTM on images": Training(
        "lstm-mnist",
        (*_TINY, *_HELD_OUT, *_IMAGES, "estimator.num_steps=2", "estimator.horizon=6", "rule.hidden_size=3"),
        data=True,
    ),
    "mixture, task by task": Training(
        "lstm-quadratic",
        (
            *_TINY, *_HELD_OUT, "rule.hidden_size=3", "family=mixture",
            'family.members=[[1, {"name": "quadratic", "options": {"dim": 3}}],'
            ' [2, {"name": "quadratic", "options": {"dim": 5}}]]',
            "estimator=TaskByTask", "estimator.estimator=Unrolled", "estimator.estimator.num_steps=2",
            "estimator.horizons=[[2, 0.5], [4, 0.5]]",
        ),
    ),
    "MAML, compiled": Training(
        "maml-sine", (*_TINY, *_HELD_OUT, "estimator.num_steps=2", "execution.compile=true"), compiled=True
    ),
}  # fmt: skip
