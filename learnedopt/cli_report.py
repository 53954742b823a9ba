"""The command ``learnedopt report``: a run's folder as one page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnedopt.evaluation.report import RunRecord

_PNG = b"\x89PNG\r\n\x1a\n"


def report(run: Path, out: Path | None = None) -> int:
    """Write a run as one page: curves, tables, configuration, environment.

    Writes what a run's folder holds as one page of HTML, which needs no other file, no network and no scripts. The run
    may be finished, diverged, or still at work.

    Args:
        run: the run's folder, such as runs/demo
        out: the file to write; by default RUN/report.html
    """
    from learnedopt.core.files import write_atomically
    from learnedopt.evaluation.report import page

    text = page(read_run(run)).encode()
    out = out or run / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, such as {out / 'report.html'}")
    write_atomically(out, lambda partial: _write(partial, text))
    print(f"Written: {out}")
    return 0


def read_run(folder: Path) -> RunRecord:
    """Return what a run left in its folder.

    Raises:
        ValueError: the folder is no run's, or a file in it is damaged.
    """
    from learnedopt.core.containers import is_dict
    from learnedopt.core.files import parse_json
    from learnedopt.core.sealed import read_record
    from learnedopt.evaluation.report import RunRecord
    from learnedopt.training.json_tracker import read_metrics

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name that of a run, such as runs/demo")
    path, record, compared = (folder / name for name in ("config.json", "metrics.jsonl", "evaluation.json"))
    if not path.exists():
        raise ValueError(f"{folder} holds no run: it has no config.json, which every run begins with")
    found = read_record(path)
    recipe = found.get("recipe")
    if not is_dict(recipe):
        raise ValueError(f"{path} is no run's configuration: it names no recipe")
    lines = record.read_bytes().split(b"\n")[:-1] if record.exists() else []
    return RunRecord(
        name=folder.resolve().name,
        config=recipe,
        rows=read_metrics(record) if lines else [],
        events=[entry for entry in map(parse_json, lines) if "event" in entry],
        environment=found.get("environment") or {},
        comparison=parse_json(compared.read_bytes()) if compared.exists() else None,
        images={png.name: data for png in sorted(folder.glob("*.png")) if (data := png.read_bytes())[:8] == _PNG},
    )


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
