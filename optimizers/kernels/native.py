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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from learnedopt.core.private_folder import cache_folder, open_private
from learnedopt.optimizers.kernels import kept_libraries, prebuilt_libraries

logger: logging.Logger = logging.getLogger("learnedopt")

SWITCH = "LEARNEDOPT_NATIVE"
NAMES = {getattr(torch, dtype): names for dtype, names in prebuilt_libraries.DEFINITIONS.items()}
"""What the sources are compiled with for each dtype."""


@functools.cache
def library(source: Path, *definitions: str) -> ctypes.CDLL | None:
    """Return the compiled ``source``, or None where it cannot be compiled or ``LEARNEDOPT_NATIVE`` is 0.

    The reason for None is logged, once for each source. A library that came with the wheel is taken where it is whole,
    of this very source, and for this processor. Libraries that are compiled here are kept in the folder ``kernels`` of
    ``$LEARNEDOPT_CACHE``, by default ``learnedopt`` in the user's cache folder, by source, compiler, flags and
    processor. Where that folder is another user's, or others may write into it, nothing is loaded from it: a warning is
    logged, and the library is built in a temporary folder of this process alone.

    Args:
        source: a C file that includes no others than headers beside it, ``*.h``.
        definitions: preprocessor definitions, such as ``REAL=float``.
    """
    if os.environ.get(SWITCH) == "0":
        logger.info("%s=0: %s is left to pure torch", SWITCH, source.stem)
        return None
    brought = prebuilt_libraries.load(source, definitions)
    if brought is not None:
        return brought
    try:
        return _library(source, _command(definitions))
    except (OSError, subprocess.SubprocessError) as error:
        _warn_once(source.stem, str(error))
        return None


def plain(tensors: Iterable[Tensor]) -> bool:
    """Return whether the numbers of all tensors lie at their pointers: those of a subclass need not."""
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    logger.warning("%s runs in pure torch, slower: %s", name, reason)


@functools.cache
def _warn_not_kept(reason: str) -> None:
    logger.warning(
        "compiled steps are built anew in every process, in a private temporary folder, because %s. If that is not as "
        "it should be, remove it, or name another folder in LEARNEDOPT_CACHE",
        reason,
    )


def _library(source: Path, command: list[str]) -> ctypes.CDLL:
    try:
        found = _kept(source, command)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _warn_not_kept(str(error))
        found = None
    if found is not None:
        return found
    with _compiled(source, command) as product:
        try:
            return ctypes.CDLL(str(product))
        except OSError as error:
            raise OSError(
                f"what {command[0]} made of it cannot be loaded ({error}): is TMPDIR mounted noexec?"
            ) from error


def _kept(source: Path, command: list[str]) -> ctypes.CDLL | None:
    place = cache_folder() / "kernels"
    key = _key(source, command)
    folder = open_private(place)
    try:
        found = kept_libraries.load(folder, place, key)
        if found is None:
            with _compiled(source, command) as product:
                kept_libraries.keep(folder, key, product)
            found = kept_libraries.load(folder, place, key)
        return found
    finally:
        os.close(folder)


@contextmanager
def _compiled(source: Path, command: list[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="learnedopt-") as folder:  # of mode 0700
        product = Path(folder) / f"{source.stem}.so"
        run = subprocess.run(
            [*command, str(source), "-o", str(product), "-lm"],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if run.returncode:
            said = run.stderr.strip().partition("\n")[0]
            raise subprocess.SubprocessError(
                f"{command[0]} could not compile it ({said}). Install gcc, or name another compiler in CC"
            )
        yield product


def _command(definitions: tuple[str, ...]) -> list[str]:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError(
            "no C compiler was found (tried CC, cc, gcc and clang). Install gcc, or name a compiler in CC"
        )
    return [compiler, "-march=native", *prebuilt_libraries.FLAGS, *(f"-D{definition}" for definition in definitions)]


def _key(source: Path, command: list[str]) -> str:
    """Return what a library is found again by."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    # A library for another processor would end in an illegal instruction: home folders are shared between machines.
    texts = [path.read_text() for path in (*sorted(source.parent.glob("*.h")), source)]
    key = hashlib.sha256("\n".join([*command, version, _processor(), *texts]).encode()).hexdigest()[:24]
    return f"{source.stem}-{key}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() + platform.machine()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
