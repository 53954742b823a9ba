"""Tutorials: each runs as it stands, and its page is written from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.py"))


def writer() -> ModuleType:
    """Import the script that writes the pages."""
    spec = importlib.util.spec_from_file_location("tutorials", ROOT / ".ci" / "tutorials.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tutorial_runs_and_its_page_is_the_script_s(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tutorials, script = writer(), ROOT / "docs" / "tutorials" / f"{name}.py"
    written = script.with_suffix(".md").read_text("utf-8")
    now = tutorials.page(script)
    assert tutorials.without_output(now) == tutorials.without_output(written), "run python .ci/tutorials.py"
    assert now.count("```text") == written.count("```text")


def test_there_are_four() -> None:
    assert SCRIPTS == ["few_shot", "hyperparameters", "meta_train", "plug_in"]


def test_cells_are_cut_and_code_keeps_its_lines(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    source = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\nprint(x)\n\n# %%\nraise ValueError\n"
    script.write_text(source, "utf-8")
    tutorials = writer()
    page = tutorials.page(script, run=False)
    assert page == "# Title\n\ntext\n\n```python\nx = 1\nprint(x)\n```\n\n```python\nraise ValueError\n```\n"
    code = "a\n\n```python\nb\n```\n"
    assert tutorials.without_output(f"{code}\n```text\n1\n```\n\nc\n") == f"{code}\nc\n"
    with pytest.raises(ValueError) as error:
        tutorials.page(script)
    assert error.traceback[-1].lineno == 10  # counted from 0
