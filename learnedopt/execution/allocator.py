"""Freed memory stays with the process: on a CPU, taking it back from the system costs a tenth of a meta-gradient.

The C library hands the top of its heap back once more than twice the largest block so far lies free there. The graph
of a task is a heap of large blocks: returned after each task, every page of it is faulted in anew for the next.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os

logger: logging.Logger = logging.getLogger("learnedopt")

# malloc.h's names and numbers.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, OWN_MAPPING = 1 << 30, 1 << 25  # 2**25 is the most that malloc takes
THE_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@functools.cache
def keep_freed_memory() -> bool:
    """Ask the GNU C library, once a process, to keep up to 1 GiB of freed memory; return whether it does.

    Blocks below 32 MiB come from that memory; larger ones are mapped and unmapped by themselves, as before. Nothing is
    changed under another C library, where the user has set malloc up (``MALLOC_TRIM_THRESHOLD_`` and its kin, or
    ``GLIBC_TUNABLES``), or with ``LEARNEDOPT_KEEP_MEMORY=0``.
    """
    environment = os.environ
    if environment.get("LEARNEDOPT_KEEP_MEMORY") == "0":
        return False
    if any(name in environment for name in THE_USERS_OWN) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - other libraries' mallopt, where they have one, has other options
    except (OSError, TypeError, AttributeError):
        return False
    kept = bool(library.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING) and library.mallopt(M_TRIM_THRESHOLD, KEPT))
    logger.debug("freed memory stays with the process: %s", kept)
    return kept
