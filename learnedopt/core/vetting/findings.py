"""What vetting asks and finds, in words: the questions, why each matters, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = "Is the loss a finite scalar?"
PURE = "Does the loss leave alone what it is given and what it holds?"
SAME = "Does the loss give the same bits when it is called again, after other random seeds and another task?"
CLOSED = "Does the gradient reach nothing beside the parameters and theta?"
SWAPPED = "Do tasks keep their losses in another order, and alone?"
TOGETHER = "Do tasks that are run together give what each gives by itself?"
PENALTY = "Is the loss the family's plus the penalty, and the penalty's closed form its gradient?"
GRADIENT = "Is the gradient the derivative of the loss?"
SECOND = "Are the second derivatives those of the loss?"

_ADVICE = {
    NUMBER: "check the data, the initialisation and the reduction of the loss: mean() or sum()",
    PURE: (
        "one task would change another's loss, and recomputation would meet other values; return new tensors in place "
        "of writing, set layers with moving statistics or spectral norm to eval(), and clip embeddings in the update "
        "rule in place of max_norm"
    ),
    SAME: (
        "the meta-gradient would be that of a loss which nobody evaluates again, since recomputation draws anew; make "
        "dropout, noise and stochastic depth part of the batch, or switch them off with eval() or p=0"
    ),
    CLOSED: (
        "what it would learn is lost silently, or its graph grows from step to step; put it into theta, which an inner "
        "objective may read, or into the parameters, or detach() it"
    ),
    SWAPPED: (
        "how tasks are cut into chunks would change the result; let batch depend on (tasks, step, split) alone: draw "
        "from each task's own seed, and compute nothing across tasks"
    ),
    TOGETHER: "run tasks one by one with Execution(chunk_size=1)",
    PENALTY: "the inner steps would descend something else than the loss; correct it, or leave gradient() out",
    GRADIENT: (
        "the inner steps would not descend the loss, and the meta-gradient be that of neither. Known causes: "
        "torch.utils.checkpoint inside a module that functional_call gives its parameters, as it recomputes with the "
        "module's own; scale_grad_by_freq; detach() and straight-through estimators inside the loss; a custom backward"
    ),
    SECOND: (
        "the meta-gradient is made of them. Known causes: torch's own of weight_norm and scale_grad_by_freq; forward "
        "mode (mixed_mode=True) through some of torch.linalg; a custom backward that is not differentiable. Write the "
        "operation in simpler ones, or take no second derivatives, as Tape.FIRST_ORDER does"
    ),
}
_HINTS = {
    "_scaled_dot_product": "call attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "forward AD": "this operation has no forward mode; leave out mixed_mode=True",
    "Batching rule": "this operation takes no tasks together; use Execution(chunk_size=1)",
    "vmap": "this operation takes no tasks together; use Execution(chunk_size=1)",
    "parse": "sparse gradients are not supported; use Embedding(sparse=False)",
}
"""What messages of torch's contain -> what to do."""


@dataclass(frozen=True)
class Finding:
    """What one question found: ``answer`` is a plain sentence with numbers, ``error`` what a call raised, if it did;
    ``loss`` is which one was asked about."""

    question: str
    answer: str
    passed: bool
    error: Exception | None = None
    loss: str = "loss"

    @property
    def advice(self) -> str:
        """Why the answer makes meta-gradients wrong, and what to do; empty where the question is passed."""
        if self.passed:
            return ""
        hint = next((hint for part, hint in _HINTS.items() if self.error and part in str(self.error)), "")
        return hint or _ADVICE[self.question]


def report(findings: Sequence[Finding]) -> str:
    """Return in words what was tried and found."""
    lines: list[str] = []
    for finding in findings:
        of = "" if finding.loss == "loss" else f"{finding.loss}: "
        lines += [f"[{'passed' if finding.passed else 'FAILED'}] {of}{finding.question}", f"    {finding.answer}"]
        lines += [f"    {finding.advice}"] if not finding.passed else []
    failed = sum(not finding.passed for finding in findings)
    return "\n".join([*lines, f"{len(findings)} questions were asked; {failed or 'none'} failed."])


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
