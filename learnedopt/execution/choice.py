"""Which adjoint serves a loop, an unroll and an execution."""

from __future__ import annotations

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
from learnedopt.execution import compiled_step, coordinatewise
from learnedopt.execution.adjoint import Adjoint, Eager, Unroll
from learnedopt.execution.allocator import keep_freed_memory
from learnedopt.execution.compiled import Compiled
from learnedopt.execution.coordinatewise import Coordinatewise

LONGEST_AS_ONE = 20  # inner steps: the time that one program of all takes to compile grows with them


def goes_by_steps(execution: Execution, num_steps: int, segment: int | None) -> bool:
    """Whether one inner step is compiled in place of them all."""
    if execution.compile is True:
        return segment is not None or num_steps > LONGEST_AS_ONE
    return execution.compile == "step"


def adjoint_of(loop: InnerLoop, theta: Theta, carry: Carry, unroll: Unroll) -> Adjoint:
    """Return the coordinatewise adjoint where it serves, which is exact, faster and leaner; else what is asked for."""
    keep_freed_memory()
    params = tree.squeeze(tree.narrow(carry.params, 0, 1))
    if coordinatewise.reason_against(loop, theta, params, unroll.tape) is None:
        return Coordinatewise(unroll.num_steps)
    if not loop.execution.compile:
        return Eager(unroll)
    by_steps = goes_by_steps(loop.execution, unroll.num_steps, unroll.segment)
    return Eager(unroll, compiled_step.run) if by_steps else Compiled(Eager(unroll))
