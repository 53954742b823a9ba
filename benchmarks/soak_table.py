"""TODO."""

from pathlib import Path
from typing import Any


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """TODO."""
