"""The questions in order, and what asks them: ``examine`` all, ``vet`` until one fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta
from learnedopt.core.vetting import differences, findings, purity
from learnedopt.core.vetting.captured import random_states_restored
from learnedopt.core.vetting.cases import Case, Loss, case_of, losses_of
from learnedopt.core.vetting.double import promoted
from learnedopt.core.vetting.findings import Finding, first_line

if TYPE_CHECKING:
    from learnedopt.core.carry import Carry
    from learnedopt.core.inner import InnerLoop


def examine(loop: InnerLoop, theta: Theta, carry: Carry, *, second_derivatives: bool) -> list[Finding]:
    """Ask every question of a loop's losses; what a loss raises is a finding as well.

    Args:
        loop: whose inner objective and family are asked.
        theta: the loop's.
        carry: begun; of more than two tasks the first two are taken.
        second_derivatives: whether estimates will take them: under a full tape, or in an implicit gradient.
    """
    with torch.inference_mode(False), torch.enable_grad(), random_states_restored():
        return list(_questions(loop, theta, carry, second_derivatives))


def vet(loop: InnerLoop, theta: Theta, carry: Carry, *, second_derivatives: bool) -> None:
    """Ask the questions of ``examine`` until one fails.

    Raises:
        ValueError: what was found, why it makes meta-gradients wrong, and what to do. What a first, plain call of the
            loss raises is raised as it is.
    """
    with torch.inference_mode(False), torch.enable_grad(), random_states_restored():
        for finding in _questions(loop, theta, carry, second_derivatives):
            if finding.passed:
                continue
            if finding.question == findings.NUMBER and finding.error is not None:
                raise finding.error
            advice = finding.advice[:1].upper() + finding.advice[1:]
            of = "" if finding.loss == "loss" else f", {finding.loss}"
            raise ValueError(
                f"{type(loop.family).__name__}{of}: {finding.question} No: {finding.answer}. {advice}. "
                "(Execution(vet=False) leaves the check out.)"
            ) from finding.error


def _questions(loop: InnerLoop, theta: Theta, carry: Carry, second_derivatives: bool) -> Iterator[Finding]:
    case = case_of(loop, theta, carry)
    for name, loss in losses_of(loop).items():
        descended = name != "outer loss"
        for finding in _of_one_loss(case, loss, second_derivatives and descended, descended=descended):
            yield replace(finding, loss=name)
            if finding.question == findings.NUMBER and not finding.passed:
                return  # nothing more can be asked


def _of_one_loss(case: Case, loss: Loss, second_derivatives: bool, *, descended: bool) -> Iterator[Finding]:
    yield from purity.function(case, loss)
    yield purity.swapped(case, loss)
    if descended and case.together:
        yield purity.together(case, loss)
    if descended and case.loop.inner_objective.penalty is not None:
        yield _penalty(case)
    yield from _derivatives(case, loss, second_derivatives)


def _derivatives(case: Case, loss: Loss, second_derivatives: bool) -> Iterator[Finding]:
    params, batch = case.of_task(0)
    theta = {f"theta[{k!r}]": k for k in case.theta} if not case.loop.inner_objective.is_task_loss else {}
    if any(x.is_complex() for x in params.values()):
        yield Finding(findings.GRADIENT, "not asked: complex parameters have no direction to try", True)
        return

    def of_tensors(tensors: Params) -> Tensor:
        own = {k: x for k, x in tensors.items() if k in params}
        return loss({**case.theta, **{k: tensors[name] for name, k in theta.items()}}, own, batch)

    tensors = {**params, **{name: case.theta[k] for name, k in theta.items()}}
    point = differences.generic_point(of_tensors, tensors, create_graph=second_derivatives)
    if isinstance(point, Exception):
        # What is not finite is for the estimate to say, with its step; what raises would raise there as well.
        unclear = isinstance(point, FloatingPointError)
        answer = f"{'it could not be told: ' if unclear else ''}{first_line(point)}"
        yield Finding(findings.GRADIENT, answer, unclear, point)
        return
    verdict = differences.judge_gradient(point)
    yield Finding(findings.GRADIENT, verdict.reason, verdict.right is not False)
    if second_derivatives:
        verdict = differences.judge_second_derivatives(point, mixed_plans=case.loop.mixed_plans(), moving=list(params))
        yield Finding(findings.SECOND, verdict.reason, verdict.right is not False, verdict.error)


def _penalty(case: Case) -> Finding:
    """Compare the closed form with automatic differentiation, and the loss with its parts, in float64."""
    objective, family = case.loop.inner_objective, case.loop.family
    penalty = objective.penalty
    assert penalty is not None
    params, batch = case.of_task(0)

    def parts(theta: Theta, params: Params) -> Tensor:
        closed = penalty.gradient(theta, params) if penalty.has_gradient else None
        term = penalty.value(theta, params)
        slopes = torch.autograd.grad(term, list(params.values()), materialize_grads=True)
        gaps = [] if closed is None else [tree.length(closed[k] - g) for k, g in zip(params, slopes, strict=True)]
        sizes = [tree.length(g) for g in slopes]
        whole, own = objective.loss(theta, family, params, batch), family.loss(params, batch)
        value = (whole - own - term).abs() / (whole.abs() + own.abs() + term.abs()).clamp(min=1e-300)
        slope = sum(gaps, torch.zeros_like(value)) / sum(sizes, torch.zeros_like(value)).clamp(min=1e-300)
        return torch.maximum(value, slope)

    try:
        at = {k: p.detach().double().mul(1.01).add(0.01).requires_grad_() for k, p in params.items()}
        gap = promoted(parts, case.theta, at).item()
    except Exception as error:  # noqa: BLE001 - a finding
        return Finding(findings.PENALTY, first_line(error), False, error)
    return Finding(findings.PENALTY, f"they differ by {gap:.1g} of their size", gap <= 1e-4)
