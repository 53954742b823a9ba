"""Libraries that a wheel brings along: the right one is loaded, and what is not whole or not of this source is not."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learnedopt.optimizers.kernels import native, prebuilt_libraries

ROOT = Path(__file__).resolve().parent.parent
V4, V3 = prebuilt_libraries.LEVELS.values()
SOURCE = """
int width(void) {
#ifdef __AVX512F__
    return 512 + (int)sizeof(REAL);
#else
    return 256 + (int)sizeof(REAL);
#endif
}
"""

needs_v3 = pytest.mark.skipif(
    prebuilt_libraries.best_level(prebuilt_libraries.processor_flags()) is None or shutil.which("gcc") is None,
    reason="needs gcc and a processor of x86-64-v3",
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a C file whose libraries lie beside it; what is compiled is kept below ``tmp_path``."""
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "sources" / "width.c"
    target = path.parent / prebuilt_libraries.FOLDER
    target.mkdir(parents=True)
    path.write_text(SOURCE)
    prebuilt_libraries.build(path.parent, target, "gcc")
    return path


def width(source: Path, dtype: torch.dtype = torch.float32) -> int | None:
    """Load the library as a new process would, and call it."""
    native.library.cache_clear()
    library = native.library(source, *native.NAMES[dtype])
    return None if library is None else library.width()


@needs_v3
def test_what_came_along_is_taken_for_the_processor_and_needs_no_compiler(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    if prebuilt_libraries.processor_flags() >= V4:
        assert (width(source), width(source, torch.float64)) == (516, 520)
    monkeypatch.setattr(prebuilt_libraries, "processor_flags", lambda: V3)
    assert (width(source), width(source, torch.float64)) == (260, 264)
    monkeypatch.setenv(native.SWITCH, "0")
    assert width(source) is None
    assert not (tmp_path / "cache").exists()


@needs_v3
def test_another_processor_compiles(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt_libraries, "processor_flags", lambda: V3 - {"fma"})
    assert width(source) is not None and len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


def flip(path: Path) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave half of it: mapped, the rest would end in SIGBUS."""
    os.truncate(path, path.stat().st_size // 2)


def no_library(path: Path) -> None:
    """Put other bytes there, with their hash in the name: what the system's loader refuses."""
    path.unlink()
    name = prebuilt_libraries.file_name(path.name.rpartition("-")[0], b"other")
    path.with_name(name).write_bytes(b"other")


def edit_header(path: Path) -> None:
    """Change what the source may include."""
    (path.parent.parent / "new.h").write_text("int x;\n")


@needs_v3
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "have not the hash in its name"),
        (cut, "have not the hash in its name"),
        (no_library, "file too short"),
        (edit_header, "as it is here, which is compiled instead"),
    ],
    ids=["flip", "cut", "no library", "header"],
)
def test_what_is_damaged_or_of_other_sources_is_compiled_instead(
    damage: Callable[[Path], None],
    reason: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(prebuilt_libraries, "processor_flags", lambda: V3)
    key = prebuilt_libraries.library_key(source, native.NAMES[torch.float32], "x86-64-v3")
    (path,) = (source.parent / prebuilt_libraries.FOLDER).glob(f"{key}-*.so")
    damage(path)
    with caplog.at_level(logging.WARNING, logger="learnedopt"):
        assert width(source) is not None
    (record,) = caplog.records
    assert reason in record.message and "instead" in record.message
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (V4, "x86-64-v4"),
        (V4 - {"avx512dq"}, "x86-64-v3"),
        (V3, "x86-64-v3"),
        (V4 - {"avx2"}, None),
        (frozenset(), None),
    ],
    ids=["v4", "most of v4", "v3", "less", "none"],
)
def test_the_level_is_the_best_that_the_processor_has(flags: frozenset[str], level: str | None) -> None:
    assert prebuilt_libraries.best_level(flags) == level


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_sources_that_do_not_compile_end_the_build(tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text("int f(void) { return no_such_name; }")
    with pytest.raises(RuntimeError, match=r"(?s)bad\.c for x86-64-v4.*no_such_name"):
        prebuilt_libraries.build(tmp_path, tmp_path, "gcc")


@pytest.mark.long
@needs_v3
def test_a_wheel_brings_every_step_along_where_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "LEARNEDOPT_PREBUILT": "1"}, capture_output=True)
    (wheel,) = tmp_path.glob("*-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.endswith(".so")}
    folder = Path(native.__file__).parent
    for source in folder.glob("*.c"):
        for names in native.NAMES.values():
            for level in prebuilt_libraries.LEVELS:
                key = prebuilt_libraries.library_key(source, names, level)
                (name,) = (name for name in found if Path(name).name.startswith(f"{key}-"))
                assert Path(name).parent.as_posix() == f"learnedopt/optimizers/kernels/{prebuilt_libraries.FOLDER}"
                found.remove(name)
    assert not found
