"""What the outer level wants, beyond losses: targets and their matchings, regret bounds. Imports the core."""

from __future__ import annotations

from learnedopt.objectives.registry import names, register

__all__ = ["names", "register"]
