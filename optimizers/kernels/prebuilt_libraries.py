"""Libraries that a wheel brings along, for machines without a compiler: built from the C sources for levels of x86-64.

They lie in ``libraries`` beside the sources as ``KEY-SHA256.so``. The key is of source, headers, definitions and flags,
so that a library of other sources is never taken; the hash is that of the file's bytes. The wheel's build hook loads
this file by its path, where neither torch nor the rest of the package is there: it needs the standard library alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

logger: logging.Logger = logging.getLogger("learnedopt")

FOLDER = "libraries"
FLAGS = ("-O3", "-fPIC", "-shared", "-std=gnu11")
DEFINITIONS = {"float32": ("REAL=float", "INTEGER=int"), "float64": ("REAL=double", "INTEGER=long long")}
"""What the sources are compiled with for each of torch's dtypes."""

_V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
LEVELS = {
    "x86-64-v4": frozenset(f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl".split()),
    "x86-64-v3": frozenset(_V3.split()),
}
"""Levels of the x86-64 psABI, best first, and what /proc/cpuinfo says of a processor that has them."""


def load(source: Path, definitions: Sequence[str]) -> ctypes.CDLL | None:
    """Return the library that came with the package for this processor, or None: it is then compiled here.

    Where libraries came along and the right one is missing, damaged or cannot be loaded, a warning says so.
    """
    folder = source.parent / FOLDER
    level = best_level(processor_flags()) if folder.is_dir() else None
    if level is None:
        return None
    key = library_key(source, definitions, level)
    found = sorted(folder.glob(f"{key}-*.so"))
    if not found:
        logger.warning("no library in %s is of %s as it is here, which is compiled instead", folder, source.name)
        return None
    try:
        content = found[0].read_bytes()
        if found[0].name != file_name(key, content):
            raise OSError(f"its {len(content)} bytes have not the hash in its name")
        return ctypes.CDLL(str(found[0]))
    except OSError as error:
        logger.warning("%s is not loaded, and compiled here instead: %s", found[0], error)
        return None


def best_level(flags: Collection[str]) -> str | None:
    """Return the best of ``LEVELS`` that a processor with these flags has, or None."""
    return next((level for level, needed in LEVELS.items() if needed <= set(flags)), None)


def processor_flags() -> frozenset[str]:
    """Return what Linux says that this x86-64 processor can do; nothing on other machines."""
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def library_key(source: Path, definitions: Sequence[str], level: str) -> str:
    """Return what the library of a source is found by: not by compiler, of which the machine may have none."""
    texts = [path.read_text("utf-8") for path in (*sorted(source.parent.glob("*.h")), source)]
    digest = hashlib.sha256("\n".join([*FLAGS, *definitions, level, *texts]).encode()).hexdigest()[:24]
    return f"{source.stem}-{level}-{digest}"


def file_name(key: str, content: bytes) -> str:
    """Return the name of a library of that key with these bytes."""
    return f"{key}-{hashlib.sha256(content).hexdigest()}.so"


def build(sources: Path, target: Path, compiler: str) -> None:
    """Compile every C file of a folder into another, for every dtype and level.

    Raises:
        RuntimeError: the compiler fails; gcc knows the levels from version 11 on, and clang from 12 on.
    """
    for source in sorted(sources.glob("*.c")):
        for definitions in DEFINITIONS.values():
            for level in LEVELS:
                product = target / "built.so"
                options = [*FLAGS, f"-march={level}", *(f"-D{definition}" for definition in definitions)]
                command = [compiler, *options, str(source), "-o", str(product), "-lm"]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise RuntimeError(f"{compiler} could not compile {source.name} for {level}:\n{run.stderr}")
                product.rename(target / file_name(library_key(source, definitions, level), product.read_bytes()))
