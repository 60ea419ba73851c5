"""SIGTERM, SIGHUP and Ctrl-C: the run stops after the current step, with a checkpoint."""

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

__all__ = ["StopSignal"]


class StopSignal:
    """Context manager that notes SIGTERM, SIGINT and SIGHUP (unless ignored, as under nohup).

    A second signal ends the process at once.

    With several processes a signal to any of them stops all after the same step.
    """

    def __init__(self):
        self._number: int | None = None
        self._several = jax.process_count() > 1
        # JAX handles SIGTERM of one process of several
        numbers = (signal.SIGINT, signal.SIGHUP) if self._several else (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}
        self._before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def __enter__(self) -> "StopSignal":
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self._number = number
        self.__exit__()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def name(self) -> str:
        """The signal as a message names it; "the scheduler" for one that another process received."""
        return signal.Signals(self._number).name if self._number else "the scheduler"

    def asked(self, step: int) -> bool:
        """Whether the run is to stop now; with several processes, the same answer in all of them."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._number is not None
