"""The base class of every task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from memformer.data.source import SPLITS, Extra, RandomAccessSource

__all__ = ["Task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: the shape of an example, its score, and the source of examples.

    A subclass is a frozen dataclass of the task's options with a field `length` (the size that curricula and
    evaluations vary). It defines `vocab_size` or `features`, `num_classes`, `steps` and `source`.

    Attributes:
      name: key in `TASKS`.
      scores: metrics reported beside the loss, keys of `memformer.training.losses.SCORES`.
      loss: "classes": a target is a class, and the loss its cross entropy. "bits": a target is [num_classes] zeros and
        ones, and the loss the sum of their binary cross entropies.
      data_fields: options that stand in section `data` of a run's config instead of section `task`.
    """

    name: ClassVar[str]
    scores: ClassVar[tuple[str, ...]] = ("accuracy",)
    loss: ClassVar[str] = "classes"
    data_fields: ClassVar[tuple[str, ...]] = ()

    length: int

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Options whose value depends on what is installed, with the values chosen here; a run stores them."""
        return {}

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length."""
        return ()

    @property
    def vocab_size(self) -> int:
        """Number of input ids; 0 where inputs are float features."""
        return 0

    @property
    def features(self) -> int:
        """Width of float inputs [T, features]; 0 where inputs are ids."""
        return 0

    @property
    def num_classes(self) -> int:
        """Number of classes of a target, or of its bits."""
        raise NotImplementedError(f"{type(self).__name__} has no num_classes")

    @property
    def extras(self) -> Mapping[str, Extra]:
        """Further arrays of an example, passed to the model as keyword arguments."""
        return {}

    @property
    def steps(self) -> int:
        """T, the time steps of an example, start tokens and queries included."""
        return self.length

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing without the inputs; None where accuracy is not the score."""
        return 1 / self.num_classes if self.loss == "classes" else None

    def source(self, split: str, seed: int) -> RandomAccessSource:
        """Examples of one split, by number."""
        raise NotImplementedError(f"{type(self).__name__} has no source")

    def bytes_per_step(self, split: str) -> float:
        """Bytes of text per scored step of a split, by which bits per byte are counted."""
        return 1.0

    def write_files(self, folder: str) -> None:
        """Writes what a run's folder needs beside its config to use the model, such as a tokenizer."""

    def check_data(self, seed: int = 0) -> None:
        """Checks that every split has examples; training calls it before the first step.

        Raises:
          ValueError: data that are missing, damaged or too small, with the remedy.
        """
        for split in SPLITS:
            if len(self.source(split, seed)) == 0:
                raise ValueError(
                    f"the {split} split of task {self.name!r} has no example at task.length={self.length}; give it "
                    "more data, or another length"
                )

    def with_length(self, length: int) -> "Task":
        """The same task at another length.

        Raises:
          ValueError: the task does not support that length.
        """
        return dataclasses.replace(self, length=length)

    def up_to(self, length: int) -> "Task":
        """The same task at the lengths up to `length`, as a stage of a curriculum; exactly `length` where all examples
        of the task are equally long.

        Raises:
          ValueError: the task does not support that length.
        """
        return self.with_length(length)
