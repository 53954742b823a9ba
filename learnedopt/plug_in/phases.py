"""What goes on under a guard: phases, what becomes of the parameters, and why control went over."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple


class Phase(IntEnum):
    """What is going on."""

    FIRST_TRY = 0
    """The learned rule's leg of the first trial."""
    TRIAL = 1
    """The fallback's legs of a trial."""
    LEARNED = 2
    FALLBACK = 3
    RETURN_TRY = 4
    """The learned rule's leg of a trial, with the fallback in control."""


class Action(Enum):
    """What becomes of the parameters after a step."""

    NONE = "nothing"
    SAVE = "they are put into the snapshot"
    SWAP = "they and the snapshot change places"
    RESTORE = "they are what the snapshot holds"
    FORGET = "the snapshot is needed no more"


class Reason(IntEnum):
    """Why control went over."""

    WORSE = 0
    CLIMBS = 1
    EXPLODED = 2
    NOT_FINITE = 3
    HORIZON = 4
    BETTER = 5
    WAITED = 6


WHY: dict[Reason, str] = {
    Reason.WORSE: "the fallback does at least as well from the same point",
    Reason.CLIMBS: "the loss climbs",
    Reason.EXPLODED: "parameters or gradients explode",
    Reason.NOT_FINITE: "parameters, gradients or losses are not finite",
    Reason.HORIZON: "the run is past the num_steps that the rule was told",
    Reason.BETTER: "the learned rule does better from the same point",
    Reason.WAITED: "the learned rule gets another try, without a loss to judge it by",
}


class HandOver(NamedTuple):
    """One change of control: the steps before it, whether the learned rule got it, and why."""

    step: int
    to_learned: bool
    reason: Reason
