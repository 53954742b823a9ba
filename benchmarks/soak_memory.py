"""The memory of a long training: what it holds is sampled while it runs, and must not grow after its first minutes."""

from __future__ import annotations

import json
import signal
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak_runs import Training, family, last_step, started, wait_for_end
from learnedopt.core.files import write_json

# The LSTM on MNIST as it is trained, only longer, and with more of what is written.
LONG = Training(
    "lstm-mnist",
    ("num_meta_steps=1000000", "validation.every=10", "validation.num_tasks=2", "checkpoint_every=10"),
    data=True,
)
EVERY, SETTLED, WINDOW = 10.0, 300.0, 60.0
"""Seconds between two samples, after which the training has settled, and over which a level is taken."""
LIMIT = 0.02
"""The share by which memory may differ from its level after ``SETTLED`` seconds."""
COUNTS = ("threads", "handles", "children")


def sample(pid: int) -> dict[str, float]:
    """Return what a process holds, and its children: resident and own memory in bytes, threads, open handles."""
    training = psutil.Process(pid)
    children = training.children(recursive=True)
    memory = training.memory_full_info()
    return {
        "rss": memory.rss,
        "own": memory.uss,  # without what is shared with other processes, such as mapped libraries
        "children_rss": sum(child.memory_info().rss for child in children),
        "threads": training.num_threads(),
        "handles": training.num_fds(),
        "children": len(children),
        "children_threads": sum(child.num_threads() for child in children),
        "children_handles": sum(child.num_fds() for child in children),
    }


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """Train for so long, sample into ``folder/memory.jsonl``, stop by SIGTERM; return and write the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    runs, samples, began = folder / "memory", [], time.monotonic()
    with started(LONG, runs, wandb="offline") as process, open(folder / "memory.jsonl", "w", encoding="utf-8") as file:
        while process.poll() is None and time.monotonic() - began < 60 * minutes:
            time.sleep(EVERY)
            with suppress(psutil.NoSuchProcess):  # one of them ended while it was looked at
                now = time.monotonic() - began
                samples.append({"seconds": now, "meta_step": last_step(runs / "run"), **sample(process.pid)})
                file.write(json.dumps(samples[-1]) + "\n")
                file.flush()
        children = family(process.pid)
        process.send_signal(signal.SIGTERM)
        wait_for_end(process)
        _, left = psutil.wait_procs(children, timeout=30)
    found = verdict(samples) | {
        "exit_code": process.returncode,
        "processes_left": len(left),
        "meta_steps": last_step(runs / "run"),
    }
    found["passed"] = found["passed"] and process.returncode == 128 + signal.SIGTERM and not left
    write_json(folder / "memory.json", found)
    return found


def verdict(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Return the levels after the first minutes and at the end, and whether what is held has stayed the same.

    Memory is that of the training and of W&B's service; its level is the median over ``WINDOW`` seconds. Of counts it
    is the least: a thread that a call waits for may be met in any sample. The threads of W&B's service are in the
    samples, and not judged: its runtime makes them as it likes.
    """
    end = samples[-1]["seconds"] if samples else 0.0
    if end < SETTLED + 2 * WINDOW:
        return {"minutes": end / 60, "passed": False, "why": "too short for a verdict"}
    first = [s for s in samples if SETTLED <= s["seconds"] <= SETTLED + WINDOW]
    last = [s for s in samples if s["seconds"] >= end - WINDOW]
    found: dict[str, Any] = {"minutes": end / 60, "samples": len(samples)}
    for name in ("rss", "own", "children_rss"):
        before, after = (statistics.median(s[name] for s in each) for each in (first, last))
        found[name] = {"after 5 minutes": before, "at the end": after, "most": max(s[name] for s in samples)}
    for name in COUNTS:
        before, after = (min(s[name] for s in each) for each in (first, last))
        found[name] = {"after 5 minutes": before, "at the end": after, "most": max(s[name] for s in samples)}
    totals = [sum(found[name][when] for name in ("rss", "children_rss")) for when in ("after 5 minutes", "at the end")]
    found["growth"] = totals[1] / totals[0] - 1
    found["passed"] = found["growth"] <= LIMIT and all(
        found[name]["at the end"] <= found[name]["after 5 minutes"] for name in COUNTS
    )
    return found
