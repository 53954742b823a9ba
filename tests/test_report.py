"""``learnedopt report``: what the page says, that no text of a run acts, and that a browser shows it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import learnedopt
from learnedopt import cli
from learnedopt.core.sealed import read_record, write_record
from learnedopt.evaluation import report
from learnedopt.evaluation.report import RunRecord, page, state
from learnedopt.recipes import make
from learnedopt.run_folder import begin_run
from learnedopt.training.json_tracker import JsonLinesTracker

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
HOSTILE = '<script>alert("1")</script>"><img src=x onerror=alert(2)>&amp;</title>\x00\ud800\u202e$\\frac$'
CONFIG = {"num_meta_steps": 20, "estimator": {"type": "Truncated", "num_steps": 2, "horizon": 4}, "meta": {"lr": 0.5}}


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2]) for source in sources]


def rows(num: int) -> list[dict[str, Any]]:
    start: list[dict[str, Any]] = [{"step": 0, "validation": 9.0, "best_validation": 9.0}]
    return start + [
        {"step": i, "meta_loss": 5 / i, "grad_norm": 1 / i, "inner_loss": [2.0, 1.0], "skipped": 0}
        | ({"validation": 7.0 / i} if i % 10 == 0 else {})
        for i in range(1, num + 1)
    ]


def folder_of_a_run(folder: Path, num: int, exit_code: int | None = 0) -> Path:
    """Write what a training leaves after so many meta-steps."""
    folder.mkdir()
    begin_run(folder, make("demo"))
    tracker = JsonLinesTracker(folder / "metrics.jsonl")
    tracker.start({})
    for row in rows(num):
        tracker.log({name: value for name, value in row.items() if name != "step"}, row["step"])
    if exit_code is not None:
        tracker.finish(exit_code)
    return folder


def test_the_page_of_a_run_holds_its_curves_tables_configuration_and_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_a_run(tmp_path / "mine", 700)
    measured = {"mean": 0.25, "median": 0.2, "low": 0.125, "high": "Infinity"}
    optimizers = {"<b>demo</b>": {"learning_rate": None, "num_diverged": 3, "measures": {"final_loss": measured}}}
    (folder / "evaluation.json").write_text(json.dumps({"optimizers": optimizers}))
    (folder / "fake.png").write_text("<script>no picture</script>")
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Written: {folder / 'report.html'}\n"
    text = (folder / "report.html").read_text("utf-8")
    found = Reader(text)
    assert len(text) < report.MAX_BYTES and "fake" not in text
    for said in ("mine", "Finished at meta-step 700 of 700.", "0.25 (0.125 to Infinity)", "<b>demo</b>", "meta.lr"):
        assert said in found.texts
    for said in (learnedopt.__version__, "0.005", "quadratic"):
        assert said in found.texts or f'"{said}"' in found.texts
    assert len(found.images()) == 2  # an LSTM's windows are at other places of an episode: no losses within them


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    image = b"\x89PNG\r\n\x1a\n"
    run = RunRecord(
        name=HOSTILE, config={HOSTILE: {HOSTILE: [HOSTILE]}, "estimator": None}, environment={HOSTILE: HOSTILE},
        rows=[{"step": 1, HOSTILE: HOSTILE}], events=[{"event": "finish", "exit_code": HOSTILE}],
        comparison={"optimizers": {HOSTILE: {"learning_rate": HOSTILE, "num_diverged": HOSTILE, "measures": {}}}},
        images={HOSTILE: image},
    )  # fmt: skip
    text = page(run)
    found = Reader(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "figure"}
    assert {tag for tag, _ in found.tags} <= allowed | {"img", "figcaption"}
    names = {name for _, attributes in found.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "src", "alt"}
    assert found.images() == [image]
    assert sum("<script>" in text for text in found.texts) >= 8  # it is there, as text
    assert "\x00" not in text and "\u202e" not in text and text.encode()
    assert not re.search(r"https?:|//|@import|url\(", text)


@pytest.mark.parametrize(
    ("num", "last", "events", "said"),
    [
        (0, {}, [], "Not ended at meta-step 0 of 20: it is running, or was killed."),
        (7, {}, [{"event": "finish", "exit_code": 0}, {"event": "start"}], "Not ended at meta-step 7 of 20"),
        (7, {}, [{"event": "start"}, {"event": "finish", "exit_code": 143}], "Ended with exit code 143 at meta-step 7"),
        (20, {}, [{"event": "start"}, {"event": "finish", "exit_code": 0}], "Finished at meta-step 20 of 20."),
        (8, {"meta_loss": float("nan")}, [{"event": "finish", "exit_code": 1}], "not finite: diverged (so are"),
    ],
    ids=["begun", "running", "stopped", "finished", "diverged"],
)  # fmt: skip
def test_every_state_of_a_run_has_a_page(num: int, last: dict[str, Any], events: list[Any], said: str) -> None:
    found = rows(num)
    found[-1] |= last
    run = RunRecord("a", CONFIG, found, events)
    assert said in state(run) and state(run) in Reader(page(run)).texts


def test_losses_within_an_episode_are_drawn_where_meta_steps_take_whole_ones() -> None:
    whole = {**CONFIG, "estimator": {"type": "Unrolled", "num_steps": 2}}
    assert len(Reader(page(RunRecord("a", whole, rows(5)))).images()) == 3
    assert len(Reader(page(RunRecord("a", CONFIG, rows(5)))).images()) == 2


def test_a_page_stays_small_whatever_a_run_holds() -> None:
    big = b"\x89PNG\r\n\x1a\n" + bytes(900_000)
    config = {f"field{i}": "x" * 10_000 for i in range(3000)}
    run = RunRecord("a", config, rows(20_000), images={"one.png": big, "two.png": big, "three.png": big})
    text = page(run)
    assert len(text.encode()) < report.MAX_BYTES
    assert "Left out, for the page would be too large: two.png" in text and "2600 more are not shown." in text


def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, other = folder_of_a_run(tmp_path / "damaged", 3), folder_of_a_run(tmp_path / "other", 3)
    (damaged / "metrics.jsonl").write_text("no JSON\n")
    write_record(other / "config.json", {"run_id": "a"})
    (tmp_path / "empty").mkdir()
    compared = folder_of_a_run(tmp_path / "compared", 3)
    (compared / "evaluation.json").write_text('{"optimizers": 3}')
    cases = {
        str(tmp_path / "none"): "is no folder", str(tmp_path / "empty"): "holds no run: it has no config.json",
        str(damaged): "is not JSON", str(other): "it names no recipe", str(compared): "not what a comparison writes",
    }  # fmt: skip
    for folder, why in cases.items():
        assert cli.main(["report", folder]) == 2
        out, err = capsys.readouterr()
        assert out == "" and why in err and err.count("\n") == 1
        assert not (Path(folder) / "report.html").exists()
    assert cli.main(["report", str(folder_of_a_run(tmp_path / "fine", 3)), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_a_run_records_what_it_runs_on(tmp_path: Path) -> None:
    begin_run(tmp_path, make("demo"))
    recorded = read_record(tmp_path / "config.json")["environment"]
    assert recorded["learnedopt"] == learnedopt.__version__
    assert {"torch", "python", "platform", "processor", "gpu"} < recorded.keys()


def browser() -> str:
    """Return the path of a Chromium, or skip."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    found = next((path for name in names if (path := shutil.which(name))), None)
    cached = sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome*/*chrome*"))
    if found is None and not cached:
        pytest.skip("no Chromium on PATH, nor among those of playwright: nothing to open the page with")
    return found or str(cached[-1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(tmp_path: Path, scheme: str) -> None:
    chromium, shot = browser(), tmp_path / "shot.png"
    folder = folder_of_a_run(tmp_path / "mine", 40)
    assert cli.main(["report", str(folder)]) == 0
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,2600", f"--screenshot={shot}"]
    options += ["--no-sandbox"] * (os.getuid() == 0) + ["--blink-settings=preferredColorScheme=0"] * (scheme == "dark")
    command = [chromium, *options, f"--user-data-dir={tmp_path / 'profile'}", (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert shot.exists(), done.stderr[-2000:]
    seen = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    for colour in (BLUE, ORANGE):  # the curves, drawn to their size on the page
        assert (abs(seen - np.array(colour)).max(-1) < 24).mean() > 2e-4
    paper = (255, 255, 255) if scheme == "light" else (0x16, 0x16, 0x16)
    assert (seen[:, 5] == paper).all()  # the margin
    assert 0.02 < (seen != np.array(paper)).any(-1).mean() < 0.9
