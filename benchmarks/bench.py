"""The benchmarks: every workload by every competitor that imports, each in fresh processes of one thread.

Run ``make bench``, or ``python benchmarks/bench.py [--only NAMES] [--rounds N] [--quick] [--scaling]``. First all
competitors of a workload compute the same meta-gradient in float64; who differs by more than 1e-6 is not measured. Then
they take turns, A B C A B C ..., so that whatever else the machine does meets all of them. A whole run writes
``docs/benchmarks.md`` and its figure; a part of it, or ``--quick``, only prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from typing import Any

from benchmarks import (
    measure,
    report,
    scaling,
    workloads_adam,
    workloads_evolution,
    workloads_implicit,
    workloads_lstm,
    workloads_maml,
    workloads_step,
)
from benchmarks.suite import Size, Workload, absent, difference

WORKLOADS: dict[str, Workload] = {
    **workloads_maml.WORKLOADS,
    **workloads_implicit.WORKLOADS,
    **workloads_lstm.WORKLOADS,
    **workloads_step.WORKLOADS,
    **workloads_adam.WORKLOADS,
    **workloads_evolution.WORKLOADS,
}
AGREE = 1e-6  # relative difference of meta-gradients in float64
ROUNDS = 3
QUICK_SECONDS = 0.1


def check(workload: Workload, size: Size | None = None) -> dict[str, float | str | None]:
    """Return each competitor's relative difference from the reference in float64, why it is absent, or None."""
    size = dataclasses.replace(size or workload.check, dtype="float64")
    expected = workload.competitors[workload.reference].build(size)() if not absent_reference(workload) else None
    found: dict[str, float | str | None] = {}
    for name, competitor in workload.competitors.items():
        reason = absent(competitor)
        if reason is not None or not competitor.compared:
            found[name] = reason
        elif expected is None:
            found[name] = f"{workload.reference}, which it is compared with, is {absent_reference(workload)}"
        else:
            found[name] = difference(competitor.build(size)(), expected)
    return found


def absent_reference(workload: Workload) -> str | None:
    """Return why the competitor that others are compared with cannot run here, or None."""
    return absent(workload.competitors[workload.reference])


def compare(name: str, rounds: int, *, quick: bool = False) -> report.Results:
    """Check, time and weigh all competitors of a workload."""
    workload = WORKLOADS[name]
    began = time.perf_counter()
    size, seconds = (workload.check, QUICK_SECONDS) if quick else (workload.size, measure.SECONDS)
    differences = measure.run(["--check", name], {})
    differs = {k: d for k, d in differences.items() if isinstance(d, float) and not d <= AGREE}
    excluded = {k: d for k, d in differences.items() if isinstance(d, str)}
    excluded |= {k: f"not measured: its gradient differs by {d:.0e}" for k, d in differs.items()}
    taking_part = [k for k in workload.competitors if k not in excluded]
    turns: dict[str, list[dict[str, Any]]] = {k: [] for k in taking_part}
    with tempfile.TemporaryDirectory() as folder:  # a first turn finds nothing compiled, the others what it has left
        for _ in range(rounds):
            for i, competitor in enumerate(taking_part):
                found = measure.worker(name, competitor, "times", size, seconds, f"{folder}/{i}")
                turns[competitor].append(found)
    measured = {
        k: report.Measured(
            cpu_ms=[statistics.median(turn["cpu_ms"]) for turn in turns[k]],
            wall_ms=[statistics.median(turn["wall_ms"]) for turn in turns[k]],
            peak=measure.worker(name, k, "peak", size),
            first_s=[turn["first_s"] for turn in turns[k]],
            difference=differences[k],
        )
        for k in taking_part
    }
    tape = None
    if workload.tape is not None:
        two, one = (measure.worker(name, workload.tape, "peak", dataclasses.replace(size, steps=n)) for n in (2, 1))
        tape = two - one
    return report.Results(workload, measured, excluded, tape, time.perf_counter() - began)


def serve(workload: str, competitor: str, what: str, size: str, seconds: str) -> Any:
    """Do one measurement, in the process that it is for."""
    measure.single_threaded()
    chosen = {**WORKLOADS, **scaling.WORKLOADS}[workload].competitors[competitor]
    if what == "peak":
        return measure.peak(chosen, Size(**json.loads(size)))
    return measure.times(chosen, Size(**json.loads(size)), float(seconds))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each competitor ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: to see that everything runs")
    parser.add_argument("--scaling", action="store_true", help="instead: time and memory against size")
    parser.add_argument("--check", metavar="WORKLOAD", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.names = options.only.split(",") if options.only else list(WORKLOADS)
    unknown = [name for name in options.names if name not in WORKLOADS]
    if unknown or options.rounds < 1:
        parser.error(f"unknown workloads {unknown}; there are {', '.join(WORKLOADS)}" if unknown else "--rounds < 1")
    return options


def main(arguments: list[str]) -> None:
    """Do what the command line says."""
    options = parse(arguments)
    if options.worker:
        print(json.dumps(serve(*options.worker)))
        return
    if options.check:
        measure.single_threaded()
        print(json.dumps(check(WORKLOADS[options.check])))
        return
    if options.scaling:
        scaling.main(quick=options.quick)
        return
    results = {}
    for name in options.names:
        results[name] = compare(name, 1 if options.quick else options.rounds, quick=options.quick)
        print(report.section(results[name]), flush=True)
        print(f"({name}: {results[name].seconds:.0f} s)\n", flush=True)
    if not options.quick and not options.only:
        report.write_part("benchmarks", report.page(results.values(), options.rounds))
        print(f"wrote {report.PAGE} and {report.draw(results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
