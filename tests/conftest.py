"""Fixtures for every test: one thread, float64 where asked for, and where the data sets are."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are written, never shown; inherited by subprocesses


if hasattr(signal, "SIGHUP"):
    # Under nohup it is ignored, which processes that are started inherit: tests send it and wait for what follows.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Take what has been collected out of the garbage collector's sight: thousands of tests stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Compute in one thread: sums are then ordered the same on every machine, and parallel workers do not compete."""
    torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default dtype during the test; for a whole file, ``pytest.mark.usefixtures("float64")``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def generator() -> torch.Generator:
    """Return a CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of the data sets, named by the environment variable LEARNEDOPT_DATA; skip without it."""
    value = os.environ.get("LEARNEDOPT_DATA")
    if not value:
        pytest.skip("needs data sets: set LEARNEDOPT_DATA to a folder that holds MNIST/raw and FashionMNIST/raw")
    root = Path(value)
    if not root.is_dir():
        pytest.fail(f"LEARNEDOPT_DATA={value!r} is not a folder; correct it, or unset it to skip these tests")
    return root
