"""The tables of a suite: ratios to tuned baselines, paired by seeds, out of the files that ``run_suite`` left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.files import plain_json, write_json
from learnedopt.evaluation.comparison import align, summarise, write_text
from learnedopt.evaluation.grids import HARD_BASELINES
from learnedopt.evaluation.suite import LAST, read_result

Shown: TypeAlias = Literal["last_twenty", "final_loss"]
"""What ratios are of: see ``learnedopt.evaluation.suite.Judged``."""

REFERENCES = ("Adam", "AdamW + cosine", "Muon + cosine")
"""What ratios are shown to, where it was run."""
GOAL = "AdamW + cosine"
"""Whose final level is to be reached, and whose test loss is compared with."""
_HUGE = torch.finfo(torch.float64).max  # for a loss that is infinite
_POINTS = 60  # of a curve in the joined file and in figures
_SAID = (
    f"Mean train loss before the last {LAST} updates, geometric mean over seeds of the ratio to each baseline on the "
    f"same seeds, ± half its 95 % interval; share of the steps until the mean of {LAST} losses in a row is where "
    f"{GOAL} ends; test loss after the last step."
)


@dataclass(frozen=True)
class Result:
    """What one optimizer did on one net, by seeds.

    Args:
        record: the whole file.
        last_twenty: (num_seeds,), infinite where the run diverged, as ``final_loss``.
        final_loss: (num_seeds,), on held-out data.
        losses: (num_steps, num_seeds), the train losses before each update.
    """

    record: Mapping[str, Any]
    last_twenty: Tensor
    final_loss: Tensor
    losses: Tensor

    @property
    def is_candidate(self) -> bool:
        """Whether it was given, not tuned."""
        return self.record["kind"] == "candidate"

    @property
    def is_tuned(self) -> bool:
        """Whether anything was tuned."""
        return bool(self.record.get("tried"))


class Ratio(NamedTuple):
    """A geometric mean of ratios, and its 95 % interval by Student's t over seeds; below 1 the candidate is better."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Suite:
    """Results by net and optimizer: net -> label -> result; nets in the order that they are shown in."""

    results: Mapping[str, Mapping[str, Result]]

    @property
    def candidates(self) -> list[str]:
        """The labels of learned rules."""
        return self._labels(lambda result: result.is_candidate)

    @property
    def baselines(self) -> list[str]:
        """The labels of hand-designed optimizers."""
        return self._labels(lambda result: not result.is_candidate)

    def _labels(self, wanted: Callable[[Result], bool]) -> list[str]:
        found = [label for by in self.results.values() for label, result in by.items() if wanted(result)]
        return list(dict.fromkeys(found))

    def ratio(self, net: str, label: str, reference: str, measure: Shown = "last_twenty") -> Ratio | None:
        """Return a candidate's losses to a reference's on one net; None where one of them was not run."""
        logs = self._logs(net, label, reference, measure)
        return None if logs is None else _ratio(logs)

    def geometric_mean(self, label: str, reference: str, measure: Shown = "last_twenty") -> Ratio | None:
        """Return the geometric mean over nets; its interval is that of each seed's mean over nets."""
        each = [logs for net in self.results if (logs := self._logs(net, label, reference, measure)) is not None]
        return _ratio(torch.stack(each).mean(0)) if each and len({len(logs) for logs in each}) == 1 else None

    def _logs(self, net: str, label: str, reference: str, measure: Shown) -> Tensor | None:
        by = self.results[net]
        if label not in by or reference not in by:
            return None
        ours, theirs = (getattr(by[name], measure) for name in (label, reference))
        # A baseline that diverges on a reported seed loses by nothing that can be measured: it is counted, see tables.
        return torch.where(theirs.isfinite() | ours.isinf(), ours.log() - theirs.clamp(max=_HUGE).log(), 0.0)

    def best_tuned(self, net: str) -> str | None:
        """Return the tuned baseline with the lowest mean loss, chosen on the reported seeds: that favours it."""
        tuned = {k: r for k, r in self.results[net].items() if r.is_tuned}
        return min(tuned, key=lambda k: float(tuned[k].last_twenty.mean())) if tuned else None

    def steps_to_reach(self, net: str, label: str, reference: str = GOAL) -> float | None:
        """Return the share of the steps after which a candidate is where the reference ends, a median over seeds.

        The first step at which the mean of the last 20 train losses is at most the reference's at its end, seed by
        seed, over all steps; infinite if that never happens.
        """
        by = self.results[net]
        if label not in by or reference not in by:
            return None
        found = steps_to_reach(by[label].losses, by[reference].last_twenty) / len(by[label].losses)
        return _median(tree.numbers(found))

    def rows(self, label: str) -> list[dict[str, Any]]:
        """Return one row a net of what there is to say about a candidate."""
        found: list[dict[str, Any]] = []
        for net, by in self.results.items():
            if label not in by:
                continue
            best = self.best_tuned(net)
            ratios = {name: self.ratio(net, label, name) for name in REFERENCES}
            found.append(
                {
                    "net": net,
                    "num_steps": len(by[label].losses),
                    "last_twenty": float(by[label].last_twenty.mean()),
                    **{f"to {name}": ratio for name, ratio in ratios.items()},
                    "to the best tuned": self.ratio(net, label, best) if best else None,
                    "best tuned": best,
                    "steps": self.steps_to_reach(net, label),
                    "test": self.ratio(net, label, GOAL, "final_loss"),
                    "num_diverged": by[label].record["num_diverged"],
                }
            )
        return found

    def summary(self, label: str) -> dict[str, Any]:
        """Return a candidate's geometric means, its worst net and medians over nets."""
        rows = self.rows(label)
        found: dict[str, Any] = {"num_nets": len(rows), "num_diverged": sum(row["num_diverged"] for row in rows)}
        for name in REFERENCES:
            known = [(row[f"to {name}"].mean, row["net"]) for row in rows if row[f"to {name}"]]
            worst = max(known) if known else (None, None)
            mean = self.geometric_mean(label, name)
            found[f"to {name}"] = {
                "geometric_mean": mean and mean._asdict(),
                "median": _median([ratio for ratio, _ in known]), "worst": worst[0], "worst_net": worst[1],
            }  # fmt: skip
        found["median_steps"] = _median([row["steps"] for row in rows if row["steps"] is not None])
        found["median_test"] = _median([row["test"].mean for row in rows if row["test"]])
        return found

    def describe(self) -> dict[str, Any]:
        """Return all numbers, and curves at places spaced by their logarithm, as what JSON can hold."""
        nets = {}
        for net, by in self.results.items():
            nets[net] = {label: self._described(result) for label, result in by.items()}
        summaries = {label: self.summary(label) for label in self.candidates}
        return plain_json({"summaries": summaries, "nets": nets})

    @staticmethod
    def _described(result: Result) -> dict[str, Any]:
        steps, values = thinned(result.losses)
        curve = {"steps": steps, "mean": _short(values.mean(1)), "seeds": [_short(each) for each in values.T]}
        kept = {k: v for k, v in result.record.items() if k not in ("losses", "about", "net", "optimizer")}
        return {**kept, "curve": curve}

    def markdown(self) -> str:
        """Return the tables: one a candidate, and the losses of all on all nets."""
        texts = [self._table(label) for label in self.candidates]
        return "\n".join([*texts, self._losses()])

    def _table(self, label: str) -> str:
        head = ["net", "T", "last 20", *(f"/ {name}" for name in REFERENCES), "/ best tuned"]
        rows = [[*head, f"steps to {GOAL}", f"test / {GOAL}", "diverged"]]
        for row in self.rows(label):
            ratios = [_shown(row[f"to {name}"]) for name in REFERENCES]
            best = f"{_shown(row['to the best tuned'])} ({row['best tuned']})" if row["best tuned"] else ""
            start = [row["net"], str(row["num_steps"]), f"{row['last_twenty']:.4g}"]
            rows.append([*start, *ratios, best, _share(row["steps"]), _shown(row["test"]), str(row["num_diverged"])])
        found = self.summary(label)
        to = [found[f"to {name}"] for name in REFERENCES]
        means = [_shown(self.geometric_mean(label, name)) for name in REFERENCES]
        rows.append(["**geometric mean**", "", "", *means, "", "", "", str(found["num_diverged"])])
        worst = ["" if t["worst"] is None else f"{t['worst']:.3f}" for t in to]
        rows.append(["**worst net**", "", "", *worst, "", "", "", ""])
        medians = ["" if x is None else f"{x:.3f}" for x in (*(t["median"] for t in to), found["median_test"])]
        rows.append(["**median**", "", "", *medians[:-1], "", _share(found["median_steps"]), medians[-1], ""])
        return f"### {label}\n\n{_SAID}\n\n{align(rows)}"

    def _losses(self) -> str:
        labels = [*self.candidates, *self.baselines]
        rows = [["net", *labels]]
        for net, by in self.results.items():
            rows.append([net, *(_cell(by[label]) if label in by else "" for label in labels)])
        return f"### Last 20 losses\n\nMeans over seeds; in brackets what was tuned.\n\n{align(rows)}"

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write suite.json, suite.md and the figures into ``folder``; return the paths by what they hold."""
        from learnedopt.evaluation.suite_plots import plot_matrix, plot_suite_curves

        names = {"json": "suite.json", "md": "suite.md", "png": "suite.png", "curves": "suite-curves.png"}
        paths = {key: Path(folder) / name for key, name in names.items()}
        write_json(paths["json"], self.describe())
        write_text(paths["md"], self.markdown())
        plot_matrix(paths["png"], self)
        plot_suite_curves(paths["curves"], self)
        return paths


def collect(folder: str | Path, order: Sequence[str] = ()) -> Suite:
    """Read all results in a folder.

    Args:
        folder: where ``run_suite`` left them.
        order: names of nets, in the order to show them in; others follow.

    Raises:
        ValueError: there are none, or one is damaged.
    """
    by_net: dict[str, dict[str, Result]] = {}
    for path in sorted(Path(folder).glob("results/*/*.json")):
        record, (last, final, losses) = read_result(path)
        by_net.setdefault(record["net"], {})[record["optimizer"]] = Result(record, last, final, losses)
    if not by_net:
        raise ValueError(f"{folder} holds no results of a suite; run it first")
    first = [net for net in order if net in by_net]
    known = [*HARD_BASELINES]

    def place(label: str, result: Result) -> tuple[bool, int, str]:
        return not result.is_candidate, known.index(label) if label in known else len(known), label

    ordered = {net: sorted(by.items(), key=lambda item: place(*item)) for net, by in by_net.items()}
    return Suite({net: dict(ordered[net]) for net in dict.fromkeys([*first, *sorted(by_net)])})


def steps_to_reach(losses: Tensor, level: Tensor, window: int = LAST) -> Tensor:
    """Return after how many steps the mean of ``window`` losses in a row is at most ``level``, infinite for never.

    Args:
        losses: (num_steps, num_seeds).
        level: (num_seeds,).
        window: of at most all steps.

    Returns:
        (num_seeds,), ``window`` at least.
    """
    window = min(window, len(losses))
    means = losses.unfold(0, window, 1).mean(-1)
    # The same numbers are summed in another order than those of the level: it is reached up to rounding.
    reached = means <= level * (1 + 1e-9)
    first = reached.int().argmax(0) + window
    return torch.where(reached.any(0), first.double(), math.inf)


def thinned(losses: Tensor) -> tuple[list[float], Tensor]:
    """Return at most 60 places, from step 1 on and spaced by logarithm, and the means of the losses around them."""
    num_steps = len(losses)
    places = torch.logspace(0, math.log10(num_steps + 1), _POINTS + 1, dtype=torch.float64).round().long()
    edges: list[int] = sorted(set(tree.numbers(places)))
    pieces = [losses[low - 1 : high - 1] for low, high in itertools.pairwise(edges)]
    steps = [math.sqrt(low * (high - 1)) for low, high in itertools.pairwise(edges)]
    return [float(f"{s:.4g}") for s in steps], torch.stack([piece.mean(0) for piece in pieces])


def _ratio(logs: Tensor) -> Ratio:
    found = summarise(logs)
    return Ratio(*(_exp(x) for x in (found.mean, found.low, found.high)))


def _exp(x: float) -> float:
    return math.inf if x == math.inf else math.exp(x)


def _median(values: Sequence[float]) -> float | None:
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    low, high = ordered[(n - 1) // 2], ordered[n // 2]
    return low if low == high else (low + high) / 2


def _short(values: Tensor) -> list[float]:
    return [float(f"{x:.5g}") for x in tree.numbers(values)]


def _shown(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.mean:.3f} ± {(ratio.high - ratio.low) / 2:.2g}"


def _share(steps: float | None) -> str:
    if steps is None:
        return ""
    return "never" if math.isinf(steps) else f"{steps:.2f} T"


def _cell(result: Result) -> str:
    text = f"{float(result.last_twenty.mean()):.4g}"
    if result.record["num_diverged"]:
        text += f", {result.record['num_diverged']} diverged"
    if not result.is_tuned:
        return text
    others = [f"{name} {value:g}" for name, value in result.record["values"].items() if name != "lr"]
    edge = ["at the edge"] if result.record["at_edge"] else []
    return f"{text} ({', '.join([format(result.record['values']['lr'], '.2g'), *others, *edge])})"
