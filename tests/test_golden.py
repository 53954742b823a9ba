"""A small meta-training, number by number: a change that is no change of method leaves every loss as it was.

After a change that is meant to move the numbers, write them anew: ``python tests/test_golden.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt import Execution, InnerLoop, MetaTrainer, SumOfLosses, Truncated, Validation
from learnedopt import optimizers as rules
from learnedopt import tasks as families
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics

GOLDEN = Path(__file__).resolve().parent / "golden_meta_losses.json"


def curves(folder: Path) -> dict[str, list[float]]:
    """Meta-train an LSTM on quadratics by Adam, in windows, and return meta-losses, gradient norms and validations."""
    family, rule = families.make("quadratic", dim=4, dtype="float64"), rules.make("lstm", hidden_size=5)
    loop = InnerLoop(family, rule, Execution(chunk_size=8))
    trainer = MetaTrainer(
        loop,
        Truncated(5, horizon=20),
        SumOfLosses(),
        lambda params: torch.optim.Adam(params, 3e-2),
        JsonLinesTracker(folder / "metrics.jsonl"),
        num_tasks=8,
        max_grad_norm=3.0,
        validation=Validation(loop, SumOfLosses(), num_steps=20, num_tasks=8, every=5),
    )
    trainer.run(10)  # two whole episodes and half a third one
    rows = read_metrics(folder / "metrics.jsonl")
    return {name: [row[name] for row in rows if name in row] for name in ("meta_loss", "grad_norm", "validation")}


@pytest.mark.usefixtures("float64")
def test_the_golden_meta_training_repeats_itself(tmp_path: Path) -> None:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))["curves"]
    found = curves(tmp_path)
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-9, abs=0), name
    # The curve is worth comparing: clipped and unclipped steps, and a training that gets somewhere.
    assert min(golden["grad_norm"]) < 3.0 < max(golden["grad_norm"])
    assert golden["validation"][2] < golden["validation"][1] < golden["validation"][0]  # the start, then every five


if __name__ == "__main__":
    import tempfile

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        content = {"command": "python tests/test_golden.py", "curves": curves(Path(name))}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
