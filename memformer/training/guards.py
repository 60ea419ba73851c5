"""Steps whose loss or gradient is not finite: aborted, or skipped and counted."""

from collections.abc import Mapping
from typing import Any

from memformer.training.config import RunError

__all__ = ["FiniteGuard", "NotFiniteError"]


class NotFiniteError(RunError):
    """A loss or gradient that is not finite: the state is not worth saving."""


class FiniteGuard:
    """Applies `train.on_nan` and `train.max_skips` to the reports of the train step.

    Args:
      options: the run's `train` section.

    Attributes:
      skips: skipped steps in a row at the last log; set it to resume a run.
    """

    def __init__(self, options: Mapping[str, Any]):
        self._options = options
        self.skips = 0

    def check(self, sums: Mapping[str, Any], checkpoint: str) -> None:
        """Raises NotFiniteError at the first step that is not finite, unless such steps are skipped.

        Args:
          sums: counts since the last log.
          checkpoint: a sentence on the last checkpoint.
        """
        if float(sums["bad_count"]) and self._options["on_nan"] == "abort":
            raise NotFiniteError(
                f"the loss or its gradient stopped being finite at step {int(sums['bad_step'])}. {checkpoint} Lower "
                "--config.optimizer.learning_rate, increase --config.optimizer.warmup_steps, or skip such steps with "
                "--config.train.on_nan=skip."
            )

    def count(self, sums: Mapping[str, Any], step: int, checkpoint: str) -> None:
        """Counts skipped steps at a log; raises NotFiniteError at `max_skips` in a row, or if the run took no step.

        Args:
          sums: counts since the last log.
          step: the step of this log.
          checkpoint: a sentence on the last checkpoint.
        """
        skipped, steps, first = (int(sums[name]) for name in ("bad_count", "steps", "bad_step"))
        if not skipped or skipped != step - first + 1:
            # the last step was taken, or it is not known how many of the skipped ones are at the end
            self.skips = 0
            return
        self.skips = skipped + (self.skips if skipped == steps else 0)
        took_none = step == self._options["steps"] == self.skips
        if self.skips >= self._options["max_skips"] or took_none:
            raise NotFiniteError(
                f"the last {self.skips} steps up to step {step} were all skipped: their loss or gradient is not finite "
                f"(train.max_skips is {self._options['max_skips']}). {checkpoint} Lower "
                "--config.optimizer.learning_rate or increase --config.optimizer.warmup_steps; with another config, "
                "give another --workdir."
            )
