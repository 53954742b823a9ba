"""Every file that is read, changed: the short form of ``benchmarks/fuzz.py``, and that this finds what there is."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_targets import Target


def table_of(num_inputs: int, bits: int) -> tuple[int, str]:
    result = fuzz.fuzz(num_inputs, bits)
    print(fuzz.table(result))
    return sum(each.counts["inputs"] for each in result.values()), "\n".join(
        f"{name}: {each.faults}" for name, each in result.items() if each.faults
    )


def test_changed_files_are_refused_or_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", "")  # and back again
    number, faults = table_of(300, 500)
    assert number > 400 and not faults


@pytest.mark.long
def test_twenty_thousand_changed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", "")
    number, faults = table_of(20_000, 1)
    assert number > 20_000 and not faults


def elsewhere(path: Path) -> None:
    (path.parents[1] / "elsewhere").write_text("")


def program(path: Path) -> None:
    subprocess.run(["true"], check=True)


def undocumented(path: Path) -> None:
    raise KeyError("a")


def slow(path: Path) -> None:
    until = time.process_time() + 2.1
    while time.process_time() < until:
        pass


def something_else(path: Path) -> str:
    return "else"


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (elsewhere, "outside: open"), (program, "executed: subprocess.Popen"), (undocumented, "KeyError"),
        (slow, r"2\.\d s"), (something_else, "read as something else"),
    ],
    ids=["elsewhere", "program", "undocumented", "slow", "something else"],
)  # fmt: skip
def test_what_must_not_be_is_found(read: Any, told: str, tmp_path: Path) -> None:
    fuzz.WATCH.hear("open", ("nowhere", None, os.O_WRONLY))  # while nothing is watched
    fuzz.listen()
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a").write_text("sha256")  # a trace of a hash
    found = fuzz.Found()
    fuzz.read(Target("a", lambda path: None, read), folder / "a", "as it was", found, "changed")
    assert found.counts["inputs"] == 1
    assert [each for each in found.faults if re.search(told, each)]
