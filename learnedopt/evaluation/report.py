"""A run as one page of HTML that needs nothing beside itself: how it ended, curves, tables, configuration, environment.

The page is built as a tree of elements, so that every text in it is escaped, whatever it is: names and settings of a
run are not trusted. It has no script, loads nothing, and stays below ``MAX_BYTES``.
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from learnedopt.core.containers import is_mapping
from learnedopt.evaluation.plots import plot_curves, plot_lines
from learnedopt.evaluation.training_plot import plot_training, points, windows_of

MAX_BYTES = 2_000_000
"""Of a page."""
_IMAGES = 1_500_000  # bytes of all images, as base64
_TEXT = 500  # characters of a text that are shown
_ROWS = 400  # of a table
_VALIDATIONS = 20  # that are listed
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #cccccc; --soft: #5a5a5a }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #444444; --soft: #a8a8a8 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto; overflow-wrap: break-word }
caption { text-align: left; color: var(--soft) }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top }
figure { margin: 1rem 0 } figcaption { color: var(--soft) } img { max-width: 100%; background: #ffffff }
"""


@dataclass(frozen=True)
class RunRecord:
    """What a run left in its folder.

    Args:
        name: of the run.
        config: its recipe as plain values.
        rows: metrics, as ``learnedopt.training.json_tracker.read_metrics`` gives them.
        events: the other lines of that file.
        environment: what it ran on, as it was recorded at its start; empty for none.
        comparison: what ``evaluation.json`` holds; None for none.
        images: PNG files by name.
    """

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    comparison: Mapping[str, Any] | None = None
    images: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


def page(run: RunRecord) -> str:
    """Return a run's page.

    Raises:
        ValueError: it would be larger than ``MAX_BYTES``; the comparison is none of this library's.
    """
    root = Element("html", lang="en")
    head, body = SubElement(root, "head"), SubElement(root, "body")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _add(head, "title", f"{run.name}: a run of learnedopt")
    SubElement(head, "style").text = _STYLE  # the one text that is not escaped: ours
    _add(body, "h1", run.name)
    _add(body, "p", state(run))
    _table(body, "At the end", [["metric", "value"], *_last_values(run.rows)])
    _curves(body, run)
    _validations(body, run.rows)
    if run.comparison is not None:
        _comparison(body, run.comparison)
    _table(body, "Configuration", [["field", "value"], *_flat(run.config)])
    _table(body, "Environment", [["of", "recorded at the start"], *_flat(run.environment)])
    if not run.environment:
        _add(body, "p", "This run did not record what it ran on.")
    text = "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
    if len(text.encode()) >= MAX_BYTES:
        raise ValueError(f"the page of {run.name!r:.100} would take {len(text.encode())} bytes, at most {MAX_BYTES}")
    return text


def state(run: RunRecord) -> str:
    """Say in a sentence how far a run is, and how it ended."""
    done = max((int(row["step"]) for row in run.rows), default=0)
    of = run.config.get("num_meta_steps")
    reached = f"meta-step {done}" + (f" of {of}" if of is not None else "")
    event = next((event for event in reversed(run.events) if event["event"] in ("start", "finish")), None)
    losses = points(run.rows, "meta_loss")[1]
    failed = next((i for i, loss in enumerate(reversed(losses)) if math.isfinite(loss)), len(losses))
    if failed:
        reached += f", whose loss is not finite: diverged (so are the last {failed})"
    if event is None or event["event"] == "start":
        return f"Not ended at {reached}: it is running, or was killed."
    code = event.get("exit_code")
    return f"Finished at {reached}." if code == 0 else f"Ended with exit code {code} at {reached}."


def _curves(body: Element, run: RunRecord) -> None:
    """Add the figures: drawn anew from the metrics, then those of the folder, as many as fit."""
    images = {f"drawn from the metrics: {name}": data for name, data in _drawn(run).items()}
    images |= {name: data for name, data in run.images.items() if name != "training.png" or not images}
    if images:
        _add(body, "h2", "Curves")
    left = _IMAGES
    for name, data in images.items():
        text = base64.b64encode(data).decode()
        if len(text) > left:
            _add(body, "p", f"Left out, for the page would be too large: {name}")
            continue
        left -= len(text)
        figure = SubElement(body, "figure")
        SubElement(figure, "img", src=f"data:image/png;base64,{text}", alt=_plain(name))
        _add(figure, "figcaption", name)


def _drawn(run: RunRecord) -> dict[str, bytes]:
    windows = windows_of(run.config.get("estimator") or {})
    # Of windows, those of several meta-steps are at other places of their episodes: side by side they mean nothing.
    inner = [row for row in run.rows if windows == 1 and isinstance(row.get("inner_loss"), list)]
    three = [*inner[:1], *inner[len(inner) // 2 :][:1], *inner[-1:]]
    picked = {f"meta-step {row['step']}": row["inner_loss"] for row in three}
    norms = points(run.rows, "grad_norm")
    wanted: dict[str, tuple[bool, Callable[[Path], Path]]] = {
        "validation and meta-loss": (
            _any_finite(points(run.rows, "meta_loss")[1] + points(run.rows, "validation")[1]),
            lambda path: plot_training(path, run.rows, windows=windows),
        ),
        "losses within a meta-step": (
            _any_finite([v for curve in picked.values() for v in curve]),
            lambda path: plot_curves(path, picked),
        ),
        "length of the meta-gradient": (
            any(norm > 0 for norm in norms[1] if math.isfinite(norm)),
            lambda path: plot_lines(path, {"gradient": norms}, "meta-step", "norm, before clipping", logy=True),
        ),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return {name: draw(Path(folder) / "f.png").read_bytes() for name, (some, draw) in wanted.items() if some}


def _any_finite(values: Iterable[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def _last_values(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if not isinstance(value, list)}
    return [[name, _shown(value)] for name, value in last.items()]


def _validations(body: Element, rows: Sequence[Mapping[str, Any]]) -> None:
    found = [*zip(*points(rows, "validation"), strict=True)]
    stride = max(1, math.ceil(len(found) / _VALIDATIONS))
    kept = [*found[:-1:stride], *found[-1:]]
    _table(body, "Validation", [["meta-step", "loss"], *([f"{step:g}", _shown(value)] for step, value in kept)])


def _comparison(body: Element, found: Mapping[str, Any]) -> None:
    try:
        optimizers = found["optimizers"]
        names = [*dict.fromkeys(name for one in optimizers.values() for name in one["measures"])]
        table = [["optimizer", "learning rate", *(f"{n.replace('_', ' ')}, mean (95 %)" for n in names), "diverged"]]
        for label, one in optimizers.items():
            texts = [_interval(one["measures"][name]) for name in names]
            table.append([label, _shown(one["learning_rate"], 3), *texts, _shown(one["num_diverged"])])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"evaluation.json is not what a comparison writes ({error!r}); move it away") from error
    _table(body, "Beside tuned optimizers, on fresh tasks", table)


def _interval(summary: Mapping[str, Any]) -> str:
    mean, low, high = (_shown(summary[key], 4) for key in ("mean", "low", "high"))  # digits as in evaluation.md
    return f"{mean} ({low} to {high})"


def _table(body: Element, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Add a table, its heading first; nothing where there is only that."""
    if len(rows) < 2:
        return
    _add(body, "h2", title)
    table = SubElement(body, "table")
    for i, row in enumerate(rows[: _ROWS + 1]):
        line = SubElement(table, "tr")
        for cell in row:
            _add(line, "td" if i else "th", cell)
    if len(rows) > _ROWS + 1:
        _add(body, "p", f"{len(rows) - _ROWS - 1} more are not shown.")


def _flat(value: Any, path: str = "") -> list[list[str]]:
    """Return nested values as rows of a dotted name and a value."""
    if is_mapping(value) and value:
        return [row for key, item in value.items() for row in _flat(item, f"{path}.{key}" if path else str(key))]
    return [[path, json.dumps(value, ensure_ascii=False)]] if path else []


def _shown(value: Any, digits: int = 6) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else "" if value is None else str(value)


def _add(parent: Element, tag: str, text: str) -> None:
    SubElement(parent, tag).text = _plain(text)


def _plain(text: str) -> str:
    """Return a text without what no page can hold (control characters, half characters), and not too long."""
    shown = text if len(text) <= _TEXT else f"{text[:_TEXT]}… ({len(text) - _TEXT} more characters)"
    return "".join(c if c.isprintable() or c == " " else "\ufffd" for c in shown)
