"""README and docs: every block of code runs, every command is one, every link leads somewhere, the site builds."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import learnedopt
from learnedopt import cli, recipes

sybil = pytest.importorskip("sybil", reason="sybil is not installed (it needs Python 3.11)")
markdown = pytest.importorskip("sybil.parsers.markdown")

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*TOP, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
TUTORIALS = "docs/tutorials/"  # written from scripts, which test_tutorials.py runs
LANGUAGES = {"python", "sh", "text", "yaml", "toml", "json"}
MOST_SKIPPED = 9
"""Blocks that are left out, each with its reason in the page; a tenth needs a better reason than these."""


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


@cache
def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def tokens(page: str) -> list[Token]:
    return parsed(read(page))


def inline(page: str) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


# Blocks of Python


@pytest.fixture
def clean_registries() -> Iterator[None]:
    """Forget what a page registers: other tests count what there is."""
    rooms = (learnedopt.optimizers, learnedopt.tasks, learnedopt.inner_objectives)
    kinds = [room.registry for room in (*rooms, learnedopt.estimators, learnedopt.objectives)]
    tables = [value.registered for kind in kinds for value in vars(kind).values() if hasattr(value, "registered")]
    tables.append(recipes._registered)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def files_for(page: str, folder: Path) -> None:
    """Lay down what a page takes for granted to lie in the folder."""
    if page == "docs/bridges.md":
        from test_celo_bridge import packed, state_of

        from learnedopt.bridges import celo
        from learnedopt.optimizers.registry import RULES

        # It registers when it is imported first, which another test may have had and taken back.
        RULES.registered.update({"celo": celo.Celo, "celo-adam": celo.CeloAdam})
        for package in ("higher", "torchopt"):
            pytest.importorskip(package, reason=f"the package {package} is not installed")
        (folder / "theta.state").write_bytes(packed(state_of("celo")))


def examples(page: str) -> Any:
    # A parser of "skip" keeps the state of a document, so each has its own.
    return sybil.Sybil([markdown.PythonCodeBlockParser(), markdown.SkipParser()]).parse(ROOT / page)


WITH_PYTHON = [page for page in PAGES if "```python" in read(page) and not page.startswith(TUTORIALS)]


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.usefixtures("clean_registries")
def test_every_block_of_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files_for(page, tmp_path)
    for example in examples(page).examples():
        try:
            example.evaluate()
        except SkipTest as left_out:
            assert str(left_out)


def test_few_blocks_are_left_out_and_each_says_why() -> None:
    marks = [(page, mark) for page in PAGES for mark in re.findall(r"<!---? *skip: *(.*?) *-->", read(page))]
    assert all(re.fullmatch(r'next "[A-Z].{15,}"', mark.rstrip("-").rstrip()) for _, mark in marks), marks
    assert len(marks) <= MOST_SKIPPED, marks


def test_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!--- invisible-code-block: python\nx = 1\n-->\n\n```python\nassert x == 2\n```\n", "utf-8")
    setup, failing = examples(str(page)).examples()
    setup.evaluate()
    with pytest.raises(AssertionError):
        failing.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page: str) -> None:
    fences = [token for token in tokens(page) if token.type == "fence"]
    assert {token.info for token in fences} <= LANGUAGES
    assert not [token for token in tokens(page) if token.type == "code_block"]  # an indented block runs nowhere


# Commands


def commands(page: str) -> list[str]:
    blocks = [token.content for token in tokens(page) if token.type == "fence" and token.info == "sh"]
    return [line for line in "".join(blocks).splitlines() if line.split("#")[0].strip()]


WITH_COMMANDS = [page for page in PAGES if "```sh" in read(page)]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
OTHER_PROGRAMS = {"wandb", "pip", "tensorboard", "nvidia-smi", "export"}  # installed or known to whoever reads


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_is_one(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[Any] = []
    # The recipes themselves are trained by test_train_meta.py and test_studies.py, made tiny.
    monkeypatch.setattr("learnedopt.run.train", lambda recipe, *_, **__: trained.append(recipe))
    for line in commands(page):
        words = shlex.split(line, comments=True)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        check_command(words, line)
    lines = [line for line in commands(page) if not {"--help", "--print_config"} & {*line.split()}]
    told = [found[1] for line in lines if (found := re.search(r"learnedopt train ([a-z][\w-]*)", line))]
    assert [recipe.name for recipe in trained] == told
    capsys.readouterr()


def check_command(words: list[str], line: str) -> None:
    program, *rest = words
    if program == "make":
        assert rest[0] in MAKE_TARGETS, line
    elif program == "torchrun" and "-m" in rest:
        check_command(rest[rest.index("-m") + 1 :], line)
    elif program in ("python", "torchrun"):
        assert any((ROOT / word).is_file() for word in rest if word.endswith((".py", ".yaml"))), line
    elif program == "learnedopt" and rest[0] in ("evaluate", "compare", "diagnose"):  # runs that are not here; minutes
        cli.parse(rest)
    elif program == "learnedopt" and rest[0] == "sweep":
        assert (ROOT / rest[1]).is_file() and cli.parse(rest), line
    elif program == "learnedopt" and rest[0] == "check":
        require_data()
        assert cli.main(rest) == 0, line
    elif program == "learnedopt":
        assert cli.main(rest) == 0, line
    else:
        assert program in OTHER_PROGRAMS, line


@pytest.mark.parametrize(
    "line",
    ["make tset", "python examples/none.py", "learnedopt train lstm-mnits", "learnedopt evaluate x --step 3", "lst"],
)
def test_a_wrong_command_is_seen(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line.split(), line)


def require_data() -> None:
    if not os.environ.get("LEARNEDOPT_DATA"):
        pytest.skip("needs data sets: set LEARNEDOPT_DATA")


def test_extras_that_are_named_exist() -> None:
    declared = set(re.findall(r"^([a-z]+) = \[", read("pyproject.toml"), re.M))
    for page in PAGES:
        assert set(re.findall(r"learnedopt\[([a-z]+)\]", read(page))) <= declared, page


# Links


def slug(heading: str) -> str:
    """Return the anchor of a heading, as code hosts and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    found: list[str] = []
    for opening, content in zip(tokens(page), tokens(page)[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(child.content for child in content.children or () if child.type in ("text", "code_inline"))
            found.append(slug(text))
    return set(found)


def dead(page: str) -> list[str]:
    """Return the links of a page, to files here or anchors of pages, that lead nowhere."""
    lost = []
    for token in inline(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(str(file.resolve().relative_to(ROOT)))):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert dead(page) == []


def test_a_dead_link_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# The Engine's `core`\n\n[x](b.md) [y](#the-engine) ![z](z.png)", "utf-8")
    assert dead("a.md") == ["b.md", "#the-engine", "z.png"]
    (tmp_path / "b.md").write_text("[x](a.md#the-engines-core) [y](https://example.org/nowhere)", "utf-8")
    assert dead("b.md") == []


# The site


def nav_pages() -> set[str]:
    return set(re.findall(r"^ +- .*?([\w/]+\.md)$", read("mkdocs.yml").split("\nnav:\n")[1], re.M))


def test_the_navigation_has_every_page_and_no_other() -> None:
    assert nav_pages() == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}


def test_every_public_name_is_in_the_api_reference() -> None:
    pages = "".join(read(page) for page in PAGES if page.startswith("docs/api/"))
    documented = re.findall(r"^::: (learnedopt[\w.]*)$", pages, re.M)
    assert len(set(documented)) == len(documented)
    rooms = {"estimators", "inner_objectives", "objectives", "optimizers", "tasks", "evaluate"}
    shown = {name.rpartition(".")[2] for name in documented}
    assert set(learnedopt.__all__) - rooms <= shown
    assert {name for name in learnedopt.optimizers.__all__ if name[0].isupper()} <= shown
    for path in documented:
        module, _, name = path.rpartition(".")
        assert hasattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name), path


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_no_link_in_it_is_dead() -> None:
    pytest.importorskip("zensical", reason="zensical is not installed: pip install 'learnedopt[docs]'")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    made = subprocess.run(
        ["make", "docs", f"BIN={Path(sys.executable).parent}", "-o", ".venv/.installed"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0 and "arning" not in made.stdout + made.stderr, made.stdout + made.stderr
    site = ROOT / "build" / "site"
    pages = list((site / "docs").rglob("*.html"))
    assert len(pages) > len(nav_pages())
    lost = []
    for page in pages:
        html = page.read_text("utf-8")
        outside = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?:[^" >]+)', html)
        assert not outside, (page, outside)  # a page is read without a third party
        for target in re.findall(r'(?:href|src)="?([^" >]+)', html):
            path = target.partition("#")[0]
            if not path or re.match(r"[a-z]+:", path) or page.name == "404.html":
                continue
            if not (page.parent / path).exists():
                lost.append((str(page.relative_to(site)), target))
    assert lost == []


# Troubleshooting


def said() -> list[str]:
    """Return every string of the library, with … for what is filled in."""
    found = []
    for path in (file for room in ("learnedopt", "optimizers", "tasks") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_that_are_quoted_are_the_library_s_own() -> None:
    page = read("docs/troubleshooting.md")
    quoted = re.findall(r'^\| [`"](.+?)[`"]', page, re.M)
    rows = re.findall(r"^\| (?!message|what you see|---)", page, re.M)
    assert len(rows) >= 40 and len(quoted) >= 30
    everything = "\n".join(said())
    for message in quoted:
        for piece in filter(None, (piece.strip(" .;") for piece in message.split("…"))):
            assert piece in everything, (message, piece)
