"""Change every file that the library reads, and watch what it does: ``python benchmarks/fuzz.py [INPUTS]``.

Bytes are changed at random, bits one by one (all of them, of files with a SHA-256), and what files say is changed by
hypothesis, with the SHA-256 that belongs to it. Counted are: programs that were started, files that were written
elsewhere, errors that no docstring names, inputs that took more than 2 seconds of processor time or 500 MB, and changed
files under a SHA-256 that were read as something else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzz_described import described
from benchmarks.fuzz_targets import Target, targets

SECONDS, MEGABYTES = 2.0, 500
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
_MOVES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link")


@dataclasses.dataclass
class Watch:
    """What is done while a file is read, by the interpreter's audit events."""

    folder: Path | None = None
    executed: list[str] = dataclasses.field(default_factory=list)
    outside: list[str] = dataclasses.field(default_factory=list)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Take note of an event."""
        if self.folder is None:
            return
        if event in _PROGRAMS:
            self.executed.append(f"{event} {args[:1]}")
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in _MOVES) and isinstance(args[0], str | os.PathLike):
            where = Path(os.fspath(args[0])).absolute()
            if not where.is_relative_to(self.folder) and "__pycache__" not in where.parts and str(where) != os.devnull:
                self.outside.append(f"{event} {where}")


WATCH = Watch()


@functools.cache
def listen() -> None:
    """Let ``WATCH`` hear: once and for all, because the interpreter forgets no hook."""
    sys.addaudithook(WATCH.hear)


@dataclasses.dataclass
class Found:
    """Counts of a kind of file, of single bits among them, and what must not be, by what it was."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    bits: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    megabytes: float = 0.0

    def line(self, name: str) -> str:
        """Return a row of the table."""
        numbers = (self.counts[k] for k in ("inputs", "refused", "same", "other"))
        counted = " | ".join(f"{n:,}" for n in numbers)
        return f"| {name} | {counted} | {self.seconds:.2f} | {self.megabytes:.0f} | {self.faults.total()} |"


def read(target: Target, path: Path, expected: Any, found: Found, what: str) -> None:
    """Read a changed file, and count what came of it."""
    memory, began = _peak(), time.process_time()
    size = path.stat().st_size / 1e6
    WATCH.folder, WATCH.executed, WATCH.outside = path.parent, [], []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = "same" if target.read(path) == expected else "other"
    except target.errors:
        kind = "refused"
    except Exception as error:  # noqa: BLE001 - what is looked for
        kind = "undocumented"
        found.faults[f"{type(error).__name__}: {str(error)[:150]} ({what})"] += 1
    finally:
        WATCH.folder = None
    seconds, megabytes = time.process_time() - began, (_peak() - memory) / 1e3 - size
    found.seconds, found.megabytes = max(found.seconds, seconds), max(found.megabytes, megabytes)
    found.counts.update(["inputs", kind])
    found.bits.update([kind] if what.startswith("bit ") else [])
    for wrong, bad in (("executed", WATCH.executed), ("outside", WATCH.outside)):
        found.faults.update(f"{wrong}: {each} ({what})" for each in bad)
    # A file that has lost every trace of its hash is as one of an earlier version, which had none.
    if target.hashed and kind == "other" and not what.startswith("described") and b"sha256" in path.read_bytes():
        found.faults[f"read as something else ({what})"] += 1
    if seconds > SECONDS or megabytes > MEGABYTES:
        found.faults[f"{seconds:.1f} s, {megabytes:.0f} MB ({what})"] += 1


def changed(data: bytes, random: random.Random) -> bytes:
    """Return bytes that were changed at random, in one to three ways."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at, other = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
        start, stop = sorted((at, min(other, at + 64)))
        data = random.choice(_WAYS)(data, start, stop, random)
    return data


_WAYS: list[Callable[[bytes, int, int, random.Random], bytes]] = [
    lambda d, a, b, r: d[:a] + bytes([d[a] ^ 1 << r.randrange(8)]) + d[a + 1 :] if a < len(d) else d + b"\0",
    lambda d, a, b, r: d[:a] + r.randbytes(b - a) + d[b:],
    lambda d, a, b, r: d[:a],
    lambda d, a, b, r: d[:a] + d[b:],
    lambda d, a, b, r: d[:b] + d[a:b] * r.randrange(1, 5) + d[b:],
    lambda d, a, b, r: d[:a] + r.choice((b"\xff", b"\0", b"9", b"[", b'"', b"../")) * (b - a) + d[b:],
    lambda d, a, b, r: d[:a] + r.choice((2**31 - 1, 2**32 - 1, 2**63)).to_bytes(8, "little")[:4] + d[a + 4 :],
    lambda d, a, b, r: d + r.randbytes(r.randrange(1, 200)),
]


def bits(data: bytes) -> Iterator[bytes]:
    """Yield the bytes with each of their bits turned."""
    for bit in range(8 * len(data)):
        at = bit // 8
        yield data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]


def whole(target: Target, folder: Path) -> tuple[Path, bytes, Any]:
    """Write a whole file and return its path, bytes, and what is read of it."""
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    target.make(path)
    (path,) = folder.glob(target.file)
    data = path.read_bytes()
    try:
        expected = target.read(path)
    except target.errors:  # of Celo there is only the beginning of a file
        expected = None
    rewrite(path, data)
    return path, data, expected


def rewrite(path: Path, data: bytes) -> None:
    """Write a file anew: what is mapped of the one before must stay as it is."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def fuzz(num_inputs: int, every_bit: int, seed: int = 0) -> dict[str, Found]:
    """Return what came of at least ``num_inputs`` changed files.

    Args:
        num_inputs: of them all but single bits; a third is described by hypothesis.
        every_bit: of the bits of files with a SHA-256, one of so many is turned alone; 1 turns all.
        seed: of the changes.
    """
    listen()
    kinds, result = targets(), {}
    each = -(-2 * num_inputs // (3 * len(kinds)))
    for name, target in kinds.items():
        found, chosen = result.setdefault(name, Found()), random.Random(f"{seed} {name}")
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LEARNEDOPT_CACHE"] = folder
            path, data, expected = whole(target, Path(folder))
            for i in range(each):
                rewrite(path, changed(data, chosen))
                read(target, path, expected, found, f"changed {i}")
            for i, turned in enumerate(bits(data) if target.hashed and len(data) < 20_000 else ()):
                if i % every_bit == seed % every_bit:
                    rewrite(path, turned)
                    read(target, path, expected, found, f"bit {i}")
    if num_inputs:
        described(num_inputs - num_inputs * 2 // 3, kinds, result, read)
    return result


def table(result: dict[str, Found]) -> str:
    """Return the counts as a Markdown table, and below it those of single bits, and what must not be."""
    head = "| file | inputs | refused | read as it was | read as another | most seconds | most MB | faults |"
    total = Found()
    for found in result.values():
        total.counts.update(found.counts)
        total.faults.update(found.faults)
        total.seconds = max(total.seconds, found.seconds)
        total.megabytes = max(total.megabytes, found.megabytes)
    rows = [found.line(name) for name, found in (*result.items(), ("all", total))]
    faults = [f"{name}: {n} x {what}" for name, found in result.items() for what, n in found.faults.most_common(20)]
    bits = [
        f"{name}: of {each.bits.total():,} single bits {each.bits['refused']:,} refused, {each.bits['same']:,} harmless"
        for name, each in result.items()
        if each.bits
    ]
    return "\n".join([head, "|---" + "|---:" * 7 + "|", *rows, "", *bits, "", *faults])


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    """Fuzz and print the table; return 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="?", type=int, default=20_000, metavar="INPUTS")
    parser.add_argument("--bits", type=int, default=1, metavar="N", help="turn one of N bits (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    result = fuzz(arguments.inputs, arguments.bits, arguments.seed)
    print(f"{table(result)}\n{time.perf_counter() - began:.0f} s")
    return int(any(found.faults for found in result.values()))


if __name__ == "__main__":
    sys.exit(main())
