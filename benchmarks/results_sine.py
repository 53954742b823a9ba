"""Meta-SGD and MAML on sine regression: the error after one gradient step on 5, 10 and 20 shots, 2,000 test tasks.

Run ``python benchmarks/results_sine.py`` after ``python train_meta.py maml-sine`` and ``... meta-sgd-sine``, which are
trained with 10 shots. Other pairs of runs are shown where both are found under names that end alike: with other seeds,
as ``--set seed=1 --name maml-sine-seed1``, or with 5 shots, as ``--set family.shots=5 --name maml-sine-5``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import learnedopt
from learnedopt import Execution, checkpoint
from learnedopt.evaluation.comparison import align, summarise
from learnedopt.evaluation.few_shot import LOSS, adapt

METHODS = {"MAML": "maml-sine", "Meta-SGD": "meta-sgd-sine"}
NUM_TASKS = 2000
SHOTS = (5, 10, 20)
# Trained with 5 shots, tested with 5, 10 and 20: the mean squared errors as others quote them from Li et al. (2017).
PUBLISHED = {(5, "MAML"): ("1.13", "0.85", "0.71"), (5, "Meta-SGD"): ("0.90", "0.63", "0.50")}


def errors(run: Path) -> list[Tensor]:
    """Return for each of ``SHOTS`` each test task's error (num_tasks,) after one step."""
    rule, theta, record = checkpoint.load_with_metadata(run)
    found = []
    for shots in SHOTS:
        options = {**record["family"]["options"], "shots": shots, "meta_split": "test"}
        family = learnedopt.tasks.make("sine", **options)
        execution = Execution(chunk_size=NUM_TASKS)
        found.append(adapt(rule, theta, family, 1, NUM_TASKS, execution=execution).values[LOSS][1])
    return found


def protocol(record: dict[str, Any]) -> str:
    """Return, as JSON, what runs must have in common to be compared: all but the method, the seed and the execution."""
    own = ("name", "rule", "seed", "meta_step", "best_validation", "execution", "num_threads", "checkpoint_every")
    return json.dumps({key: value for key, value in record.items() if key not in own}, sort_keys=True)


def show(runs: Path, suffix: str) -> tuple[str, int, list[float]]:
    """Print the table of the runs whose names end in ``suffix``; return their protocol, seed and ratios of mean errors.

    Raises:
        ValueError: they differ in more than the method.
    """
    pair = {method: runs / f"{name}{suffix}" for method, name in METHODS.items()}
    records = [checkpoint.load_with_metadata(run)[2] for run in pair.values()]
    common = {(protocol(record), record["seed"]) for record in records}
    if len(common) > 1:
        raise ValueError(f"the runs in {runs} whose names end in {suffix!r} were trained differently: they are no pair")
    trained_with, num_tasks, seed = (
        records[0]["family"]["options"]["shots"],
        records[0]["num_tasks"],
        records[0]["seed"],
    )
    rows, means = [[" and ".join(run.name for run in pair.values()), *(f"{shots} shots" for shots in SHOTS)]], []
    for method, run in pair.items():
        found, cells = errors(run), []
        for values, published in zip(found, PUBLISHED.get((trained_with, method), ("", "", "")), strict=True):
            mean, half = summarise(values).mean, summarise(values).high - summarise(values).mean
            cells.append(f"{mean:.3f} ± {half:.3f}" + f" ({published})" * bool(published))
        about = f"seed {seed}, trained with {trained_with} shots, {num_tasks} tasks a meta-step"
        rows.append([f"{method}, {about}", *cells])
        means.append([float(values.mean()) for values in found])
    ratios = [ours / maml for maml, ours in zip(*means, strict=True)]
    rows.append(["Meta-SGD / MAML", *(f"{ratio:.3f}" for ratio in ratios)])
    print(f"{align(rows)}\n", flush=True)
    return *common.pop(), ratios


def main() -> None:
    """Print a table for each pair of runs that was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    print(f"Mean squared error after one step, {NUM_TASKS} test tasks: mean ± 95 % interval (published in brackets).\n")
    suffixes = {
        method: {path.parent.name.removeprefix(name) for path in runs.glob(f"{name}*/theta.safetensors")}
        for method, name in METHODS.items()
    }
    pairs = sorted(set.intersection(*suffixes.values()))
    if not pairs:
        parser.exit(2, f"no pair of {' and '.join(METHODS.values())} was trained to its end in {runs}\n")
    ratios: dict[str, dict[int, tuple[str, list[float]]]] = defaultdict(dict)
    for suffix in pairs:
        try:
            trained, seed, found = show(runs, suffix)
        except ValueError as error:
            print(f"{error}\n")
        else:
            ratios[trained][seed] = suffix, found
    for by_seed in (found for found in ratios.values() if len(found) > 1):
        endings, found = zip(*by_seed.values(), strict=True)
        means = ", ".join(f"{mean:.3f}" for mean in torch.tensor(found).mean(0).tolist())
        names = ", ".join(f"maml-sine{suffix}" for suffix in endings)
        print(f"Meta-SGD / MAML, mean over {len(found)} seeds ({names}): {means}")


if __name__ == "__main__":
    main()
