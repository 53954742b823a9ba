"""Learned rules, untuned, and hard baselines, tuned, on a fixed suite of nets; each result is a file of its own."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.containers import is_dict
from learnedopt.core.counts import require_count
from learnedopt.core.execution import Execution
from learnedopt.core.files import plain_json
from learnedopt.core.inner_objective import TaskLoss
from learnedopt.core.pace import duration
from learnedopt.core.registry import nearest
from learnedopt.core.sealed import read_record, write_record
from learnedopt.core.task import Tasks
from learnedopt.evaluation import lanes
from learnedopt.evaluation.evaluate import Candidate, sample_tasks
from learnedopt.evaluation.grids import FEW, HARD_BASELINES, Grid, Point, Search, search
from learnedopt.evaluation.nets import UNSEEN, Net

LAST = 20
"""Steps whose mean loss is what a run is judged by."""
Graphs: TypeAlias = Literal["none", "baselines", "all"]
Judged: TypeAlias = Literal["last_twenty", "last_ten", "final_loss"]
"""The mean of the train losses before the last 20 or 10 updates; the loss on held-out data after the last one."""


@dataclass(frozen=True)
class Protocol:
    """How the suite is run: what results that stand in one table have in common.

    Args:
        num_seeds: tasks that are reported, at least 2.
        num_tuning_tasks: other tasks of the same net, on which a baseline's rate and choices are tuned.
        num_final: held-out batches that a test loss is a mean over.
        tune_for: the measure whose mean over the tuning tasks is tuned.
        seed: of all tasks.
    """

    num_seeds: int = 4
    num_tuning_tasks: int = 16
    num_final: int = 16
    tune_for: Judged = "last_twenty"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_seeds", 2), ("num_tuning_tasks", 1), ("num_final", 1)):
            require_count(name, getattr(self, name), least=least)
        known = get_args(Judged)
        if self.tune_for not in known:
            raise ValueError(f"tune_for={self.tune_for!r} is none of {', '.join(known)}{nearest(self.tune_for, known)}")


def run_suite(
    candidates: Mapping[str, Candidate],
    nets: Sequence[Net] = UNSEEN,
    baselines: Mapping[str, Grid] = HARD_BASELINES,
    *,
    folder: str | Path,
    protocol: Protocol = Protocol(),
    execution: Execution = Execution(vet=False),
    graphs: Graphs = "none",
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Run all on all nets and leave a file for each pair in ``folder``; what is there already is not run again.

    Several processes may work in one folder on different nets, and folders may be joined by copying.

    Args:
        candidates: label -> rule and theta, and the inner objective where that is not the task's loss.
        nets: what is trained.
        baselines: label -> what is tuned.
        folder: where results are kept; see ``learnedopt.evaluation.suite_table.collect`` for reading them.
        protocol: see there.
        execution: how.
        graphs: whose steps are run as CUDA graphs; a rule that makes tensors of constants at a step cannot be.
        report: is told, in one line each, what is done.

    Raises:
        ValueError: bad input; a result in the folder is of another theta, grid or protocol; a baseline that diverges at
            every rate.
    """
    if graphs not in get_args(Graphs):
        raise ValueError(f"graphs={graphs!r} is none of {', '.join(get_args(Graphs))}")
    if twice := candidates.keys() & baselines.keys():
        raise ValueError(f"{sorted(twice)} name both candidates and baselines; label the candidates otherwise")
    num_each = len(candidates) + len(baselines)
    left, begun, num_done = len(nets) * num_each, time.perf_counter(), 0
    for net in nets:
        missing: list[tuple[str, Candidate | Grid, Path, dict[str, Any]]] = []
        for label, what in (*candidates.items(), *baselines.items()):
            path, about = result_path(folder, net, label), _about(net, what, protocol)
            if not _is_done(path, about):
                missing.append((label, what, path, about))
        left -= num_each - len(missing)
        if not missing:
            report(f"{net.name}: all {num_each} results are there")
            continue
        at = _NetRun(net, protocol, execution, graphs)
        for label, what, path, about in missing:
            began = time.perf_counter()
            found = at.tuned(what) if isinstance(what, Grid) else at.untuned(what)
            seconds = time.perf_counter() - began
            result = {"net": net.name, "optimizer": label, "about": about, **found, "seconds": round(seconds, 2)}
            write_record(path, plain_json({**result, "made_with": _machine(execution)}))
            left, num_done = left - 1, num_done + 1
            ahead = duration(left * (time.perf_counter() - begun) / num_done)  # as if those ahead were like these
            report(
                f"{net.name}: {label} {_mean(found['last_twenty']):.4g} in {seconds:.1f} s{_tuned(found)}; "
                f"{left} to do, about {ahead}"
            )


def result_path(folder: str | Path, net: Net, label: str) -> Path:
    """Return where a result lies."""
    names = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in (net.name, label)]
    return Path(folder) / "results" / names[0] / f"{names[1]}.json"


class _NetRun:
    """What all optimizers on one net share: tasks, and batches that are drawn once."""

    def __init__(self, net: Net, protocol: Protocol, execution: Execution, graphs: Graphs) -> None:
        device = torch.device(execution.device or "cpu")
        if net.lanes and execution.chunk_size is None and device.type == "cuda":
            execution = replace(execution, chunk_size=net.lanes)
        self.family = lanes.Remembered(net.make(), device)
        self.num_steps, self.protocol, self.execution, self.graphs = net.num_steps, protocol, execution, graphs
        self.tuning = sample_tasks(self.family, protocol.num_tuning_tasks, "suite tuning", protocol.seed)
        self.fresh = sample_tasks(self.family, protocol.num_seeds, "suite fresh", protocol.seed)

    def untuned(self, candidate: Candidate) -> dict[str, Any]:
        """Return the outcome of a learned rule on the reported tasks."""
        objective = candidate[2] if len(candidate) == 3 else TaskLoss()
        trained = lanes.train(
            candidate[0], [candidate[1]], self.family, self.fresh, self.num_steps, self.execution,
            inner_objective=objective, num_final=self.protocol.num_final, graph=self.graphs == "all",
        )  # fmt: skip
        return {"kind": "candidate", **_outcome(trained)}

    def tuned(self, grid: Grid) -> dict[str, Any]:
        """Return the outcome of a baseline on the reported tasks, tuned on the others."""
        by = self.protocol.tune_for

        def score(points: Sequence[Point], few: bool) -> list[float]:
            tasks = tree.narrow(self.tuning, 0, min(FEW, self.protocol.num_tuning_tasks)) if few else self.tuning
            return tree.numbers(judged(self._train(grid, points, tasks))[by].mean(0))

        single = len(grid.rates) == len(grid.choices) == 1
        found = Search(Point(grid.rates[0], 0), {}, {}) if single else search(score, grid)
        outcome = _outcome(self._train(grid, [found.best], self.fresh))
        tuning = {
            name: [[*point, score] for point, score in sorted(scores.items())]
            for name, scores in (("screened", found.screened), ("tried", found.scores))
        }
        values = grid.values(found.best)
        return {"kind": "baseline", "values": values, "at_edge": found.at_edge, **tuning, **outcome}

    def _train(self, grid: Grid, points: Sequence[Point], tasks: Tasks) -> lanes.Trained:
        rule = grid.make(self.num_steps)
        thetas = lanes.points(rule, [grid.values(point) for point in points])
        return lanes.train(
            rule, thetas, self.family, tasks, self.num_steps, self.execution,
            num_final=self.protocol.num_final, graph=self.graphs != "none",
        )  # fmt: skip


def judged(trained: lanes.Trained) -> dict[Judged, Tensor]:
    """Return both measures (num_tasks, num_thetas), infinite for runs on which any loss was not finite."""
    finite = trained.losses.isfinite().all(0) & trained.final.isfinite()
    last: dict[Judged, Tensor] = {
        "last_twenty": trained.losses[-LAST:].mean(0),
        "last_ten": trained.losses[-10:].mean(0),
    }
    values: dict[Judged, Tensor] = {**last, "final_loss": trained.final}
    return {name: torch.where(finite, value, math.inf) for name, value in values.items()}


def _outcome(trained: lanes.Trained) -> dict[str, Any]:
    values = {str(name): tree.numbers(value[:, 0]) for name, value in judged(trained).items()}
    losses = [[float(f"{x:.5g}") for x in each] for each in tree.numbers(trained.losses[:, :, 0].T)]
    return {**values, "num_diverged": sum(map(math.isinf, values["final_loss"])), "losses": losses}


def _about(net: Net, what: Candidate | Grid, protocol: Protocol) -> dict[str, Any]:
    """Say what a result is of: with another answer it is another result."""
    if isinstance(what, Grid):
        whose: dict[str, Any] = {"make": repr(what.make), "rates": what.rates, "choices": what.choices}
    else:
        digest = hashlib.sha256()
        for name, value in sorted(what[1].items()):
            digest.update(f"{name} {tuple(value.shape)}".encode() + value.detach().double().cpu().numpy().tobytes())
        whose = {"rule": repr(type(what[0]).__name__), "theta": digest.hexdigest()[:16]}
    own = {"family": net.family, "options": net.options, "num_steps": net.num_steps}
    return json.loads(json.dumps(plain_json({**own, **vars(protocol), **whose})))


def read_result(path: Path) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
    """Return a result, and its numbers: means of the last steps and last losses (num_seeds,), losses (steps, seeds).

    Raises:
        ValueError: it is damaged, or no result.
    """
    record = read_record(path)
    if not all(isinstance(record.get(key), str) for key in ("net", "optimizer", "kind")):
        raise ValueError(f"{path} is no result of a suite; remove it")
    try:
        last, final = (
            torch.tensor([float(x) for x in record[key]], dtype=torch.float64) for key in ("last_twenty", "final_loss")
        )
        losses = torch.tensor([[float(x) for x in seed] for seed in record["losses"]], dtype=torch.float64).T
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no numbers where those of a result are ({error!r}); remove it") from error
    return record, (last, final, losses)


def _is_done(path: Path, about: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    there = read_record(path).get("about")
    if not is_dict(there):
        raise ValueError(f"{path} is no result of a suite; remove it to run again, or choose another folder")
    if there != about:
        other = sorted(k for k in {*there, *about} if there.get(k) != about.get(k))
        raise ValueError(
            f"{path} is a result with other {', '.join(other)}; remove it to run again, or choose another folder"
        )
    return True


def _machine(execution: Execution) -> dict[str, str]:
    device = torch.device(execution.device or "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": name}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tuned(found: Mapping[str, Any]) -> str:
    if not found.get("tried"):
        return ""
    values = ", ".join(f"{name} {value:.3g}" for name, value in found["values"].items())
    return f" ({values}{', at the edge of what was tried' if found['at_edge'] else ''})"
