"""Freed memory that stays with the process, each case in a process of its own: malloc is set up once for all."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

# Five rounds of what a task's graph does to the heap; the page faults after the first are printed. Later rounds alone
# would not do: where some small block happens to lie on top, the heap stays even if nobody asks for it.
ROUNDS = """
import resource, torch, learnedopt
loop = learnedopt.InnerLoop(learnedopt.tasks.make("quadratic"), learnedopt.optimizers.make("sgd"))
generator = torch.Generator().manual_seed(0)
carry = loop.start(loop.family.sample(1, generator))
learnedopt.Unrolled(1).estimate(loop, loop.rule.init_theta(generator), learnedopt.FinalLoss(), carry)
for i in range(5):
    if i == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**18) for _ in range(40)]  # 1 MiB each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, learnedopt.execution.allocator.keep_freed_memory())
"""


def gnu() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):
        return False


needs_gnu = pytest.mark.skipif(not gnu(), reason="this C library's malloc is not the GNU one, and is left alone")


def faults(**environment: str) -> tuple[int, bool]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    count, kept = done.stdout.split()
    return int(count), kept == "True"


@needs_gnu
def test_an_estimate_makes_freed_memory_stay() -> None:
    stayed, kept = faults()
    assert kept
    count, kept = faults(LEARNEDOPT_KEEP_MEMORY="0")
    assert not kept and count > 10 * stayed + 100  # 10,240 pages of 4 KiB, fewer of larger ones


@needs_gnu
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")],
)
def test_malloc_is_left_as_the_user_has_set_it_up(name: str, value: str) -> None:
    (stayed, _), (count, kept) = faults(), faults(**{name: value})
    assert not kept and count > 10 * stayed + 100
