"""Every example, run as a user runs it: from another folder, in a process of its own."""

from __future__ import annotations

import importlib.util
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


def require(name: str) -> None:
    """Skip where the framework that an example is about is not installed."""
    framework = {"with_lightning": "lightning", "with_accelerate": "accelerate", "with_hugging_face": "transformers"}
    if name in framework and importlib.util.find_spec(framework[name]) is None:
        pytest.skip(f"needs {framework[name]}: pip install 'learnedopt[frameworks]'")


def held_out(printed: str) -> float:
    """Return the loss that a loop prints last."""
    return float(re.findall(r"held-out loss after \d+ steps: (\d+\.\d+)", printed)[-1])


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


# Between what these loops reach and AdamW at its default rate in the same loop: 0.44 and 0.60 on the images (0.49 and
# 0.76 in 100 steps), 2.50 and 2.88 on the text.
LOOPS = {"plain_loop": 0.52, "with_lightning": 0.52, "with_accelerate": 0.52, "with_fsdp2": 0.6}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_with_one_changed_line_beats_the_default(name: str, data_root: Path, tmp_path: Path) -> None:
    require(name)
    assert held_out(run(name, tmp_path)) < LOOPS[name]


def test_a_transformer_of_hugging_face_s_beats_the_default(tmp_path: Path) -> None:
    require("with_hugging_face")
    assert held_out(run("with_hugging_face", tmp_path)) < 2.7


def test_rates_learned_in_one_run_leave_a_far_start_behind(data_root: Path, tmp_path: Path) -> None:
    fixed, learned = map(float, re.findall(r": (\d\.\d+)", run("with_hyper_optimizer", tmp_path).splitlines()[-1]))
    assert fixed > 1.2
    assert learned < 0.55  # 0.49 with Adam at 5e-3, its rate not tuned


def test_a_packaged_rule_is_fine_tuned_and_plugged_in(data_root: Path, tmp_path: Path) -> None:
    packaged, tuned, plugged_in = map(float, re.findall(r"\d\.\d+", run("finetune_rule", tmp_path)))
    assert tuned < 0.85 * packaged
    assert plugged_in < 0.85 * packaged


def test_every_example_is_run_here() -> None:
    own = {"own_rule", "own_task", "own_inner_objective"}
    others = {"plug_into_mnist", "with_hugging_face", "with_hyper_optimizer", "finetune_rule"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == own | others | LOOPS.keys()
