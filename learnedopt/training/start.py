"""Before the first meta-step: are the loops right that will be differentiated?"""

from __future__ import annotations

from learnedopt.core.checks import NotFinite
from learnedopt.core.estimator import GradientEstimator, check_loop
from learnedopt.core.inner import InnerLoop
from learnedopt.core.parts import loop_of
from learnedopt.core.tree import Theta
from learnedopt.training.validation import task_generator

FEW = 32
"""Tasks among which two are looked for that do not fail at once, where the first two do."""


def vet_all(loop: InnerLoop, theta: Theta, estimator: GradientEstimator, num_tasks: int, seed: int) -> None:
    """Vet the loop of each family on tasks of the first episode, whatever the estimator itself asks of it.

    Raises:
        ValueError: see ``check_loop``.
    """
    for member in range(len(loop.family.families)):
        own = loop_of(loop, member)

        def look(count: int, own: InnerLoop = own) -> None:
            carry = own.start(own.family.sample(count, task_generator(seed, 0)))
            check_loop(own, theta, carry, second_derivatives=estimator.takes_second_derivatives)

        try:
            look(min(2, num_tasks))
        except NotFinite:  # two that fail say nothing of the others
            look(FEW)
