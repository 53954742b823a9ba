"""Every example, run as a user runs it: from another folder, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, folder: Path) -> str:
    """Return what the example prints; it must end well, warn of nothing and write no file."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONWARNINGS": "error::UserWarning"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("Meta-") for line in done.stderr.splitlines())  # the progress of a training, no more
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.parametrize("name", ["own_rule", "own_task", "own_inner_objective"])
def test_own_parts_are_short_and_meta_training_helps(name: str, tmp_path: Path) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 25
    before, after = map(float, re.findall(r"\d+\.\d+", run(name, tmp_path)))
    assert after < 0.7 * before


def test_the_learned_optimizer_plugged_into_mnist_beats_tuned_adam(data_root: Path, tmp_path: Path) -> None:
    assert (data_root / "MNIST" / "raw").is_dir()
    losses = dict(re.findall(r"^(\S+) +loss after 100 steps: (\d\.\d+)", run("plug_into_mnist", tmp_path), re.M))
    assert losses.keys() == {"Adam", "lstm-mnist", "general"}
    assert float(losses["general"]) < float(losses["lstm-mnist"]) < float(losses["Adam"])


def test_every_example_is_run_here() -> None:
    expected = {"own_rule", "own_task", "own_inner_objective", "plug_into_mnist"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == expected
