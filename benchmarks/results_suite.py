"""Learned rules, untuned, and tuned baselines on the fixed suites of nets; it needs torch, numpy and safetensors alone.

Run ``python benchmarks/results_suite.py --folder runs/suite --candidates general=CHECKPOINT``. What is done already is
not run again. On a GPU: ``--device cuda --graphs baselines --processes 5``, each process on nets of its own. Tables and
figures follow in the same folder; ``--tables-only`` makes them alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from learnedopt.core.execution import Execution
from learnedopt.evaluation import suite_table
from learnedopt.evaluation.evaluate import Candidate
from learnedopt.evaluation.grids import named
from learnedopt.evaluation.nets import SUITES, Net, chosen, dealt
from learnedopt.evaluation.suite import Protocol, run_suite


def main() -> None:
    """Run what the command line names."""
    arguments = parser().parse_args()
    nets = chosen(arguments.suite, [name.strip() for name in arguments.nets.split(";") if name.strip()])
    if not arguments.tables_only:
        shares = dealt(nets, arguments.processes)
        if len(shares) == 1:
            work(arguments, shares[0])
        else:
            in_processes(arguments, shares)
    found = suite_table.collect(arguments.folder, [net.name for net in SUITES[arguments.suite]])
    print(found.markdown())
    print(*found.save(arguments.folder).values(), sep="\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--folder", type=Path, required=True, help="of the results")
    found.add_argument("--suite", default="unseen", choices=SUITES, help="default unseen")
    found.add_argument("--nets", default="", metavar="A;B", help="names or numbers from 1 on; default all")
    found.add_argument("--candidates", nargs="*", default=[], metavar="NAME=CHECKPOINT", help="learned rules")
    found.add_argument("--baselines", default="main", metavar="A;B", help="labels, 'main' (default), 'all' or 'none'")
    found.add_argument("--seeds", type=int, default=4, help="reported tasks (default 4)")
    found.add_argument("--tuning-tasks", type=int, default=16, help="default 16")
    found.add_argument("--device", default="cpu")
    found.add_argument("--graphs", default="none", choices=("none", "baselines", "all"), help="run as CUDA graphs")
    found.add_argument("--lanes", type=int, help="runs taken together; default by the size of the net")
    found.add_argument("--processes", type=int, default=1, help="each on nets of its own (default 1)")
    found.add_argument("--threads", type=int, default=1, help="of torch, in each process (default 1)")
    found.add_argument("--tables-only", action="store_true", help="run nothing")
    return found


def work(arguments: argparse.Namespace, nets: Sequence[Net]) -> None:
    """Run the suite on these nets."""
    torch.set_num_threads(arguments.threads)
    run_suite(
        learned(arguments.candidates), nets, named(arguments.baselines), folder=arguments.folder,
        protocol=Protocol(num_seeds=arguments.seeds, num_tuning_tasks=arguments.tuning_tasks),
        execution=Execution(chunk_size=arguments.lanes, device=arguments.device, vet=False), graphs=arguments.graphs,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip


def learned(pairs: Sequence[str]) -> dict[str, Candidate]:
    """Return the learned rules that a command line names as NAME=CHECKPOINT."""
    from learnedopt.checkpoint import load_checkpoint

    candidates: dict[str, Candidate] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise SystemExit(f"--candidates {pair!r} is not of the form NAME=CHECKPOINT")
        found = load_checkpoint(path)
        candidates[name] = (found.rule, found.theta, found.inner_objective)
    return candidates


def in_processes(arguments: argparse.Namespace, shares: Sequence[Sequence[Net]]) -> None:
    """Run each share of the nets in a process of its own; leave with an error if any does."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    started = [context.Process(target=work, args=(arguments, share)) for share in shares]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit("a process failed; see above. What is done stays: run again for the rest")


if __name__ == "__main__":
    main()
