"""Celo's and Celo-Adam's files and rules against the authors' own program, finite differences, and bad files.

``data/celo_reference.json`` holds what the authors' public JAX program answered (JAX 0.10, float32), for weights and
gradients that formulas below make; no weights of theirs are in it.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from plug_in_cases import bare
from problems import TanhMLP, sample, template
from torch import Tensor

import learnedopt
from learnedopt import Execution, FinalLoss, InnerLoop, Tape, Unrolled, cli
from learnedopt.optimizers.registry import RULES

REFERENCE = Path(__file__).parent / "data" / "celo_reference.json"
NUM_STEPS = 12
SHAPES = {"weight": (7, 5), "conv": (4, 3, 2, 2), "bias": (5,), "scale": (), "square": (4, 4), "row": (1, 6)}
_SCHEDULE = {
    "rnn_params": {
        "linear": {"b": (64,), "w": (18, 64)},
        "linear_1": {"b": (64,), "w": (18, 64)},
        "linear_2": {"b": (64,), "w": (18, 64)},
        "rnn/linear": {"b": (256,), "w": (128, 256)},
        "step_size": {"b": (1,), "w": (64, 1)},
    },
    "lstm_init_state": {"hidden": (1, 64), "cell": (1, 64)},
}
_WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "celo-adam": _SCHEDULE,
    "celo": {
        **_SCHEDULE,
        "rnn_params": {**_SCHEDULE["rnn_params"], "rnn_to_controls": {"b": (1,), "w": (64, 1)}},
        "ff_mod_stack": {
            "~": {
                **{f"w0__{i}": (1, width, 4) for i, width in enumerate(_WIDTHS)},
                "w1": (1, 4, 4),
                "w2": (1, 4, 3),
                "b0": (1, 4),
                "b1": (1, 4),
                "b2": (1, 3),
            }
        },
    },
}
"""What the authors' files hold, by shapes."""


def wave(shape: tuple[int, ...], phase: float) -> np.ndarray:
    """Return numbers that only a formula makes."""
    return np.sin(1.7 * np.arange(math.prod(shape)) + phase).reshape(shape)


def weights(layout: dict[str, Any], phase: float = 0.3) -> dict[str, Any]:
    """Return a nested dict of arrays for a nested dict of shapes."""
    found = {}
    for i, (key, inside) in enumerate(sorted(layout.items())):
        own = phase + 0.7 * i
        found[key] = weights(inside, 2 * own) if isinstance(inside, dict) else np.float32(0.4 * wave(inside, own))
    return found


def state_of(name: str) -> dict[str, Any]:
    """Return what a file of one of them holds: rates are such that steps are large."""
    found = weights(LAYOUTS[name])
    found["rnn_params"]["step_size"]["b"] += np.float32({"celo": 7.0, "celo-adam": 1.0}[name])
    return found


def problem() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], list[float]]:
    """Return parameters, and the gradients and losses of all steps: small, large, beyond the clip, and zero."""
    params = {k: np.float32(0.5 * wave(shape, i)) for i, (k, shape) in enumerate(SHAPES.items())}
    grads = []
    for step in range(NUM_STEPS):
        size = 10 ** math.sin(step)
        grads.append({k: np.float32(size * wave(s, 3 * step + i)) for i, (k, s) in enumerate(SHAPES.items())})
        grads[-1]["bias"][0] = 0.0
    grads[5]["weight"] *= np.float32(1e4)
    losses = [2 * math.exp(-step / 5) + 0.1 * math.sin(7 * step) for step in range(NUM_STEPS)]
    losses[8] = 50.0
    return params, grads, losses


def packed(value: Any) -> bytes:
    """Return a nested dict of arrays as ``flax.serialization`` writes it: MessagePack, arrays as extension 1."""
    if isinstance(value, dict):
        return struct.pack(">BH", 0xDE, len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value)) + value.encode()
    shape = b"".join(struct.pack(">BH", 0xCD, n) for n in value.shape)
    data = struct.pack(">BI", 0xC6, value.nbytes) + value.tobytes()
    inside = bytes([0x93, 0x90 + value.ndim]) + shape + packed(str(value.dtype)) + data
    return struct.pack(">BIb", 0xC9, len(inside), 1) + inside


@pytest.fixture
def celo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the module, its rules registered for as long as the test lasts: other tests walk over all names."""
    monkeypatch.setattr(RULES, "registered", dict(RULES.registered))
    import learnedopt.bridges.celo as module

    RULES.registered.update({"celo": module.Celo, "celo-adam": module.CeloAdam})
    return module


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.state" for name in LAYOUTS}
    for name, path in paths.items():
        path.write_bytes(packed(state_of(name)))
    return paths


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: torch.tensor(x, dtype=dtype) for k, x in arrays.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_those_of_the_authors_program(
    name: str, dtype: torch.dtype, celo: ModuleType, files: dict[str, Path]
) -> None:
    rule, theta = celo.load(files[name])
    mover, theta = rule.within(NUM_STEPS), {k: x.to(dtype) for k, x in theta.items()}
    start, grads, losses = problem()
    expected = json.loads(REFERENCE.read_text("utf-8"))[name]
    params, state = mover.init(theta, tensors(start, dtype))
    for step, (grad, loss) in enumerate(zip(grads, losses, strict=True)):
        deltas, state = mover.update(theta, tensors(grad, dtype), state, params, torch.tensor(loss, dtype=dtype))
        params = {k: p + deltas[k] for k, p in params.items()}
        for key, value in expected.get(str(step), {}).items():
            # Rounding of numbers near 1; what is moved is a thousand times as much and more.
            wanted = torch.tensor(value, dtype=dtype).reshape(SHAPES[key])
            torch.testing.assert_close(params[key], wanted, rtol=0, atol=1e-6)
    assert min(float((params[k] - torch.tensor(start[k])).abs().max()) for k in SHAPES) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_derivatives_are_finite_differences_and_tasks_together_are_tasks_alone(
    name: str, celo: ModuleType, files: dict[str, Path]
) -> None:
    rule, theta = celo.load(files[name])
    theta, family = {k: x.double() for k, x in theta.items()}, TanhMLP()
    tasks, generator = sample(family, 3), torch.Generator().manual_seed(0)
    found = {}
    for chunk_size in (1, 3):
        loop = InnerLoop(family, rule, Execution(chunk_size), horizon=5)
        found[chunk_size] = Unrolled(5).estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads
    for key, grad in found[1].items():
        torch.testing.assert_close(found[3][key], grad, rtol=1e-10, atol=1e-13)
    direction = {k: torch.randn(x.shape, generator=generator, dtype=x.dtype) for k, x in theta.items()}

    def value(scale: float) -> Tensor:
        moved = {k: x + scale * direction[k] for k, x in theta.items()}
        return loop.losses(moved, loop.run(moved, loop.start(tasks), 5, Tape.NONE).end, "valid").mean()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    expected = torch.stack([(found[1][k] * direction[k]).sum() for k in theta]).sum()
    assert abs(float(expected)) > 1e-4
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-10)


def test_a_model_is_trained_as_the_inner_loop_does_and_the_loss_is_asked_for(
    celo: ModuleType, files: dict[str, Path]
) -> None:
    rule, theta = celo.load(files["celo"])
    family, theta = TanhMLP(), {k: x.double() for k, x in theta.items()}
    task = sample(family, 1)
    params = {k: torch.nn.Parameter(p[0].clone()) for k, p in family.init_params(task).items()}
    optimizer = bare(params.items(), (rule, theta), num_steps=4)
    with pytest.raises(ValueError, match="step\\(loss=loss\\)"):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for step in range(4):
        batch = {k: v[0] for k, v in family.batch(task, step, "train").items()}
        optimizer.zero_grad()
        loss = family.loss(dict(params), batch)
        loss.backward()
        optimizer.step(loss=loss)
    loop = InnerLoop(family, rule, horizon=4)
    end = loop.run(theta, loop.start(task), 4, Tape.NONE).end.params
    for key, p in params.items():
        torch.testing.assert_close(p.detach(), end[key][0], rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="num_steps"):
        bare(params.items(), (rule, theta))


def test_it_stands_beside_the_baselines_of_the_command(
    celo: ModuleType, files: dict[str, Path], tmp_path: Path
) -> None:
    path = learnedopt.save(tmp_path / "celo.safetensors", *celo.load(files["celo"]))
    rule, theta = learnedopt.load(path)
    assert rule == celo.Celo() and theta.keys() == celo.load(files["celo"])[1].keys()
    arguments = [
        "evaluate",
        str(path),
        "--import",
        "learnedopt.bridges.celo",
        "--family",
        "quadratic",
        "--set",
        "dim=3",
    ]
    arguments += ["--steps", "6", "--tasks", "3", "--tuning-tasks", "2", "--out", str(tmp_path), "--wandb", "disabled"]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from learnedopt.cli import main; sys.exit(main())", *arguments],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "celo" in json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["optimizers"]


def test_a_module_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "lstm-mnist", "--import", "no.such.module", "--family", "quadratic"]) == 2
    assert "--import no.such.module: there is no module 'no'" in capsys.readouterr().err


def bad_files() -> dict[str, tuple[bytes, str]]:
    whole = packed(state_of("celo"))
    other = {k: x for k, x in state_of("celo").items() if k != "rnn_params"}
    narrow = state_of("celo")
    narrow["lstm_init_state"] = {k: x[:, :32] for k, x in narrow["lstm_init_state"].items()}
    array = packed(np.zeros(3, np.float32))
    return {
        "empty": (b"", "ends after 0 bytes"),
        "cut short": (whole[:-7], "in the middle of a value"),
        "more after the end": (whole + b"\x00", "not one dict"),
        "a pickle": (pickle.dumps({"w": 1.0}), "not a file of flax.serialization"),
        "another optimizer": (packed(other), "not of Celo or Celo-Adam"),
        "other sizes": (packed(narrow), "other shapes than the published ones"),
        "an unknown extension": (b"\x81\xa1w" + array.replace(b"\x01\x93", b"\x02\x93", 1), "extension of type 2"),
        "too few numbers": (b"\x81\xa1w" + array.replace(b"\xcd\x00\x03", b"\xcd\x00\x04", 1), "3 numbers"),
        "an unknown dtype": (packed({"w": np.zeros(2, np.complex64)}), "dtype 'complex64'"),
        "many small values": (b"\x81\xa1w\xdd" + struct.pack(">I", 1 << 20) + b"\xc0" * (1 << 20), "more than 100,000"),
        "a key that is no string": (b"\x81\x01\x01", "key 1"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_files_that_are_not_theirs_are_refused(name: str, celo: ModuleType, tmp_path: Path) -> None:
    data, message = bad_files()[name]
    path = tmp_path / "theta.state"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        celo.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_start_without_a_horizon_are_refused(celo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        celo.load(tmp_path / "theta.state")
    rule = celo.Celo()
    with pytest.raises(ValueError, match="number of steps"):
        rule.init(rule.init_theta(torch.Generator()), template(TanhMLP()))


def test_small_values_of_the_format_are_read(tmp_path: Path) -> None:
    from learnedopt.bridges.flax_file import read

    path = tmp_path / "values"
    # {"a": 5, "b": -1, "c": nil, "d": true, "e": [1.5 as float64, 300 as uint16], "f": "x"}
    path.write_bytes(
        b"\x86\xa1a\x05\xa1b\xff\xa1c\xc0\xa1d\xc3\xa1e\x92\xcb" + struct.pack(">d", 1.5) + b"\xcd\x01\x2c\xa1f\xa1x"
    )
    assert read(path) == {"a": 5, "b": -1, "c": None, "d": True, "e": [1.5, 300], "f": "x"}
