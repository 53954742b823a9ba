"""What a ``HyperOptimizer`` may be asked for: its options and their combinations, as errors before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.containers import is_tuple
from learnedopt.core.estimator import check_objective, check_paths
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import FinalLoss, MeanLogLoss, MetaObjective
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.unrolled import has_learned_start
from learnedopt.objectives.feedback import HypergradientFeedback
from learnedopt.objectives.matching import KLDivergence
from learnedopt.objectives.target_matching import TargetMatching
from learnedopt.objectives.targets import BestInHindsight, RegularizedSolution
from learnedopt.plug_in.guard import PresentGradient
from learnedopt.plug_in.members import name_of, unknown_names
from learnedopt.plug_in.windows import NO_OUTPUTS, RecordedRun, stand_in


def resolved(rule: Any, seed: int) -> tuple[UpdateRule, Theta]:
    """Return the rule and the theta that it starts from."""
    read = rule[0] if is_tuple(rule) and rule else rule
    if isinstance(read, UpdateRule) and read.reads_horizon:
        raise ValueError(
            f"{name_of(read)} reads how far a run is, which windows of a run that goes on do not say; take a rule that "
            "does not, or LearnedOptimizer(..., num_steps=T) with a theta that is learned already"
        )
    if isinstance(rule, UpdateRule):
        return rule, rule.init_theta(torch.Generator().manual_seed(seed))
    if is_tuple(rule) and len(rule) == 2 and isinstance(rule[0], UpdateRule):
        return rule[0], rule[1]
    raise TypeError(
        f"rule={rule!r} is neither an update rule nor (rule, theta); pass one such as learnedopt.optimizers.Adam(), or "
        "learnedopt.load(name), which returns a packaged rule and its theta"
    )


def num_recorded(num_steps: int, objective: MetaObjective) -> int:
    """Return how many gradients of the run a window's objective reads, that after the last update included."""
    ahead = objective.target.rule_steps if isinstance(objective, TargetMatching) else 0
    return num_steps + ahead + 1


def require_settings(
    num_steps: int, objective: Any, guard: Any, hint: Any, tape: Tape, foreign: dict[str, Any]
) -> None:
    """Raise TypeError or ValueError for options that contradict each other or that a run's gradients cannot serve."""
    if foreign:
        raise TypeError(
            f"HyperOptimizer has no option {', '.join(map(repr, foreign))}: what a step does is the rule's, and learned"
        )
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(f"objective={objective!r} cannot be called on rollouts; pass an instance, such as FinalLoss()")
    if tape is not Tape.FIRST_ORDER:
        raise ValueError(
            f"tape={tape!r}: a run leaves gradients of its losses, with or without a closure, and the full tape has to "
            "differentiate them once more; use Tape.FIRST_ORDER, or MetaTrainer with Truncated(num_steps, "
            "tape=Tape.FULL) on a TaskFamily, whose loss is a function that can be differentiated twice"
        )
    if isinstance(objective, TargetMatching) and isinstance(objective.target, BestInHindsight | RegularizedSolution):
        raise ValueError(
            f"{objective.target!r} solves for parameters at which the run has never been, where its losses are not "
            "known; use a Bootstrap or LastIterate of the rule's own further steps, or MetaTrainer on a TaskFamily"
        )
    one_step = num_steps == 1 and isinstance(objective, FinalLoss | HypergradientFeedback)
    wants = "windows of one step: num_steps=1 and FinalLoss() or HypergradientFeedback()"
    if guard is not None and not callable(guard):
        raise TypeError(f"guard={guard!r} cannot be called on two losses; pass AcceptIfBetter(), or None")
    if guard is not None and not one_step:
        raise ValueError(f"a guard may take any step back, which is the end of its window; it takes {wants}")
    if hint is not None and not isinstance(hint, PresentGradient):
        raise TypeError(f"hint={hint!r} is no PresentGradient; other hints are the meta-optimizer's own alone")
    if hint is not None and not one_step:
        raise ValueError(
            f"PresentGradient is exact for {wants}; leave it out, and let the meta-optimizer guess (LastGradient())"
        )


def require_learnable(
    loop: InnerLoop, theta: Theta, params: Params, state: State, num_steps: int, objective: MetaObjective
) -> None:
    """Raise ValueError where a meta-parameter has no way to be learned, or the objective cannot be read of a run."""
    loop.require_theta(theta)
    fresh = Carry((), tree.unsqueeze(params))
    if has_learned_start(loop, theta, fresh):
        raise ValueError(
            f"{name_of(loop.rule)} has a start of its own, and one run starts once: a start cannot be learned from its "
            "windows; use the rule without it, such as LearnedRates in place of meta-sgd, or MetaTrainer"
        )
    at_start = _through_start(loop, theta, fresh, num_steps)
    if at_start:
        raise ValueError(
            f"the meta-parameters {at_start} enter {name_of(loop.rule)} through its first state alone, and one run "
            "starts once: in every window but the first their gradient is zero; fix them, or use MetaTrainer"
        )
    begun = fresh._replace(state=tree.unsqueeze(state), tasks=stand_in(params, num_recorded(num_steps, objective)))
    loop = loop.on(RecordedRun(_stand_in_outputs))
    check_objective(loop, theta, objective, begun, num_steps)


def _through_start(loop: InnerLoop, theta: Theta, fresh: Carry, num_steps: int) -> list[str]:
    """Return the meta-parameters that windows after the first do not reach; ValueError where none reaches them."""
    with torch.no_grad():
        _, state = loop.init_task(theta, tree.squeeze(fresh.params))
    try:
        return check_paths(loop, theta, fresh._replace(state=tree.unsqueeze(state)), num_steps, Tape.FIRST_ORDER)
    except KeyError as error:
        raise ValueError(unknown_names(loop.rule, tree.squeeze(fresh.params), error)) from error


def require_hint(hint: PresentGradient | None, meta_optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where a meta-optimizer would take the factor of an average out of its gradients alone."""
    if hint is not None and any(group.get("averaged") for group in meta_optimizer.param_groups):
        raise ValueError(
            "PresentGradient is the gradient that the next window would have, and DualAveraging(averaged=True) takes "
            "hints to be free of the average's factor; pass averaged=False with a rule that is not averaged, or "
            "LastGradient() with one that is"
        )


def require_arguments(objective: Any, guard: Any, closure: Any, loss: Any, outputs: Any) -> None:
    """Raise ValueError where a step is not told what the guard or the objective needs."""
    if isinstance(objective, MeanLogLoss) and closure is None and loss is None:
        raise ValueError("MeanLogLoss() divides by the losses, which gradients do not hold: pass step(loss=loss)")
    if guard is not None and closure is None:
        raise ValueError(
            f"the guard {guard!r} compares the losses before and after a step on one batch, and gradients do not hold "
            "the second: pass step(closure), which clears the gradients, computes the loss, calls backward() and "
            "returns it"
        )
    matches_outputs = isinstance(objective, TargetMatching) and isinstance(objective.matching, KLDivergence)
    if outputs is None and matches_outputs:
        raise ValueError(NO_OUTPUTS)


def _stand_in_outputs(params: Params) -> Tensor:
    return next(iter(params.values())).sum() * torch.ones(1, 2)
