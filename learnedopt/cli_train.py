"""The command ``learnedopt train``: recipes, with changes, meta-trained in folders of their own."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from learnedopt.cli import INTERRUPTED

if TYPE_CHECKING:
    from learnedopt.cli_recipe import Chosen
    from learnedopt.training.following import Tracking

DIVERGED, RANK_FAILED = 1, 3


def train(
    chosen: Chosen,
    tracking: Tracking,
    name: str | None = None,
    runs: Path = Path("runs"),
    extend: bool = False,
    backend: str | None = None,
    timeout: float = 600.0,
) -> int:
    """Meta-train a recipe.

    A run writes RUNS/NAME: theta with its description, the configuration, the metrics as JSON lines, and a figure.
    Started again with the same configuration it goes on where it stopped, exactly. Started by torchrun (torchrun -m
    learnedopt train ...), processes share each meta-batch.

    Args:
        chosen: the recipe
        tracking: who else is told
        name: the run's folder under --runs; by default the recipe's name, in a sweep of W&B with
            the trial's id behind it
        runs: where runs are kept
        extend: make a finished run longer: as num_meta_steps says now, all else being equal
        backend: of torch.distributed, for several processes; by default gloo on CPUs, nccl on GPUs
        timeout: how many seconds several processes wait for each other

    Returns:
        0 when done, 1 when training diverged, 3 when another process of it has failed, 130, 143 or 129 after a signal.
    """
    from learnedopt import run
    from learnedopt.core.files import require_name
    from learnedopt.training import launch, ranks
    from learnedopt.training.interrupts import end_by_signal
    from learnedopt.training.trainer import TrainingDiverged
    from learnedopt.training.wandb_variables import folder_name, in_sweep

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    recipe, name = chosen.recipe, folder_name(chosen.name) if name is None else name
    require_name(name, "--name")
    folder, device = runs / name, run.device_of(recipe)
    try:
        with launch.process_group(device, backend, timeout):
            own = ranks.present(device, timeout)
            result = run.train(recipe, folder, tracking, own, extend=extend)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stopped(stop, f"The same command goes on from {folder}.")
        if in_sweep():
            end_by_signal(code)
        return code
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


def stopped(stop: BaseException, then: str) -> int:
    """Say that a signal stopped the command, and what ``then``; return the exit code."""
    with suppress(OSError):  # the terminal may be gone: that is why it stopped
        print(f"Stopped. {then}", file=sys.stderr)
    return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else INTERRUPTED
