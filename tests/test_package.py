"""What surrounds the code: the citation, the hooks and the release say what the package says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import learnedopt

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_the_citation_is_of_this_version_and_names_the_papers() -> None:
    cited = yaml.safe_load(read("CITATION.cff"))
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert cited["version"] == learnedopt.__version__
    assert f'license = "{cited["license"]}"' in read("pyproject.toml")
    assert {"message", "title", "authors"} <= set(cited)
    arxiv = [paper["identifiers"][0]["value"] for paper in cited["references"]]
    assert len(arxiv) == 4 and all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", number) for number in arxiv)
    assert all(paper["title"] and paper["year"] and paper["authors"] for paper in cited["references"])


def test_the_hooks_run_what_is_installed() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    programs = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert programs == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/pyright"]


CHECK = (
    "import pathlib, sys\nassert '9.1.0' in pathlib.Path('learnedopt/__init__.py').read_text()\nprint(sys.argv[1:])\n"
)


ADDRESSES = "\n".join(f'{name} = "https://example.org/{name}"' for name in ("Repository", "Documentation", "Issues"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a repository with what a release reads and changes, and a check of the wheel that only looks at one."""
    for name in (".ci/release.py", "learnedopt/__init__.py", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(read(name), "utf-8")
    log = tmp_path / "CHANGELOG.md"
    log.write_text(re.sub(r"^## .*$", "## 9.0.0 – unreleased", log.read_text("utf-8"), count=1, flags=re.M), "utf-8")
    (tmp_path / ".ci" / "check_wheel.py").write_text(CHECK, "utf-8")
    (tmp_path / "pyproject.toml").write_text(f"[project.urls]\n{ADDRESSES}\n[tool.x]\n", "utf-8")
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "Start")):
        git(tmp_path, *arguments)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    who = {f"GIT_{role}_{what}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = [sys.executable, ".ci/release.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **who})


def test_a_release_is_a_commit_and_a_tag_of_what_was_checked(copy: Path) -> None:
    dry = release(copy, "9.1.0")
    assert dry.returncode == 0 and "-## 9.0.0 – unreleased" in dry.stdout and '+__version__ = "9.1.0"' in dry.stdout
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""
    done = release(copy, "9.1.0", "--torch", "torch==1", "--go")
    assert done.returncode == 0, done.stderr
    assert str(["torch==1", str(copy / "dist")]) in done.stdout
    assert (git(copy, "tag", "--points-at", "HEAD"), git(copy, "status", "--porcelain")) == ("v9.1.0", "")
    assert re.search(r"^## 9\.1\.0 – \d{4}-\d\d-\d\d$", (copy / "CHANGELOG.md").read_text("utf-8"), re.M)
    cited = yaml.safe_load((copy / "CITATION.cff").read_text("utf-8"))
    assert cited["version"] == "9.1.0" and f"– {cited['date-released']}" in (copy / "CHANGELOG.md").read_text("utf-8")
    assert "v9.1.0 is there already" in release(copy, "9.1.0").stderr
    assert "is not `## x.y.z – unreleased`" in release(copy, "9.2.0").stderr


def test_a_release_that_fails_its_check_leaves_nothing(copy: Path) -> None:
    done = release(copy, "9.2.0", "--go")
    assert done.returncode == 1 and "AssertionError" in done.stderr
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""
    assert git(copy, "rev-list", "--count", "HEAD") == "1"


@pytest.mark.parametrize(
    ("project", "missing"),
    [
        ("[project]\n", "no Repository, Documentation, Issues"),
        (f"[project.urls]\n{ADDRESSES.replace('Issues', '#Issues')}\n", "no Issues"),
        (f"[project.urls]\n{ADDRESSES.replace('https://example.org/Doc', 'TODO')}\n", "no Documentation"),
        (f"[project.urls]\n[tool.x]\n{ADDRESSES}\n", "no Repository, Documentation, Issues"),
    ],
    ids=["none", "commented", "placeholder", "elsewhere"],
)
def test_a_release_without_an_address_is_refused(project: str, missing: str, copy: Path) -> None:
    (copy / "pyproject.toml").write_text(project, "utf-8")
    git(copy, "commit", "--allow-empty", "-qam", "Addresses")
    done = release(copy, "9.1.0", "--go")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{missing}: a release says" in done.stderr
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""


def test_every_address_that_is_named_is_a_paper_s_or_the_project_s_own() -> None:
    section = read("pyproject.toml").split("[project.urls]\n")[1].split("\n[")[0]
    papers = dict(re.findall(r'^"(.+?)" = "https://arxiv\.org/abs/(.+?)"$', section, re.M))
    cited = {paper["identifiers"][0]["value"]: paper for paper in yaml.safe_load(read("CITATION.cff"))["references"]}
    for name, number in papers.items():  # "Li et al. 2017"
        paper = cited[f"arXiv:{number}"]
        assert name == f"{paper['authors'][0]['family-names']} et al. {paper['year']}"
    others = [line for line in section.splitlines() if line and "arxiv.org" not in line and not line.startswith("#")]
    assert {line.split(" = ")[0] for line in others} <= {"Repository", "Documentation", "Issues", "Changelog"}
    assert len(papers) == len(cited)


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.0.9", "is not later than"), ("1.0", "is no version"), ("v1.0.0", "is no version"), ("", "is no version")],
    ids=["earlier", "short", "letter", "none"],
)
def test_what_is_no_version_is_refused(version: str, message: str, copy: Path) -> None:
    assert message in release(copy, version, "--go").stderr
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""


def test_a_release_is_of_what_is_committed(copy: Path) -> None:
    (copy / "new.py").write_text("", "utf-8")
    assert "not committed" in release(copy, "9.1.0", "--go").stderr
    assert git(copy, "tag") == ""
