"""The command ``learnedopt sweep``: a training for each setting that a file says to try, on this machine."""

from __future__ import annotations

from pathlib import Path

NONE_FINISHED = 1


def sweep(file: Path, runs: Path = Path("runs"), processes: int = 1, trials: int | None = None, seed: int = 0) -> int:
    """Try the settings of a sweep, without a server.

    The file is of W&B's format. Each trial is a run in a folder of its own below RUNS/NAME, beside the log of its
    output; what came of them is written there as sweep.md and sweep.json. Started again it goes on where it stopped,
    and what is finished is not run again. Settings that differ in the seed alone are one, by the mean.

    Args:
        file: the sweep, in YAML: docs/follow_runs.md says what it may hold
        runs: where sweeps are kept
        processes: how many trials run at once
        trials: how many settings; by default the file's run_cap, of a grid all
        seed: of the drawing

    Returns:
        0 when done, 1 where no setting came to its end, 130, 143 or 129 after a signal.
    """
    from learnedopt.cli_train import stopped
    from learnedopt.sweeps import run_sweep
    from learnedopt.training.interrupts import Interrupts

    try:
        with Interrupts() as interrupts:
            interrupts.deliver()  # at once: the trials, in sessions of their own, are stopped on the way out
            result = run_sweep(file, runs, processes, trials, seed)
    except (KeyboardInterrupt, SystemExit) as stop:
        return stopped(stop, "The same command goes on.")
    print(f"\n{result.markdown()}")
    if result.failure is not None:
        print(result.failure)
    best = result.best
    if best is None:
        print("No setting was trained to its end.")
        return NONE_FINISHED
    print(f"Best: {' '.join(f'{key}={value}' for key, value in best.values.items())}")
    return 0
