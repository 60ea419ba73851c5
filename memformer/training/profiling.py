"""Profiler trace of a window of steps."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from memformer.training.files import disk_errors, is_url
from memformer.training.remote import copy_folder

__all__ = ["Profiler"]


class Profiler:
    """Traces steps first to last of a run to <folder>/profile.

    Args:
      folder: the run's folder.
      window: (first, last), counted from 1; (0, 0) for none.
    """

    def __init__(self, folder: str, window: Sequence[int]):
        self._folder = os.path.join(folder, "profile")
        self._first, self._last = window
        self._trace: str | None = None

    def before(self, step: int) -> None:
        """Starts the trace if `step` is the first of the window."""
        if step == self._first:
            # the profiler writes to local disks only
            self._trace = tempfile.mkdtemp() if is_url(self._folder) else self._folder
            jax.profiler.start_trace(self._trace)

    def after(self, step: int, state: Any) -> str | None:
        """Ends the trace if `step` is the last of the window; returns a line for the log."""
        return self.stop(step, state) if step == self._last else None

    def stop(self, step: int, state: Any) -> str | None:
        """Ends a running trace, also one whose last step the run does not reach; returns a line for the log.

        Raises:
          RunError: the disk is full or gone.
        """
        if self._trace is None:
            return None
        trace, self._trace = self._trace, None
        # after an error in a step its donated state is gone
        with contextlib.suppress(RuntimeError):
            jax.block_until_ready(state)
        with disk_errors(self._folder):
            try:
                jax.profiler.stop_trace()
            except RuntimeError as error:
                # the profiler's error holds the words of the system
                raise OSError(str(error)) from error
            if trace != self._folder:
                copy_folder(epath.Path(trace), epath.Path(self._folder))
                shutil.rmtree(trace)
        return f"profile of steps {self._first}..{step} in {self._folder}"
