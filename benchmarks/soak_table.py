"""The tables of ``soak.py`` in ``docs/reliability.md``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from learnedopt.core.files import write_atomically

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
START, END = "<!-- soak -->\n", "<!-- end of soak -->\n"
PLACES = ("in the start", "in an episode", "between episodes", "in a save", "at the end")
LONGEST = 150
"""Characters of a message that are shown."""
Row = dict[str, Any]


def write(folder: Path, rows: list[Row]) -> None:
    """Put what ``folder`` holds between the page's marks, and leave the rest of it as it is."""
    memory = folder / "memory.json"
    parts = [machine(), kills(rows), faults(rows)]
    parts += [memory_table(json.loads(memory.read_text("utf-8")))] if memory.exists() else []
    before, rest = PAGE.read_text("utf-8").split(START)
    text = before + START + "\n" + "\n\n".join(part for part in parts if part) + "\n\n" + END + rest.split(END)[1]
    write_atomically(PAGE, lambda partial: _write_text(partial, text))


def kills(rows: list[Row]) -> str:
    """Return the table of SIGKILLs: where they struck, and whether the trainings ended where they would have."""
    found = [row for row in rows if row["fault"] == "SIGKILL"]
    lines = [["killed", "kills", *PLACES, "trainings", "ended to the bit", "torn files"]]
    for name in dict.fromkeys(row["training"] for row in found):
        lines.append([name, *_kill_counts([row for row in found if row["training"] == name])])
    lines.append(["**all**", *_kill_counts(found)])
    return _table(lines) if found else ""


def _kill_counts(rows: list[Row]) -> list[str]:
    places = sum((Counter(row.get("kills", {})) for row in rows), Counter())
    exact = sum(row["outcome"] == "survived" for row in rows)
    torn = sum("torn after a kill" in row.get("message", "") for row in rows)
    return [str(n) for n in (places.total(), *(places[p] for p in PLACES), len(rows), exact, torn)]


def faults(rows: list[Row]) -> str:
    """Return the table of the other faults."""
    found = [row for row in rows if row["fault"] != "SIGKILL"]
    lines = [["fault", "rounds", "survived", "stopped", "failed", "exit code", "what was said"]]
    for fault in dict.fromkeys(row["fault"] for row in found):
        own = [row for row in found if row["fault"] == fault]
        counts = Counter(row["outcome"] for row in own)
        codes = sorted({str(row.get("code", 0)) for row in own if row["outcome"] != "failed"})
        messages = [row["message"].replace("|", "/") for row in own if row.get("message")]
        shown = _shortened(messages[-1]) if messages else "–"
        numbers = [str(counts[outcome]) for outcome in ("survived", "stopped", "failed")]
        lines.append([fault, str(len(own)), *numbers, ", ".join(codes), shown])
    return _table(lines) if found else ""


def _shortened(message: str) -> str:
    return message if len(message) <= LONGEST else message[:LONGEST].rsplit(" ", 1)[0] + " …"


def memory_table(found: Row) -> str:
    """Return the table of the long training."""
    if "growth" not in found:
        return f"No verdict on memory: {found['why']}."
    when = ("after 5 minutes", "at the end", "most")
    lines = [["", *when]]
    for name, words in (
        ("rss", "resident, MB"),
        ("own", "of these its own, MB"),
        ("children_rss", "W&B's service, MB"),
    ):
        lines.append([words, *(f"{found[name][at] / 1e6:.1f}" for at in when)])
    for name, words in (("threads", "threads"), ("handles", "open handles"), ("children", "child processes")):
        lines.append([words, *(f"{found[name][at]:.0f}" for at in when)])
    text = (
        f"{found['minutes']:.0f} minutes, {found['meta_steps']:,} meta-steps: memory {100 * found['growth']:+.2f} % "
        f"since 5 minutes after the start; ended by SIGTERM with code {found['exit_code']}, "
        f"{found['processes_left']} processes left."
    )
    return f"{text}\n\n{_table(lines)}"


def _table(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    rows.insert(1, f"|---|{'---:|' * (len(lines[0]) - 1)}")
    return "\n".join(rows)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
