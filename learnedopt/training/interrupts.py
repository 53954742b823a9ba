"""Ctrl-C, SIGTERM and SIGHUP, which end a training between two meta-steps and not inside one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_by_signal(exit_code: int) -> None:
    """End this process by the signal that its exit code, 128 and the number, stands for; else do nothing.

    For those who start a process and take every exit code but 0 for a failure, an end by a signal not: ``wandb agent``
    shuts down after five trials in a row that it has stopped itself.
    """
    number = exit_code - 128
    if number in STOPPING:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class Interrupts:
    """Notes Ctrl-C, SIGTERM and SIGHUP in ``number`` instead of tearing a meta-step; a second Ctrl-C is raised at once.

    Others that follow change nothing: a terminal that closes, and its shell, both send SIGHUP; service managers send
    SIGTERM and SIGHUP. A SIGHUP that the process was told to ignore, as ``nohup`` does, stays ignored.

    Only the main thread may do so: elsewhere nothing changes.

    Args:
        patient: wait even after a second Ctrl-C. Of several processes each gets a terminal's Ctrl-C twice: from the
            terminal and from what launched them.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.number: int | None = None
        self._patient = patient
        self._waiting = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
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
        again = self.number is not None
        if again and (self._patient or number != signal.SIGINT):
            return
        self.number = int(number)
        if again or not self._waiting:
            self.deliver()
