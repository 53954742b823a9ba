"""Meta-SGD and MAML on sine regression: the error after one gradient step on 5, 10 and 20 shots, 2,000 test tasks.

Run ``python benchmarks/results_sine.py`` after ``python train_meta.py maml-sine`` and ``... meta-sgd-sine`` (10 shots).
Runs with 5 shots, as ``python train_meta.py maml-sine --name maml-sine-5 --set family.shots=5``, are shown as well
where they are found, and so are those with 20. Values in brackets are those of Li et al. (2017), where known.
"""

from __future__ import annotations

from pathlib import Path

import torch

import learnedopt
from learnedopt import Execution, checkpoint
from learnedopt.comparison import align, summarise
from learnedopt.few_shot import LOSS, adapt

RUNS = Path("runs")
NUM_TASKS = 2000
SHOTS = (5, 10, 20)
# Trained with 5 shots, tested with 5, 10 and 20: the mean squared errors as others quote them from the paper.
PUBLISHED = {(5, "MAML"): ("1.13", "0.85", "0.71"), (5, "Meta-SGD"): ("0.90", "0.63", "0.50")}


def run_of(method: str, trained_with: int) -> Path:
    """Return the folder of a run."""
    return RUNS / (f"{method.lower()}-sine" + ("" if trained_with == 10 else f"-{trained_with}"))


def errors(run: Path, shots: int) -> torch.Tensor:
    """Return each test task's error (num_tasks,) after one step on ``shots`` points."""
    rule, theta, record = checkpoint.load_with_metadata(run)
    family = learnedopt.tasks.make("sine", **{**record["family"]["options"], "shots": shots, "meta_split": "test"})
    return adapt(rule, theta, family, 1, NUM_TASKS, execution=Execution(chunk_size=NUM_TASKS)).values[LOSS][1]


def main() -> None:
    """Print a table for each number of shots in training."""
    torch.set_num_threads(1)
    print(f"Mean squared error after one step, {NUM_TASKS} test tasks: mean ± 95 % interval (published in brackets).\n")
    for trained_with in SHOTS:
        runs = {method: run_of(method, trained_with) for method in ("MAML", "Meta-SGD")}
        if missing := [str(run) for run in runs.values() if not (run / "theta.safetensors").exists()]:
            print(f"trained with {trained_with} shots: not run ({', '.join(missing)})\n")
            continue
        rows = [[f"trained with {trained_with}", *(f"{shots} shots" for shots in SHOTS)]]
        found = {method: [errors(run, shots) for shots in SHOTS] for method, run in runs.items()}
        for method, of_shots in found.items():
            cells = []
            for values, published in zip(of_shots, PUBLISHED.get((trained_with, method), ("", "", "")), strict=True):
                summary = summarise(values)
                cells.append(
                    f"{summary.mean:.3f} ± {summary.high - summary.mean:.3f}" + f" ({published})" * bool(published)
                )
            rows.append([method, *cells])
        ratios = [float(b.mean() / a.mean()) for a, b in zip(found["MAML"], found["Meta-SGD"], strict=True)]
        rows.append(["Meta-SGD / MAML", *(f"{ratio:.3f}" for ratio in ratios)])
        print(align(rows), flush=True)


if __name__ == "__main__":
    main()
