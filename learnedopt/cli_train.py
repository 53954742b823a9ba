"""The command ``learnedopt train``: recipes, with overrides, meta-trained in folders of their own."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnedopt.recipes import Recipe, Study

DIVERGED, RANK_FAILED, INTERRUPTED = 1, 3, 130


def add_parser(commands: Any) -> None:
    """Add ``train`` to the commands of a parser."""
    about = "meta-train a recipe"
    parser = commands.add_parser(
        "train",
        help=about,
        description="Meta-train a recipe. A run writes RUNS/NAME: theta with its description, the configuration, the "
        "metrics as JSON lines, and a figure. Started again with the same configuration it goes on where it stopped, "
        "exactly.",
    )
    parser.set_defaults(command=run)
    add_recipe_arguments(parser)
    parser.add_argument(
        "--name",
        help="the run's folder under --runs; default: the recipe's name, in a "
        "sweep of W&B with the trial's id behind it",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    parser.add_argument("--wandb", choices=("online", "offline", "disabled"), help="default: WANDB_MODE, then offline")
    for name in ("project", "entity", "group", "notes"):
        parser.add_argument(f"--{name}", help="of W&B; default: what its variable says (docs/follow_runs.md)")
    parser.add_argument("--tags", default="", metavar="A,B", help="of W&B; default: WANDB_TAGS")
    parser.add_argument("--tensorboard", action="store_true", help="also write event files for TensorBoard")
    parser.add_argument(
        "--log-every", type=int, default=1, metavar="N", help="tell W&B and TensorBoard every N meta-steps (default 1)"
    )
    several = parser.add_argument_group(
        "several processes", "Started by torchrun (torchrun -m learnedopt train ...), processes share each meta-batch."
    )
    several.add_argument("--backend", help="of torch.distributed; default: gloo on CPUs, nccl on GPUs")
    several.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="how long processes wait for each other (default: 600)"
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a recipe, which ``configured`` reads."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="one of --list")
    parser.add_argument("--list", action="store_true", help="print the recipes, one line each")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field, such as meta.lr=1e-3"
    )


def configured(arguments: argparse.Namespace) -> Recipe | Study:
    """Return the recipe that the arguments name, overrides applied."""
    from learnedopt import recipes
    from learnedopt.config import INTERCHANGEABLE, override

    if arguments.recipe is None:
        raise ValueError("name a recipe (learnedopt train --list shows all)")
    return override(recipes.make(arguments.recipe), arguments.set, INTERCHANGEABLE)


def list_recipes() -> int:
    """Print the recipes, one line each, and return 0."""
    from learnedopt import recipes

    for name in recipes.names():
        print(f"{name:24} {recipes.summary(name)}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Meta-train as the arguments say.

    Returns:
        0 when done, 1 when training diverged, 3 when another process of it has failed, 130, 143 or 129 after a signal.
    """
    from learnedopt.core.files import require_name
    from learnedopt.run import device_of, train
    from learnedopt.training import launch, ranks
    from learnedopt.training.tracking import Tracking
    from learnedopt.training.trainer import TrainingDiverged
    from learnedopt.training.wandb_variables import folder_name

    if arguments.list:
        return list_recipes()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    recipe = configured(arguments)
    name = folder_name(arguments.recipe) if arguments.name is None else arguments.name
    require_name(name, "--name")
    folder = arguments.runs / name
    tracking = Tracking(
        arguments.wandb, arguments.project, arguments.entity, arguments.group,
        tuple(tag for tag in arguments.tags.split(",") if tag), arguments.notes, arguments.tensorboard,
        arguments.log_every,
    )  # fmt: skip
    timeout = ranks.TIMEOUT if arguments.timeout is None else arguments.timeout
    try:
        with launch.process_group(device_of(recipe), arguments.backend, timeout):
            own = ranks.present(device_of(recipe), timeout)
            result = train(recipe, folder, tracking, own)
    except (KeyboardInterrupt, SystemExit) as stop:
        with suppress(OSError):  # the terminal may be gone: that is why it stopped
            print(f"Stopped. The same command goes on from {folder}.", file=sys.stderr)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else INTERRUPTED
    except TrainingDiverged as error:
        print(f"learnedopt train: {' '.join(str(error).split())}", file=sys.stderr)
        return DIVERGED
    except ranks.RankFailed as error:
        print(f"learnedopt train: {error}. The same command goes on from the last checkpoint.", file=sys.stderr)
        return RANK_FAILED
    if not own.leads:
        return 0
    if result is None:
        print(f"The figure {recipe.name}.png, the numbers behind it, the configuration and metrics are in {folder}.")
        return 0
    print(f"Best validation {result.best_value:.4g}; theta, configuration, metrics and figure are in {folder}.")
    return 0
