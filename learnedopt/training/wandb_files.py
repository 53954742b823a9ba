"""Files for W&B, and what it has left in a run's folder: where a run goes on, and which copies nobody needs.

A ``.wandb`` file is 7 bytes of header, then LevelDB's log format: blocks of 32 KiB, in which each piece of a record has
a head of 7 bytes (checksum, length, kind), and pieces of kind 1 are whole, 2, 3 and 4 the first, a middle and the last.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def version(name: str, paths: list[Path], metadata: dict[str, Any], policy: Any = "mutable") -> Any:
    """Return files as a version of the artifact ``name``; W&B tells versions by their files' names and bytes.

    Mutable files are copied at once, since those of the run may change before the upload; immutable ones are not.
    """
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII), "model", metadata=metadata)
    for path in paths:
        artifact.add_file(str(path), name=Path(path).name, policy=policy)
    return artifact


def fragments(folder: Path, run_id: str) -> list[Path]:
    """Return the files of a run in W&B's folder: one of every start, where it went on."""
    return [*folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")]


def last_step(path: Path) -> int:
    """Return the last ``_step`` in a file of W&B, -1 where it has no row: only its end is parsed.

    ``_step`` is W&B's own count of rows. Offline it would start at 0 again in each fragment of a run that goes on.
    """
    data = path.read_bytes()
    for start in range(len(data) // _BLOCK * _BLOCK, -1, -_BLOCK):
        found = map(_record, records(data, start))
        steps = [record.history.step.num for record in found if record.HasField("history")]
        if steps:
            return max(steps)
    return -1


def records(data: bytes, start: int = 0) -> Iterator[bytes]:
    """Yield the whole records that begin in the block at byte ``start`` of a file's content, or after it."""
    at, record = max(start, _HEAD), None
    while at + _HEAD <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEAD:  # a head does not cross blocks
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + _HEAD : at + _HEAD + length]
        if len(piece) < length:  # it was being written when the process died
            return
        at += _HEAD + length
        if kind in (_WHOLE, _FIRST):
            record = piece
        elif record is not None:  # else the end of one that began before
            record += piece
        if record is not None and kind in (_WHOLE, _LAST):
            yield record
            record = None


def remove_unneeded(staging: Path, files: Iterable[Path], ended: Path, patience: float = 5.0) -> None:
    """Remove the files in W&B's staging folder that none of its runs names: an upload reads those that one names.

    W&B makes two copies of every chart's table for each that it uploads.

    Args:
        staging: the folder of what waits for its upload, of these runs alone.
        files: the ``.wandb`` files of the runs that have waited there before.
        ended: the file of the one that has just ended.
        patience: seconds to wait for its last record; nothing is removed where that does not come.
    """
    give_up = time.monotonic() + patience
    while not (last := _payloads(ended)[-1:]) or not _record(last[0]).HasField("exit"):
        if time.monotonic() > give_up:
            return
        time.sleep(0.05)
    named = b"\n".join(payload for path in {*files, ended} for payload in _payloads(path))
    for copy in staging.glob("*"):
        if str(copy).encode() not in named:
            copy.unlink()


def _payloads(path: Path) -> list[bytes]:
    return [*records(path.read_bytes())] if path.exists() else []


def _record(payload: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # generated when it is imported, so type checkers do not see what is inside
    record = messages.Record()
    record.ParseFromString(payload)
    return record
