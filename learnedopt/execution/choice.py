"""Which adjoint serves a loop, an unroll and an execution."""

from __future__ import annotations

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
from learnedopt.execution import coordinatewise
from learnedopt.execution.adjoint import Adjoint, Eager, Unroll
from learnedopt.execution.allocator import keep_freed_memory
from learnedopt.execution.compiled import Compiled
from learnedopt.execution.coordinatewise import Coordinatewise


def adjoint_of(loop: InnerLoop, theta: Theta, carry: Carry, unroll: Unroll) -> Adjoint:
    """Return the coordinatewise adjoint where it serves, which is exact, faster and leaner; else what is asked for."""
    keep_freed_memory()
    params = tree.squeeze(tree.narrow(carry.params, 0, 1))
    if coordinatewise.reason_against(loop, theta, params, unroll.tape) is None:
        return Coordinatewise(unroll.num_steps)
    return Compiled(Eager(unroll)) if loop.execution.compile else Eager(unroll)
