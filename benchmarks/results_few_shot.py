"""Few-shot learners on Omniglot, 5-way 1-shot: accuracy on 600 fixed test tasks, the published figures beside.

Run ``python benchmarks/results_few_shot.py`` after ``python train_meta.py maml-omniglot`` and the other recipes, or
name runs to show only those; what was not run says so. Every method is measured on the same tasks, with batch
statistics of the images that are classified together, as in the published experiments.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

import learnedopt
from learnedopt import checkpoint
from learnedopt.config import recorded_solver
from learnedopt.evaluation.comparison import align
from learnedopt.evaluation.few_shot import ACCURACY, Adaptation, FewShot, adapt, show

NUM_TASKS = 600
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "few_shot_omniglot.png"


class Method(NamedTuple):
    """A method: its name, steps at test, and the published accuracy in per cent and where."""

    name: str
    num_steps: int
    published: str


METHODS = {
    "maml-omniglot": Method("MAML", 3, "98.7 (Finn et al. 2017)"),
    "meta-sgd-omniglot": Method("Meta-SGD", 3, "99.53 (Li et al. 2017)"),
    "reptile-omniglot": Method("Reptile", 50, "97.68 (Nichol et al. 2018)"),
    "imaml-omniglot": Method("iMAML, gradient descent", 8, "99.16 (Rajeswaran et al. 2019)"),
    "imaml-hf-omniglot": Method("iMAML, Hessian-free", 5, "99.50 (Rajeswaran et al. 2019)"),
}
PAPER_STEPS = {"imaml-omniglot": 16}
RECIPES = METHODS | {
    f"{name}-paper": method._replace(num_steps=PAPER_STEPS.get(name, method.num_steps))
    for name, method in METHODS.items()
}


def measure(run: Path, method: Method, device: str | None = None) -> Adaptation:
    """Adapt the run's theta to the test tasks of the family that it was validated on."""
    rule, inner_objective, theta, record = checkpoint.load_checkpoint(run)
    options = {**record["family"]["options"], **record["validation"]["family_options"], "meta_split": "test"}
    family = learnedopt.tasks.make(record["family"]["name"], **options)
    execution = learnedopt.Execution(device=device)
    return adapt(
        rule, theta, family, method.num_steps, NUM_TASKS, inner=recorded_solver(record), execution=execution,
        inner_objective=inner_objective,
    )  # fmt: skip


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="default: all, and then the figure is drawn")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    parser.add_argument("--device", help="of the tasks, such as cuda")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in RECIPES]:
        parser.error(f"there is no recipe {unknown[0]!r}; the recipes are {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    rows, found = [["recipe", "method", "filters", "meta-steps", "steps", "accuracy", "published, %"]], {}
    for name in args.names or RECIPES:
        method, run = RECIPES[name], args.runs / name
        if not (run / "theta.safetensors").exists():
            rows.append([name, method.name, "", "", "", "not run", method.published])
            continue
        found[name] = measure(run, method, args.device)
        record = json.loads((run / "theta.json").read_text("utf-8"))["metadata"]
        width, accuracy = record["family"]["options"]["width"], show(ACCURACY, found[name].summaries(ACCURACY)[-1])
        steps = str(method.num_steps)
        rows.append([name, method.name, str(width), str(record["meta_step"]), steps, accuracy, method.published])
        print(f"{name}: {accuracy}", flush=True)
    print(f"\nOmniglot, 5-way 1-shot, {NUM_TASKS} test tasks: mean ± 95 % interval.\n\n{align(rows)}")
    if found and not args.names:
        FewShot({}, found).plot(FIGURE, title=f"Omniglot, 5-way 1-shot, {NUM_TASKS} test tasks")
        print(f"drew {FIGURE}")


if __name__ == "__main__":
    main()
