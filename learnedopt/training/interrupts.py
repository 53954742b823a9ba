"""Ctrl-C and SIGTERM, which end a training between two meta-steps and not inside one."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupts:
    """Notes Ctrl-C and SIGTERM in ``number`` instead of tearing a meta-step; a second one is raised at once.

    Only the main thread may do so: elsewhere nothing changes.

    Args:
        patient: wait even after a second one. Of several processes each gets a terminal's Ctrl-C twice: from the
            terminal and from what launched them.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.number: int | None = None
        self._patient = patient
        self._waiting = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed by Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def deliver(self) -> None:
        """Raise what has been noted, and whatever comes from now on at once."""
        self._waiting = False
        if self.number is not None:
            raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(128 + self.number)

    def _note(self, number: int, frame: Any) -> None:
        at_once = not self._waiting or (self.number is not None and not self._patient)
        self.number = int(number)
        if at_once:
            self.deliver()
