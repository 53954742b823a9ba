"""Time and memory of a call, each in a process of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import Call, Competitor, Size

BENCH = Path(__file__).with_name("bench.py")
SECONDS = 1.2  # of measuring a process, beside one call at least
MOST = 50  # calls a process
MB = 1e6

# One thread, also in libraries that do not ask torch, and the same processor.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
}
# glibc gives every tensor of 16 KiB or more pages of its own, and so back to the system when it is freed: left to
# itself it keeps freed ones in its heap, which then counts more than is held. It costs time, so time is not taken then.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def single_threaded() -> None:
    """Make torch use one thread."""
    torch.set_num_threads(1)


def times(competitor: Competitor, size: Size, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the milliseconds of CPU and of wall clock that calls take, after a warm-up.

    ``first_s`` is the first call's wall time, with whatever it sets up, checks or compiles once, which is not measured
    again. A call that takes longer than ``seconds`` is measured once after it.
    """
    _small(competitor, size)()
    call = competitor.build(size)
    first = _timed(call)[1]
    samples = [_timed(call)]
    if first < seconds or competitor.warm_at_size:
        while sum(wall for _, wall in samples) < seconds and len(samples) < MOST:
            samples.append(_timed(call))
    cpu, wall = zip(*samples, strict=True)
    return {"cpu_ms": [1e3 * x for x in cpu], "wall_ms": [1e3 * x for x in wall], "first_s": first}


def _timed(call: Call) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak(competitor: Competitor, size: Size) -> float:
    """Return by how many bytes resident memory grows at most during a call, native memory and all.

    Before, one small call (two tasks at most, one step) sets up what is set up once. NaN where the
    kernel does not tell.
    """
    _small(competitor, size)()
    call = competitor.build(size)
    if competitor.warm_at_size:
        call()
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # sets the peak back to the present: see proc(5)
    before = _kilobytes(status, "VmHWM")
    call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _small(competitor: Competitor, size: Size) -> Call:
    if competitor.warm_at_size:
        return list  # compiling a small program would only take time
    return competitor.build(dataclasses.replace(size, steps=1, tasks=min(2, size.tasks)))


def _kilobytes(status: Path, field: str) -> float:
    line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith(field))
    return float(line.split()[1])


def worker(
    workload: str, competitor: str, what: str, size: Size, seconds: float = SECONDS, compiled: str | None = None
) -> Any:
    """Return what ``bench.py --worker`` prints in a fresh process: ``what`` is "times" or "peak".

    Torch keeps what it compiles in the folder ``compiled``, by default where it always does.
    """
    arguments = ["--worker", workload, competitor, what, json.dumps(dataclasses.asdict(size)), str(seconds)]
    environment = {} if compiled is None else {"TORCHINDUCTOR_CACHE_DIR": compiled}
    return run(arguments, {**environment, **(OWN_PAGES if what == "peak" else {})})


def run(arguments: list[str], environment: dict[str, str]) -> Any:
    """Return the JSON that ``bench.py`` prints last when called with these arguments."""
    command = [sys.executable, str(BENCH), *arguments]
    surroundings = {**os.environ, **ONE_THREAD, **environment}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
