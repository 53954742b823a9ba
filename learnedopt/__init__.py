"""Learned optimizers: one differentiable inner-loop engine with unrolled, truncated and implicit meta-gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

__version__ = "0.2.0"

# All is imported at first use: what needs no tensors, such as a command's help, does not wait for torch, and the engine
# not for files, plots and the registries.
_LAZY = {
    "Carry": "learnedopt.core.carry",
    "Rollout": "learnedopt.core.carry",
    "Tape": "learnedopt.core.carry",
    "Estimate": "learnedopt.core.estimator",
    "GradientEstimator": "learnedopt.core.estimator",
    "Execution": "learnedopt.core.execution",
    "HorizonWarning": "learnedopt.core.horizon",
    "InnerLoop": "learnedopt.core.inner",
    "InnerObjective": "learnedopt.core.inner_objective",
    "Penalty": "learnedopt.core.inner_objective",
    "TaskLoss": "learnedopt.core.inner_objective",
    "FinalLoss": "learnedopt.core.objective",
    "LogMeans": "learnedopt.core.objective",
    "MeanLogLoss": "learnedopt.core.objective",
    "MetaObjective": "learnedopt.core.objective",
    "OfLosses": "learnedopt.core.objective",
    "SumOfLosses": "learnedopt.core.objective",
    "TaskMean": "learnedopt.core.objective",
    "Bound": "learnedopt.core.rule",
    "Kernel": "learnedopt.core.rule",
    "State": "learnedopt.core.rule",
    "UpdateRule": "learnedopt.core.rule",
    "Batch": "learnedopt.core.task",
    "TaskFamily": "learnedopt.core.task",
    "Tasks": "learnedopt.core.task",
    "Params": "learnedopt.core.tree",
    "Theta": "learnedopt.core.tree",
    "Combined": "learnedopt.estimators.combined",
    "EvolutionStrategies": "learnedopt.estimators.evolution",
    "ForwardMode": "learnedopt.estimators.forward",
    "HessianFree": "learnedopt.estimators.hessian_free",
    "ConvergenceWarning": "learnedopt.estimators.implicit",
    "Implicit": "learnedopt.estimators.implicit",
    "GMRES": "learnedopt.estimators.linear_solvers",
    "ConjugateGradient": "learnedopt.estimators.linear_solvers",
    "LinearSolver": "learnedopt.estimators.linear_solvers",
    "Neumann": "learnedopt.estimators.linear_solvers",
    "Solution": "learnedopt.estimators.linear_solvers",
    "PersistentES": "learnedopt.estimators.persistent",
    "TaskByTask": "learnedopt.estimators.task_by_task",
    "FirstOrder": "learnedopt.estimators.unrolled",
    "Truncated": "learnedopt.estimators.unrolled",
    "TruncatedBackprop": "learnedopt.estimators.unrolled",
    "Unrolled": "learnedopt.estimators.unrolled",
    "CompileWarning": "learnedopt.execution.programs",
    "HypergradientFeedback": "learnedopt.objectives.feedback",
    "KLDivergence": "learnedopt.objectives.matching",
    "Matching": "learnedopt.objectives.matching",
    "SquaredDistance": "learnedopt.objectives.matching",
    "SumOfLossesSolver": "learnedopt.objectives.solvers",
    "BootstrappedTarget": "learnedopt.objectives.target_matching",
    "TargetMatching": "learnedopt.objectives.target_matching",
    "BestInHindsight": "learnedopt.objectives.targets",
    "Bootstrap": "learnedopt.objectives.targets",
    "Found": "learnedopt.objectives.targets",
    "LastIterate": "learnedopt.objectives.targets",
    "RegularizedSolution": "learnedopt.objectives.targets",
    "Target": "learnedopt.objectives.targets",
    "AcceptIfBetter": "learnedopt.plug_in.guard",
    "Guard": "learnedopt.plug_in.guard_rail",
    "GuardReport": "learnedopt.plug_in.guard_rail",
    "Card": "learnedopt.cards",
    "HyperOptimizer": "learnedopt.plug_in.hyper",
    "LearnedOptimizer": "learnedopt.optim",
    "MetaTrainer": "learnedopt.training.trainer",
    "NamedTensors": "learnedopt.core.named_tensors",
    "RunDiverged": "learnedopt.plug_in.learner",
    "TrainingDiverged": "learnedopt.training.trainer",
    "ModuleFamily": "learnedopt.tasks.module_family",
    "Validation": "learnedopt.training.trainer",
    "PresentGradient": "learnedopt.plug_in.guard",
    "card": "learnedopt.cards",
    "load": "learnedopt.checkpoint",
    "load_checkpoint": "learnedopt.checkpoint",
    "packaged": "learnedopt.checkpoint",
    "diagnose": "learnedopt.evaluation.diagnose",
    "predict_peak": "learnedopt.execution.memory",
    "save": "learnedopt.checkpoint",
    "evaluate": "learnedopt.evaluation.evaluate",
    "Constant": "learnedopt.core.weights",
    "DualAveraging": "learnedopt.meta_optimizers.dual_averaging",
    "FollowTheLeader": "learnedopt.meta_optimizers.follow_the_leader",
    "FollowTheRegularizedLeader": "learnedopt.objectives.regularized_leader",
    "GuessAndGrow": "learnedopt.meta_optimizers.guess_and_grow",
    "LastGradient": "learnedopt.meta_optimizers.dual_averaging",
    "LeaderAndRadius": "learnedopt.objectives.leader_and_radius",
    "Linear": "learnedopt.core.weights",
    "PerName": "learnedopt.meta_optimizers.per_name",
    "ProjectedGradient": "learnedopt.objectives.convex",
    "DistilledData": "learnedopt.inner_objectives",
    "L2": "learnedopt.inner_objectives",
    "LearnedLoss": "learnedopt.inner_objectives",
    "Proximal": "learnedopt.inner_objectives",
    "WeightedExamples": "learnedopt.inner_objectives",
    "ARUBA": "learnedopt.meta_optimizers.aruba",
    "Averaged": "learnedopt.optimizers",
    "Entropic": "learnedopt.optimizers",
    "Euclidean": "learnedopt.optimizers",
    "Iterate": "learnedopt.optimizers",
    "MirrorDescent": "learnedopt.optimizers",
    "MomentMatching": "learnedopt.objectives.regret_bound",
    "RegretBound": "learnedopt.objectives.regret_bound",
    "estimators": "",
    "inner_objectives": "",
    "objectives": "",
    "optimizers": "",
    "tasks": "",
    # Their names in version 0.1, kept for one version:
    "MetaGradient": "learnedopt.core.estimator:GradientEstimator",
    "MetaGrad": "learnedopt.core.estimator:Estimate",
}

if TYPE_CHECKING:
    from learnedopt import estimators, inner_objectives, objectives, optimizers, tasks
    from learnedopt.cards import Card, card
    from learnedopt.checkpoint import load, load_checkpoint, packaged, save
    from learnedopt.core.carry import Carry, Rollout, Tape
    from learnedopt.core.estimator import Estimate, GradientEstimator
    from learnedopt.core.execution import Execution
    from learnedopt.core.horizon import HorizonWarning
    from learnedopt.core.inner import InnerLoop
    from learnedopt.core.inner_objective import InnerObjective, Penalty, TaskLoss
    from learnedopt.core.named_tensors import NamedTensors
    from learnedopt.core.objective import (
        FinalLoss,
        LogMeans,
        MeanLogLoss,
        MetaObjective,
        OfLosses,
        SumOfLosses,
        TaskMean,
    )
    from learnedopt.core.rule import Bound, Kernel, State, UpdateRule
    from learnedopt.core.task import Batch, TaskFamily, Tasks
    from learnedopt.core.tree import Params, Theta
    from learnedopt.core.weights import Constant, Linear
    from learnedopt.estimators.combined import Combined
    from learnedopt.estimators.evolution import EvolutionStrategies
    from learnedopt.estimators.forward import ForwardMode
    from learnedopt.estimators.hessian_free import HessianFree
    from learnedopt.estimators.implicit import ConvergenceWarning, Implicit
    from learnedopt.estimators.linear_solvers import (
        GMRES,
        ConjugateGradient,
        LinearSolver,
        Neumann,
        Solution,
    )
    from learnedopt.estimators.persistent import PersistentES
    from learnedopt.estimators.task_by_task import TaskByTask
    from learnedopt.estimators.unrolled import FirstOrder, Truncated, TruncatedBackprop, Unrolled
    from learnedopt.evaluation import evaluate
    from learnedopt.evaluation.diagnose import diagnose
    from learnedopt.execution.memory import predict_peak
    from learnedopt.execution.programs import CompileWarning
    from learnedopt.inner_objectives import L2, DistilledData, LearnedLoss, Proximal, WeightedExamples
    from learnedopt.meta_optimizers.aruba import ARUBA
    from learnedopt.meta_optimizers.dual_averaging import DualAveraging, LastGradient
    from learnedopt.meta_optimizers.follow_the_leader import FollowTheLeader
    from learnedopt.meta_optimizers.guess_and_grow import GuessAndGrow
    from learnedopt.meta_optimizers.per_name import PerName
    from learnedopt.objectives.convex import ProjectedGradient
    from learnedopt.objectives.feedback import HypergradientFeedback
    from learnedopt.objectives.leader_and_radius import LeaderAndRadius
    from learnedopt.objectives.matching import KLDivergence, Matching, SquaredDistance
    from learnedopt.objectives.regret_bound import MomentMatching, RegretBound
    from learnedopt.objectives.regularized_leader import FollowTheRegularizedLeader
    from learnedopt.objectives.solvers import SumOfLossesSolver
    from learnedopt.objectives.target_matching import BootstrappedTarget, TargetMatching
    from learnedopt.objectives.targets import (
        BestInHindsight,
        Bootstrap,
        Found,
        LastIterate,
        RegularizedSolution,
        Target,
    )
    from learnedopt.optim import LearnedOptimizer
    from learnedopt.optimizers import Averaged, Entropic, Euclidean, Iterate, MirrorDescent
    from learnedopt.plug_in.guard import AcceptIfBetter, PresentGradient
    from learnedopt.plug_in.guard_rail import Guard, GuardReport
    from learnedopt.plug_in.hyper import HyperOptimizer
    from learnedopt.plug_in.learner import RunDiverged
    from learnedopt.tasks.module_family import ModuleFamily
    from learnedopt.training.trainer import MetaTrainer, TrainingDiverged, Validation

    # Their names in version 0.1, kept for one version.
    MetaGradient: TypeAlias = GradientEstimator
    MetaGrad: TypeAlias = Estimate


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'learnedopt' has no attribute {name!r}")
    where, _, attribute = _LAZY[name].partition(":")
    module = importlib.import_module(where or f"learnedopt.{name}")
    value = getattr(module, attribute or name) if where and name != "evaluate" else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "ARUBA",
    "GMRES",
    "L2",
    "AcceptIfBetter",
    "Averaged",
    "Batch",
    "BestInHindsight",
    "Bootstrap",
    "BootstrappedTarget",
    "Bound",
    "Card",
    "Carry",
    "Combined",
    "CompileWarning",
    "ConjugateGradient",
    "Constant",
    "ConvergenceWarning",
    "DistilledData",
    "DualAveraging",
    "Entropic",
    "Estimate",
    "Euclidean",
    "EvolutionStrategies",
    "Execution",
    "FinalLoss",
    "FirstOrder",
    "FollowTheLeader",
    "FollowTheRegularizedLeader",
    "ForwardMode",
    "Found",
    "GradientEstimator",
    "Guard",
    "GuardReport",
    "GuessAndGrow",
    "HessianFree",
    "HorizonWarning",
    "HyperOptimizer",
    "HypergradientFeedback",
    "Implicit",
    "InnerLoop",
    "InnerObjective",
    "Iterate",
    "KLDivergence",
    "Kernel",
    "LastGradient",
    "LastIterate",
    "LeaderAndRadius",
    "LearnedLoss",
    "LearnedOptimizer",
    "Linear",
    "LinearSolver",
    "LogMeans",
    "Matching",
    "MeanLogLoss",
    "MetaObjective",
    "MetaTrainer",
    "MirrorDescent",
    "ModuleFamily",
    "MomentMatching",
    "NamedTensors",
    "Neumann",
    "OfLosses",
    "Params",
    "Penalty",
    "PerName",
    "PersistentES",
    "PresentGradient",
    "ProjectedGradient",
    "Proximal",
    "RegretBound",
    "RegularizedSolution",
    "Rollout",
    "RunDiverged",
    "Solution",
    "SquaredDistance",
    "State",
    "SumOfLosses",
    "SumOfLossesSolver",
    "Tape",
    "Target",
    "TargetMatching",
    "TaskByTask",
    "TaskFamily",
    "TaskLoss",
    "TaskMean",
    "Tasks",
    "Theta",
    "TrainingDiverged",
    "Truncated",
    "TruncatedBackprop",
    "Unrolled",
    "UpdateRule",
    "Validation",
    "WeightedExamples",
    "card",
    "diagnose",
    "estimators",
    "evaluate",
    "inner_objectives",
    "load",
    "load_checkpoint",
    "objectives",
    "optimizers",
    "packaged",
    "predict_peak",
    "save",
    "tasks",
]
