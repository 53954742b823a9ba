"""How a meta-gradient is found, a family of estimators a file, and solvers. Imports the core and the execution."""

from __future__ import annotations

from learnedopt.estimators.registry import names, register

__all__ = ["names", "register"]
