"""Sweeps on this machine, without a server: ``learnedopt sweep sweeps/lstm-quadratic.yaml``.

The same files are sweeps for W&B: ``wandb sweep FILE`` and ``wandb agent ID``. A trial is a run in a folder of its own,
so a sweep that was stopped goes on where it stood, and a setting that was dropped could still be trained to its end.
Trials outlive a runner that is killed (SIGKILL); the next one waits for them.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnedopt.core.counts import require_count
from learnedopt.core.files import exclusive, plain_json, require_name, write_json
from learnedopt.core.registry import nearest_or_all
from learnedopt.evaluation.comparison import align, write_text
from learnedopt.run_folder import read_end
from learnedopt.sweep_file import OF_A_STEP, Sweep, Trial, read_sweep
from learnedopt.training.json_tracker import read_metrics

_POLL, _LOOK = 0.1, 1.0  # seconds between two looks whether trials have ended, and into what they have told


@dataclass(frozen=True)
class Tried:
    """A setting, maybe of several seeds: how far its trials came, and the metric's mean over them."""

    values: Mapping[str, Any]
    state: str  # "finished", "dropped" (by halving) or "failed"
    mean: float
    standard_error: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What came of a sweep: the settings, the best first, those that did not come to their end last."""

    sweep: Sweep
    tried: Sequence[Tried]
    folder: Path

    @property
    def best(self) -> Tried | None:
        """The setting with the best mean of those that were trained to the end; None where none was."""
        return next((each for each in self.tried if each.state == "finished" and not math.isnan(each.mean)), None)

    @property
    def failure(self) -> str | None:
        """The last line of the first trial that failed, and where its log is; None where none failed."""
        failed = [name for each in self.tried if each.state == "failed" for name in each.names]
        name = next((name for name in failed if not _finished(self.folder / name)), None)
        if name is None:
            return None
        log = self.folder / f"{name}.log"
        lines = log.read_text("utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not line.startswith("wandb:")]
        return f"{name} failed: {said[-1] if said else 'it said nothing'} ({log})"

    def markdown(self) -> str:
        """Return a table."""
        keys = [key for key in self.sweep.parameters if key != "seed"]
        head = [self.sweep.metric, "± standard error", "state", *keys, "trials"]
        rows = [head]
        for each in self.tried:
            error = "" if math.isnan(each.standard_error) else f"{each.standard_error:.2g}"
            values = [_shown(each.values[key]) for key in keys]
            mean = "-" if math.isnan(each.mean) else f"{each.mean:.4g}"
            rows.append([mean, error, each.state, *values, " ".join(each.names)])
        return align(rows)


def run_sweep(
    file: Path, runs: Path = Path("runs"), processes: int = 1, trials: int | None = None, seed: int = 0
) -> Result:
    """Try the settings of a sweep, and write what came of them as sweep.md and sweep.json.

    Settings that differ in the seed alone are one, by the mean. What is finished is not run again, and trials that a
    killed runner has left at work are waited for first.

    Args:
        file: the sweep, in W&B's format
        runs: where sweeps are kept: the trials go to RUNS/NAME, each with a folder and the log of its output
        processes: how many trials run at once
        trials: how many settings; by default the file's run_cap, of a grid all
        seed: of the drawing

    Raises:
        ValueError: the file is no sweep, or has a setting that its recipe does not take: before any is run;
            another process is at work on the sweep; or a trial has come to its end without the metric.
    """
    require_count("processes", processes, least=1)
    sweep = read_sweep(file)
    require_name(sweep.name, f"the name of the sweep {file}")
    settings = sweep.trials(trials, seed)
    require_settings(sweep, settings)
    folder = runs / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        _wait_for_earlier(folder, settings)
        result = Result(sweep, _tried_all(sweep, folder, settings, processes), folder)
        write_text(folder / "sweep.md", result.markdown())
        write_json(folder / "sweep.json", plain_json([vars(each) for each in result.tried]))
    return result


def _wait_for_earlier(folder: Path, settings: Sequence[Trial]) -> None:
    """Wait for trials at work: those of a runner that was killed, whose folders they hold.

    One that has not yet come to hold its folder runs once too: the folder refuses the second.
    """
    for run in [folder / trial.name for trial in settings]:
        if _held(run):
            print(f"{run.name} is still at work, for a runner that was killed: waiting for its end", flush=True)
            while _held(run):
                time.sleep(_POLL)


def _held(run: Path) -> bool:
    if not run.exists():
        return False
    try:
        with exclusive(run):
            return False
    except ValueError:  # another process holds it
        return True


def _tried_all(sweep: Sweep, folder: Path, settings: Sequence[Trial], processes: int) -> list[Tried]:
    groups = _by_setting(settings)
    halving = sweep.halving(len(groups))
    going = [*groups.values()]
    for count in halving.counts if halving else ():
        _run_all(sweep, folder, [trial for group in going for trial in group], processes, count)
        going.sort(key=lambda group: _order(sweep, _mean(sweep, folder, group, count)))
        going = going[: max(1, len(going) // halving.eta)] if halving else going
    _run_all(sweep, folder, [trial for group in going for trial in group], processes, None)
    tried = [_tried(sweep, folder, group, dropped=group not in going) for group in groups.values()]
    return sorted(tried, key=lambda each: (each.state != "finished", each.state == "failed", _order(sweep, each.mean)))


def require_settings(sweep: Sweep, settings: Sequence[Trial]) -> None:
    """Raise ValueError where the command cannot be made, names a script that is not there, or a setting cannot be.

    The last is known of the library's recipes alone.
    """
    from learnedopt import recipes
    from learnedopt.config import INTERCHANGEABLE, override

    for trial in settings[:1]:
        command_of(sweep, trial)
    for name in [word for word in sweep.command if word in recipes.names()]:
        for trial in settings:
            override(recipes.make(name), trial.assignments, INTERCHANGEABLE)
    for word in sweep.command:
        if word.endswith(".py") and not Path(word).is_file():
            raise ValueError(
                f"the command of {sweep.name} starts {word}, and there is no such file in {Path.cwd()}: start it in "
                "the file's folder, or write command: [python, -m, learnedopt, train, RECIPE, '${args_no_hyphens}'], "
                "which needs none"
            )


def command_of(sweep: Sweep, trial: Trial) -> list[str]:
    """Return the words of a trial's command as ``wandb agent`` makes them, with this Python.

    Raises:
        ValueError: a macro of W&B's that is not known here.
    """
    macros = {
        "${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "python": [sys.executable],
        "${args}": [f"--{each}" for each in trial.assignments], "${args_no_hyphens}": trial.assignments,
    }  # fmt: skip
    unknown = [word for word in sweep.command if word.startswith("${") and word not in macros]
    if unknown:
        raise ValueError(f"the command of {sweep.name} has {unknown[0]}; here there are {', '.join(macros)}")
    return [part for word in sweep.command for part in macros.get(word, [word])]


def _run_all(sweep: Sweep, folder: Path, trials: Sequence[Trial], processes: int, count: int | None) -> None:
    """Run trials until they are finished, or have told ``count`` values of the metric and written a checkpoint."""
    for trial in trials:
        _require_metric(sweep, folder / trial.name)
    waiting = [t for t in trials if not _finished(folder / t.name) and not _told(folder / t.name, sweep.metric, count)]
    look = time.monotonic()
    with _stopped_at_the_end() as running:
        while waiting or running:
            while waiting and len(running) < processes:
                trial = waiting.pop(0)
                running[trial.name] = _start(sweep, folder, trial)
            time.sleep(_POLL)
            due = time.monotonic() >= look
            look += _LOOK if due else 0
            for name, process in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    _require_metric(sweep, folder / name)
                elif due and _told(folder / name, sweep.metric, count):
                    process.terminate()  # it goes on, exactly, when it is started again
                    process.wait()


def _start(sweep: Sweep, folder: Path, trial: Trial) -> subprocess.Popen[bytes]:
    command = [*command_of(sweep, trial), "--runs", str(folder), "--name", trial.name]
    print(f"{trial.name}: {' '.join(trial.assignments)}", flush=True)
    with (folder / f"{trial.name}.log").open("ab") as log:
        # A session of its own: Ctrl-C is for this process alone, which then stops the others once.
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            env={"WANDB_RUN_GROUP": sweep.name, **os.environ},
        )  # fmt: skip


@contextmanager
def _stopped_at_the_end() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _rows(run: Path) -> list[dict[str, Any]]:
    record = run / "metrics.jsonl"
    return read_metrics(record) if record.exists() else []


def _told(run: Path, metric: str, count: int | None) -> bool:
    """Whether the record of a run has so many values of the metric; no line is parsed, for that is asked often."""
    record, key = run / "metrics.jsonl", f'"{metric}": '.encode()
    if count is None or not record.exists():
        return False
    lines = record.read_bytes().split(b"\n")
    return sum(line.startswith(b'{"step"') and key in line for line in lines) >= count


def _finished(run: Path) -> bool:
    end = read_end(run / "metrics.jsonl")
    return end is not None and end["exit_code"] == 0


def _require_metric(sweep: Sweep, run: Path) -> None:
    """Raise ValueError where a run has come to its end without the metric: the others would, too."""
    rows = _rows(run) if _finished(run) else []
    if rows and not any(sweep.metric in row for row in rows):
        told = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
        names = sorted(told - {"step", *OF_A_STEP})
        raise ValueError(f"{run} has finished without the metric {sweep.metric!r}{nearest_or_all(sweep.metric, names)}")


def _mean(sweep: Sweep, folder: Path, group: Sequence[Trial], count: int | None = None) -> float:
    """Return the mean over a setting's trials of the last value of the metric, or of the ``count``-th."""
    values = [_value(sweep, folder / trial.name, count) for trial in group]
    return statistics.fmean(values)


def _value(sweep: Sweep, run: Path, count: int | None = None) -> float:
    values = [float(row[sweep.metric]) for row in _rows(run) if sweep.metric in row][:count]
    return values[-1] if values else math.nan


def _order(sweep: Sweep, value: float) -> float:
    return math.inf if math.isnan(value) else -value if sweep.maximize else value


def _by_setting(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(repr([item for item in trial.values.items() if item[0] != "seed"]), []).append(trial)
    return groups


def _tried(sweep: Sweep, folder: Path, group: Sequence[Trial], *, dropped: bool) -> Tried:
    values = [_value(sweep, folder / trial.name) for trial in group]
    several = len(values) > 1 and all(map(math.isfinite, values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if several else math.nan
    finished = all(_finished(folder / trial.name) for trial in group)
    state = "finished" if finished else "dropped" if dropped else "failed"
    rest = {key: value for key, value in group[0].values.items() if key != "seed"}
    return Tried(rest, state, statistics.fmean(values), error, tuple(trial.name for trial in group))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":  # the same as the command
    from learnedopt import cli

    sys.exit(cli.main(["sweep", *sys.argv[1:]]))
