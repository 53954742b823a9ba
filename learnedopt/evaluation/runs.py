"""Several learned optimizers or learners on one family: that which their records name, unless another is named.

``learned`` is what was loaded, by what each is called in tables, with the record of its meta-training as metadata;
``learnedopt.checkpoint.load_checkpoint`` returns such things.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from learnedopt.core.containers import is_dict, is_list_or_tuple
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerSolver
from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.pace import Pace
from learnedopt.core.plugged import needed
from learnedopt.core.rule import UpdateRule
from learnedopt.core.task import TaskFamily
from learnedopt.core.tree import Theta
from learnedopt.evaluation import evaluate
from learnedopt.evaluation.comparison import Comparison
from learnedopt.evaluation.few_shot import Adaptation, FewShot, adapt


class Learned(Protocol):
    """What a checkpoint holds."""

    @property
    def rule(self) -> UpdateRule:
        """Of the inner steps."""
        ...

    @property
    def inner_objective(self) -> InnerObjective:
        """What they descend."""
        ...

    @property
    def theta(self) -> Theta:
        """Of both."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """How theta was trained."""
        ...


def labelled(checkpoints: Sequence[str]) -> dict[str, str]:
    """Return checkpoints by what each is called: its file's or folder's name, or the path where two share that.

    Raises:
        ValueError: one is named twice.
    """
    labels = [Path(name).name.removesuffix(".safetensors") or "learned" for name in checkpoints]
    if len(set(labels)) < len(labels):
        labels = [str(Path(name)).strip("/").replace("/", "-") for name in checkpoints]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same checkpoint is named twice in {' '.join(checkpoints)}")
    return dict(zip(labels, checkpoints, strict=True))


def compare_runs(
    learned: Mapping[str, Learned], name: str | None = None, options: Mapping[str, Any] = {}, **settings: Any
) -> Comparison:
    """Run several learned optimizers, beside tuned baselines, on the same fresh tasks: one table.

    Args:
        learned: see the module.
        name: of the family, such as ``"quadratic"``; None for that of the records, see ``shared_family``.
        options: of the family; those of the records count where these are silent.
        settings: of ``evaluate.compare``, such as ``num_steps``. The baselines' tuning tasks are of the family's
            training split.

    Raises:
        ValueError: bad input, before the first inner step.
    """
    from learnedopt import tasks

    fresh, others = families(learned, name, options)
    candidates = {label: (each.rule, each.theta, each.inner_objective) for label, each in learned.items()}
    found = evaluate.compare(candidates, fresh, tuning_family=others, **settings)
    return replace(found, settings={"family": tasks.describe(fresh), **found.settings})


def adapt_runs(
    learned: Mapping[str, Learned],
    name: str | None = None,
    options: Mapping[str, Any] = {},
    *,
    solvers: Mapping[str, InnerSolver | None] = {},
    num_steps: int = 10,
    num_tasks: int = 600,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> FewShot:
    """Adapt several learned starts to the same fixed test tasks: one table.

    Args:
        learned: see the module.
        name: of the family; None for that of the records, see ``shared_family``.
        options: of the family; those of the records count where these are silent.
        solvers: what solves the inner problem in the place of the rule's steps, by label; see
            ``learnedopt.config.recorded_solver``.
        num_steps: inner steps; the numbers after each are told.
        num_tasks: two at least.
        seed: of the tasks.
        report: is told, in a line each, what goes on.

    Raises:
        ValueError: bad input, or one does not fit the family: before any is run.
    """
    from learnedopt import tasks

    require_count("num_steps", num_steps)
    require_count("num_tasks", num_tasks, least=2)
    family, _ = families(learned, name, options)
    for label, each in learned.items():
        _require_fit(label, each, family, num_steps, solvers.get(label))
    adaptations: dict[str, Adaptation] = {}
    pace = Pace(len(learned), report)
    for label, each in learned.items():
        inner = solvers.get(label)
        pace.begin(1)
        report(f"Adapting {label} to {num_tasks} tasks{f' by {inner}' if inner else ''} ({pace.words()})")
        adaptations[label] = adapt(
            each.rule, each.theta, family, num_steps, num_tasks, seed=seed, inner=inner,
            inner_objective=each.inner_objective,
        )  # fmt: skip
    about = {"family": tasks.describe(family), "seed": seed, "num_steps": num_steps, "num_tasks": num_tasks}
    return FewShot({**about, "inner": {label: str(inner) for label, inner in solvers.items() if inner}}, adaptations)


def families(
    learned: Mapping[str, Learned], name: str | None = None, options: Mapping[str, Any] = {}
) -> tuple[TaskFamily, TaskFamily]:
    """Return the family of fresh tasks and that of tasks to tune on, of different splits where there are any.

    Raises:
        ValueError: there is no such family, or it cannot be told from the records; see ``shared_family``.
    """
    from learnedopt import tasks

    given, records = dict(options), {label: each.metadata for label, each in learned.items()}
    if name is None:
        name, given = shared_family(records, options)
    try:
        family = tasks.make(name, **given)
    except ValueError as error:
        told = needed(next(iter(records.values()), dict[str, Any]())) if name not in tasks.names() else ""
        raise ValueError(f"{error}{told}") from error
    if not hasattr(family, "meta_split"):
        return family, family
    fresh: dict[str, Any] = {"meta_split": "test", **given}
    others: dict[str, Any] = {**given, "meta_split": "train"}
    return tasks.make(name, **fresh), tasks.make(name, **others)


def shared_family(
    records: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any] = {}
) -> tuple[str, dict[str, Any]]:
    """Return name and options of the family that all were meta-trained on, without the split.

    Where validation had other options than training they are validation's.

    Args:
        records: of meta-trainings, by label.
        options: the user's own, which count first.

    Raises:
        ValueError: a record has none; they are of different ones; or a record would choose which files are read.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for label, record in records.items():
        name, recorded = _recorded_family(label, record)
        _require_no_paths(label, {key: value for key, value in recorded.items() if key not in options})
        found[label] = name, {**recorded, **options}
    first, *_ = found.values()
    if any(each != first for each in found.values()):
        told = "; ".join(f"{label} on {_shown(each, [*found.values()])}" for label, each in found.items())
        raise ValueError(
            f"these were meta-trained on different families ({told}): name one, to evaluate all of them on, with "
            "--family and --set"
        )
    return first


def _shown(family: tuple[str, dict[str, Any]], among: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return a family's name, and those of its options in which it differs from others of that name."""
    name, options = family
    others = [each for own, each in among if own == name]
    differing = {k for each in others for k in each.keys() | options.keys() if each.get(k, ...) != options.get(k, ...)}
    told = ", ".join(f"{key}={options[key]!r}" if key in options else f"no {key}" for key in sorted(differing))
    return f"{name} with {told}" if told else name


def _recorded_family(label: str, record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not record.get("family"):
        raise ValueError(f"{label} has no record of a family; name one with --family")
    try:
        validation: Any = record.get("validation") or {}
        held_out: Any = validation.get("family_options") or {}
        name: str = record["family"]["name"]
        options: dict[str, Any] = {**record["family"]["options"], **held_out}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the record of {label} is of no family ({error!r}); name one with --family") from error
    options.pop("meta_split", None)
    return name, options


def _require_no_paths(label: str, options: dict[str, Any]) -> None:
    """Raise ValueError where the record of a checkpoint would choose the files that are read here."""
    paths = {key: value for key, value in options.items() if _may_name_files(key, value)}
    if paths:
        told = " and ".join(f"{key}={value!r}" for key, value in paths.items())
        raise ValueError(
            f"the record of {label} names what is to be read: {told}; a file does not choose that here: pass "
            f"{' '.join(f'--set {key}=...' for key in paths)} with a folder that you mean"
        )


def _may_name_files(key: str, value: Any) -> bool:
    if is_dict(value):  # a part, or a family of a mixture
        return any(_may_name_files(k, v) for k, v in value.items())
    if is_list_or_tuple(value):
        return any(_may_name_files(key, each) for each in value)
    return isinstance(value, str) and (key in ("root", "lists") or not set(value).isdisjoint("/\\~") or value == "..")


def _require_fit(label: str, learned: Learned, family: TaskFamily, num_steps: int, inner: InnerSolver | None) -> None:
    """Raise ValueError unless it adapts to tasks of the family: to two of them, by one step at most."""
    require_count("num_steps", num_steps, least=1 if inner else 0)
    steps = min(num_steps, 1)
    try:
        adapt(learned.rule, learned.theta, family, steps, 2, inner=inner, inner_objective=learned.inner_objective)
    except ValueError as error:
        trained = learned.metadata.get("family", {})
        hint = f" ({label} was meta-trained on {trained['name']} with {trained['options']})" if trained else ""
        raise ValueError(f"{label} does not fit {family}: {error}{hint}") from error
