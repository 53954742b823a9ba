"""Compiled libraries between processes: only what is ours and whole is loaded."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learnedopt.core.private_folder import open_private
from learnedopt.optimizers.kernels import native

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
NOBODY = 65534


@pytest.fixture(autouse=True)
def _fresh() -> None:
    native.library.cache_clear()
    native._warn_not_kept.cache_clear()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a C file with a function of its own name's length, whose library is kept below ``tmp_path``."""
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "three.c"
    path.write_text("int three(void) { return 3; }\n")
    return path


def kept(tmp_path: Path) -> Path:
    """Return the only file in the folder."""
    (path,) = (tmp_path / "cache" / "kernels").iterdir()
    return path


def three(source: Path) -> int:
    """Load the library as a new process would, and call it."""
    native.library.cache_clear()
    library = native.library(source)
    assert library is not None
    return library.three()


def planted(tmp_path: Path, marker: Path) -> Path:
    """Compile a library with the same function that writes a file when it is loaded."""
    code = tmp_path / "planted.c"
    code.write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) void run(void) {{ fclose(fopen("{marker}", "w")); }}\n'
        "int three(void) { return 666; }\n"
    )
    library = tmp_path / "planted.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(code), "-o", str(library)], check=True)
    return library


def plant(tmp_path: Path, place: Path) -> Path:
    """Put such a library where the one of ``place`` lies, with the hash of its own bytes in its name."""
    library = planted(tmp_path, tmp_path / "marker")
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    target = place.with_name(f"{place.name.rpartition('-')[0]}-{digest}.so")
    place.unlink()
    shutil.copy(library, target)
    return target


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file or folder belong to another user than this process."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)


def test_what_is_planted_would_run(source: Path, tmp_path: Path) -> None:
    three(source)
    path = plant(tmp_path, kept(tmp_path))
    assert three(source) == 666 and (tmp_path / "marker").exists()  # nobody but the user can have put it there
    assert path.parent.stat().st_mode & 0o777 == 0o700


def open_to_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everybody write into the folder."""
    path.parent.chmod(0o777)


def of_a_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the group write into the folder."""
    path.parent.chmod(0o770)


def of_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the folder belong to another user."""
    give_away(path.parent, monkeypatch)


def a_link(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the folder be a link to one of ours."""
    elsewhere = path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (open_to_all, "may be written by others (mode 0777)"),
        (of_a_group, "may be written by others (mode 0770)"),
        (of_another, "belongs to the user with the number"),
        (a_link, "is a link"),
    ],
    ids=["open", "group", "foreign", "link"],
)
def test_a_folder_that_others_can_fill_is_never_loaded_from(
    fault: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    three(source)
    path = plant(tmp_path, kept(tmp_path))
    before = path.read_bytes()
    fault(path, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert [three(source) for _ in range(2)] == [3, 3]
    assert not (tmp_path / "marker").exists()
    (record,) = caplog.records
    assert reason in record.message and "LEARNEDOPT_CACHE" in record.message
    assert [file.read_bytes() for file in path.parent.iterdir()] == [before]


def empty(path: Path) -> None:
    """Leave nothing of it."""
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """Leave half of it: mapped, the rest ends in SIGBUS."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    """Let it be a link to the whole one."""
    path.symlink_to(path.rename(path.with_suffix(".elsewhere")))


def pipe(path: Path) -> None:
    """Let it be a pipe, on which reading waits."""
    path.unlink()
    os.mkfifo(path)


def writable(path: Path) -> None:
    """Let others write into it."""
    path.chmod(0o666)


@pytest.mark.parametrize("damage", [empty, cut, flip, link, pipe, writable], ids=lambda damage: damage.__name__)
def test_a_damaged_library_is_built_again(
    damage: Callable[[Path], None], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three(source)
    path = kept(tmp_path)
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert three(source) == 3
    (record,) = caplog.records
    assert str(path) in record.message and "built again" in record.message
    assert path.read_bytes() == whole and path.is_file() and not path.is_symlink()
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert three(source) == 3
    assert len(caplog.records) == 1


def test_a_foreign_file_in_our_folder_is_not_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, who alone can give files away")
    three(source)
    give_away(plant(tmp_path, kept(tmp_path)), monkeypatch)
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert three(source) == 3
    assert "belongs to the user with the number" in caplog.text and not (tmp_path / "marker").exists()
    kept(tmp_path)  # and it is gone


def test_what_is_not_kept_is_loaded_all_the_same(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", "/proc/nowhere")  # no process can write there, root included
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert three(source) == 3
    (record,) = caplog.records
    assert "built anew in every process" in record.message and "/proc" in record.message


def test_a_full_disk_leaves_nothing_half_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert three(source) == 3
    assert "No space left" in caplog.text and not list((tmp_path / "cache" / "kernels").iterdir())


def test_what_the_loader_refuses_is_said_with_the_right_advice(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert native.library(source) is None
    assert "noexec" in caplog.records[-1].message and "Install" not in caplog.text


def test_two_processes_that_build_at_once_leave_one_whole_library(source: Path, tmp_path: Path) -> None:
    code = f"from learnedopt.optimizers.kernels import native; from pathlib import Path\n\
assert native.library(Path({str(source)!r})).three() == 3"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 2
    path = kept(tmp_path)
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest())


def test_no_descriptor_stays_open(tmp_path: Path, source: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    three(source)
    before = count()
    three(source)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="may be written by others"):
        open_private(tmp_path / "open")
    assert count() == before
