"""Learned optimizers: one differentiable inner-loop engine with unrolled, truncated and implicit meta-gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from learnedopt.compiled import CompileWarning
from learnedopt.estimator import MetaGrad, MetaGradient
from learnedopt.execution import Execution
from learnedopt.hessian_free import HessianFree
from learnedopt.implicit import ConvergenceWarning, Implicit
from learnedopt.inner import Carry, InnerLoop, Rollout, Tape
from learnedopt.linear_solvers import (
    GMRES,
    ConjugateGradient,
    LinearSolver,
    Neumann,
    Solution,
)
from learnedopt.objective import (
    BootstrappedTarget,
    FinalLoss,
    KLDivergence,
    MeanLogLoss,
    MetaObjective,
    SquaredDistance,
    SumOfLosses,
)
from learnedopt.rule import State, UpdateRule
from learnedopt.task import Batch, ModuleFamily, TaskFamily, Tasks
from learnedopt.tree import Params, Theta
from learnedopt.unrolled import FirstOrder, Truncated, TruncatedBackprop, Unrolled

__version__ = "0.1.0"

# The edge is imported at first use: it brings files, plots and the registries along, which the engine does not need.
_LAZY = {
    "LearnedOptimizer": "learnedopt.optim",
    "MetaTrainer": "learnedopt.trainer",
    "Validation": "learnedopt.trainer",
    "load": "learnedopt.checkpoint",
    "predict_peak": "learnedopt.memory",
    "save": "learnedopt.checkpoint",
    "evaluate": "learnedopt.evaluate",
    "optimizers": "",
    "tasks": "",
}

if TYPE_CHECKING:
    from learnedopt import evaluate, optimizers, tasks
    from learnedopt.checkpoint import load, save
    from learnedopt.memory import predict_peak
    from learnedopt.optim import LearnedOptimizer
    from learnedopt.trainer import MetaTrainer, Validation


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'learnedopt' has no attribute {name!r}")
    where = _LAZY[name]
    module = importlib.import_module(where or f"learnedopt.{name}")
    value = getattr(module, name) if where and name != "evaluate" else module
    globals()[name] = value
    return value


__all__ = [
    "GMRES",
    "Batch",
    "BootstrappedTarget",
    "Carry",
    "CompileWarning",
    "ConjugateGradient",
    "ConvergenceWarning",
    "Execution",
    "FinalLoss",
    "FirstOrder",
    "HessianFree",
    "Implicit",
    "InnerLoop",
    "KLDivergence",
    "LearnedOptimizer",
    "LinearSolver",
    "MeanLogLoss",
    "MetaGrad",
    "MetaGradient",
    "MetaObjective",
    "MetaTrainer",
    "ModuleFamily",
    "Neumann",
    "Params",
    "Rollout",
    "Solution",
    "SquaredDistance",
    "State",
    "SumOfLosses",
    "Tape",
    "TaskFamily",
    "Tasks",
    "Theta",
    "Truncated",
    "TruncatedBackprop",
    "Unrolled",
    "UpdateRule",
    "Validation",
    "evaluate",
    "load",
    "optimizers",
    "predict_peak",
    "save",
    "tasks",
]
