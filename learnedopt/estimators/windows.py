"""Windows of an episode."""

from __future__ import annotations

from learnedopt.core.counts import require_count


def require_windows(num_steps: int, horizon: int) -> None:
    """Raise ValueError unless windows of ``num_steps`` steps divide an episode of ``horizon``."""
    require_count("num_steps", num_steps, least=1)
    require_count("horizon", horizon, least=1)
    if horizon % num_steps:
        raise ValueError(
            f"horizon={horizon} is not a multiple of the window num_steps={num_steps}: the last window would be cut "
            f"short; use {horizon - horizon % num_steps or num_steps} or {horizon + num_steps - horizon % num_steps}"
        )
