"""Run the tutorials and write their pages: ``docs/tutorials/*.py`` in cells, each with what it prints below it.

Usage: python .ci/tutorials.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"


class Cell(NamedTuple):
    """Prose, or code and where it begins in its file."""

    is_code: bool
    text: str
    line: int


def cells(source: str) -> list[Cell]:
    """Cut a script in the percent format into its cells."""
    found = []
    for match in re.finditer(r"^# %%(?P<prose> \[markdown\])?\n(?P<body>.*?)(?=^# %%|\Z)", source, re.M | re.S):
        body = match["body"].strip("\n")
        if match["prose"]:
            body = re.sub(r"^# ?", "", body, flags=re.M)
        found.append(Cell(not match["prose"], body, source.count("\n", 0, match.start("body"))))
    return found


def page(path: Path, *, run: bool = True) -> str:
    """Return the page of a script; with ``run`` its code is executed here, and what it prints stands below it."""
    namespace: dict[str, Any] = {"__name__": path.stem}
    parts = []
    for cell in cells(path.read_text("utf-8")):
        if not cell.is_code:
            parts.append(cell.text)
            continue
        parts.append(f"```python\n{cell.text}\n```")
        printed = io.StringIO()
        if run:
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * cell.line + cell.text, path, "exec", dont_inherit=True), namespace)
        if printed.getvalue().strip():
            parts.append(f"```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def without_output(written: str) -> str:
    """Return a page without what its cells printed, which differs in its last digits between machines."""
    return re.sub(r"\n```text\n.*?\n```\n", "", written, flags=re.S)


if __name__ == "__main__":
    for script in sorted(FOLDER.glob("*.py")):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            script.with_suffix(".md").write_text(page(script), "utf-8")
            os.chdir(FOLDER)
        print(script.with_suffix(".md").name)
