"""Small C sources that stand beside a rule, compiled at first use and kept between processes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

logger = logging.getLogger("learnedopt")

SWITCH = "LEARNEDOPT_NATIVE"
NAMES = {torch.float32: ("REAL=float", "INTEGER=int"), torch.float64: ("REAL=double", "INTEGER=long long")}
"""What the sources that know floats and doubles are compiled with for each."""
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-std=gnu11")


@functools.cache
def library(source: Path, *definitions: str) -> ctypes.CDLL | None:
    """Return the compiled ``source``, or None where it cannot be compiled or ``LEARNEDOPT_NATIVE`` is 0.

    The reason for None is logged, once for each source. Compiled libraries are kept in ``LEARNEDOPT_CACHE``, by default
    ``learnedopt`` in the user's cache folder, under a name that says source, compiler, flags and processor.

    Args:
        source: a C file that includes no others than headers beside it, ``*.h``.
        definitions: preprocessor definitions, such as ``REAL=float``.
    """
    if os.environ.get(SWITCH) == "0":
        logger.info("%s=0: %s is left to pure torch", SWITCH, source.stem)
        return None
    try:
        return ctypes.CDLL(str(_built(source, definitions)))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:  # RuntimeError: no home folder
        detail = getattr(error, "stderr", None) or str(error)
        _warn_once(source.stem, detail.strip().partition("\n")[0])
        return None


def plain(tensors: Iterable[Tensor]) -> bool:
    """Return whether the numbers of all tensors lie at their pointers: those of a subclass need not."""
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    logger.warning(
        "%s could not be compiled, so it runs in pure torch, slower: %s. Install gcc, or name a compiler in CC",
        name,
        reason,
    )


def _built(source: Path, definitions: tuple[str, ...]) -> Path:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler was found (tried CC, cc, gcc and clang)")
    command = [compiler, *_FLAGS, *(f"-D{definition}" for definition in definitions)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    # A library for another processor would end in an illegal instruction: home folders are shared between machines.
    texts = [path.read_text() for path in (*sorted(source.parent.glob("*.h")), source)]
    key = hashlib.sha256("\n".join([*command, version, _processor(), *texts]).encode()).hexdigest()[:24]
    target = _cache_folder() / f"{source.stem}-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several processes may build at once
            product = Path(folder) / target.name
            subprocess.run(
                [*command, str(source), "-o", str(product), "-lm"],
                capture_output=True, text=True, check=True, timeout=300,
            )  # fmt: skip
            os.replace(product, target)
    return target


def _cache_folder() -> Path:
    own = os.environ.get("LEARNEDOPT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "learnedopt"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() + platform.machine()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
