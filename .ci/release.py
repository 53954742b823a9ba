"""Make a release: version, changelog and citation, archives that are checked, a commit and a tag. Nothing is uploaded.

Usage: python .ci/release.py VERSION [--torch REQUIREMENT] [--go]

Without ``--go`` it says what it would change and do, and leaves everything as it is. With it, the sdist and the wheel
that passed .ci/check_wheel.py lie in dist/; where the check fails, the files are as they were and nothing is committed.
Either way it ends with the reason while pyproject.toml does not say where the released project is to be found.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION_FILE, CHANGELOG, CITATION = "learnedopt/__init__.py", "CHANGELOG.md", "CITATION.cff"
ADDRESSES = ("Repository", "Documentation", "Issues")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="Make a release.")
    parser.add_argument("version", metavar="VERSION", help="x.y.z")
    parser.add_argument("--torch", default="torch", help="the requirement that the wheel is checked with")
    parser.add_argument("--go", action="store_true", help="do it")
    arguments = parser.parse_args()
    version, tag = arguments.version, f"v{arguments.version}"
    if git("tag", "--list", tag):
        sys.exit(f"{tag} is there already: a version is released once")
    before = {name: (ROOT / name).read_text("utf-8") for name in (VERSION_FILE, CHANGELOG, CITATION)}
    after = released(before, version, datetime.date.today().isoformat())
    for name, text in after.items():
        lines = difflib.unified_diff(before[name].splitlines(), text.splitlines(), name, name, lineterm="", n=0)
        print("\n".join(lines))
    if missing := without_address((ROOT / "pyproject.toml").read_text("utf-8")):
        sys.exit(f"[project.urls] of pyproject.toml has no {', '.join(missing)}: a release says where it is")
    check = [sys.executable, str(ROOT / ".ci" / "check_wheel.py"), arguments.torch, str(ROOT / "dist")]
    if not arguments.go:
        print(f"\nWould change that, run {' '.join(check)}, commit, and tag {tag}. GO=1 does it.")
        return
    if git("status", "--porcelain"):
        sys.exit("there are changes that are not committed: a release is of what is")
    write(after)
    try:
        subprocess.run(check, check=True)
    except BaseException:
        write(before)
        raise
    git("commit", "--quiet", "-m", f"Version {version}", "--", *after)
    git("tag", "--annotate", tag, "-m", f"Version {version}")
    print(f"{tag} is committed and tagged here; the archives are in dist/. Pushing and uploading is yours to do.")


def released(before: dict[str, str], version: str, date: str) -> dict[str, str]:
    """Return the texts of the three files of a release; what cannot be one ends the program with the reason."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        sys.exit(f"VERSION={version!r} is no version; say x.y.z, such as VERSION=0.2.0")
    declared = re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', before[VERSION_FILE], re.M)
    if declared is None or numbers(version) < numbers(declared[1]):
        sys.exit(f"{version} is not later than the {declared and declared[1]} of {VERSION_FILE}")
    section = re.search(r"^## (?P<head>.*)\n(?P<body>(?:(?!## ).*\n?)*)", before[CHANGELOG], re.M)
    if section is None or not section["head"].endswith("– unreleased") or "\n- " not in section["body"]:
        sys.exit(f"the first section of {CHANGELOG} is not `## x.y.z – unreleased` with a line on what changed")
    head = f"## {version} – {date}"
    cited = re.sub(r"^date-released: .*\n", "", before[CITATION], flags=re.M)
    return {
        VERSION_FILE: before[VERSION_FILE].replace(declared[0], f'__version__ = "{version}"'),
        CHANGELOG: before[CHANGELOG].replace(f"## {section['head']}", head, 1),
        CITATION: re.sub(r"^version: .*$", f"version: {version}\ndate-released: '{date}'", cited, flags=re.M),
    }


def without_address(project: str) -> list[str]:
    """Return which of ADDRESSES a pyproject.toml has no https address for. By its lines: Python 3.10 reads no TOML."""
    section = re.search(r"^\[project\.urls\]\n(?P<body>(?:(?!\[).*\n?)*)", project, re.M)
    named = re.findall(r'^"?(\w+)"? *= *"https://\S+"', section["body"], re.M) if section else []
    return [name for name in ADDRESSES if name not in named]


def numbers(version: str) -> tuple[int, ...]:
    """Return a version as it is compared."""
    return tuple(map(int, version.split(".")))


def write(texts: dict[str, str]) -> None:
    """Write the files."""
    for name, text in texts.items():
        (ROOT / name).write_text(text, "utf-8")


def git(*arguments: str) -> str:
    """Run git here and return what it printed; a failing one ends the program with its output."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
