"""The page about bridges: its examples run as they stand, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_celo_bridge import packed, state_of

ROOT = Path(__file__).resolve().parent.parent


def test_the_examples_run(tmp_path: Path) -> None:
    for package in ("higher", "torchopt"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "bridges.md").read_text("utf-8"), re.S | re.M)
    assert len(blocks) == 4
    (tmp_path / "theta.state").write_bytes(packed(state_of("celo")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"theta.state", "celo.safetensors", "celo.json"}
