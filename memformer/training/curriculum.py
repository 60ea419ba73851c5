"""Length curriculum: longer sequences once the model solves shorter ones."""

from collections.abc import Mapping
from typing import Any

from memformer.tasks import Task

__all__ = ["Curriculum"]


class Curriculum:
    """Starts at length `start`; multiplies it by `factor` when the accuracy since the last log reaches `accuracy`.

    A task whose lengths vary is trained on all lengths up to that (`Task.up_to`).

    Source: DeltaFormer (NeurIPS 2025): swaps from length 32 to 256, doubled at 0.99.

    Args:
      task: the run's task; without a curriculum its own length is used.
      options: the run's `train.curriculum`: enabled, start, stop, factor, accuracy.

    Attributes:
      length: the current length; set it to resume a run.

    Raises:
      ValueError: the task cannot have the start or the stop length.

    Example:
      >>> from memformer.tasks import make_task
      >>> options = {"enabled": True, "start": 32, "stop": 128, "factor": 2, "accuracy": 0.99}
      >>> curriculum = Curriculum(make_task({"name": "swap"}), options)
      >>> curriculum.advance(0.5), curriculum.advance(0.995), curriculum.length, curriculum.done
      (False, True, 64, False)
    """

    def __init__(self, task: Task, options: Mapping[str, Any]):
        self._task, self._options = task, options
        self.length = options["start"] if options["enabled"] else task.length
        if options["enabled"]:
            task.up_to(options["start"])
            task.up_to(options["stop"])

    @property
    def task(self) -> Task:
        """The task at the current length."""
        return self._task.up_to(self.length) if self._options["enabled"] else self._task

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths from the current to the final one."""
        lengths = [self.length]
        while self._options["enabled"] and lengths[-1] < self._options["stop"]:
            lengths.append(min(lengths[-1] * self._options["factor"], self._options["stop"]))
        return tuple(lengths)

    @property
    def done(self) -> bool:
        """Whether this is the final length."""
        return not self._options["enabled"] or self.length >= self._options["stop"]

    def advance(self, accuracy: float) -> bool:
        """Moves to the next length if `accuracy` allows it; returns whether it did."""
        if self.done or not accuracy >= self._options["accuracy"]:
            return False
        self.length = min(self.length * self._options["factor"], self._options["stop"])
        return True
