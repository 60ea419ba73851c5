"""Byte-level language modelling on text files, by default the sources of the Python standard library."""

import dataclasses
import functools

import numpy as np

from memformer.core.checks import check, check_at_least, check_choice
from memformer.data.documents import read_documents, split_documents, standard_library
from memformer.data.packing import PackedDocuments
from memformer.data.source import SPLITS
from memformer.tasks.task import Task

__all__ = ["Text"]

# Id before the first byte of a file; ids 0...255 are the bytes.
START = 256


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Predict every byte of a text file from the bytes before it.

    The files of a split are packed into windows of `length` steps (`memformer.data.PackedDocuments`): a file is a
    segment, and each byte is scored exactly once. Files are assigned to splits by the hash of their relative path:
    about 90% train, 5% validation and 5% test.

    Attributes:
      length: time steps per window.
      folder: root of the text files; "" is the standard library.
      suffix: ending of the file names.

    Raises:
      ValueError: an option out of range; from `source`, a folder that does not exist, cannot be read, or has no such
        file.

    Example:
      >>> task = Text(length=128)
      >>> task.source("test", 0)[0]["inputs"].shape, task.scores
      ((128,), ('bits_per_byte',))
    """

    name = "text"
    scores = ("bits_per_byte",)

    length: int = 512
    folder: str = ""
    suffix: str = ".py"

    def __post_init__(self):
        check_at_least("length", self.length, 1)
        for name in ("folder", "suffix"):
            check(isinstance(getattr(self, name), str), name, "a string", getattr(self, name))

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length."""
        return (256, 512, 1024, 2048)

    @property
    def vocab_size(self) -> int:
        """The bytes and the start token."""
        return START + 1

    @property
    def num_classes(self) -> int:
        """The bytes."""
        return START

    @property
    def chance(self) -> None:
        """None: text is not scored by accuracy."""
        return None

    def files(self, split: str) -> list[str]:
        """Paths of the files of a split, relative to the folder, in order."""
        check_choice("split", split, SPLITS)
        return split_documents(self._root(), self.suffix, split)

    def source(self, split: str, seed: int) -> PackedDocuments:
        """Windows of one split; the seed has no effect."""
        check_choice("split", split, SPLITS)
        return PackedDocuments(*_load(self._root(), self.suffix, split), self.length, START)

    def _root(self) -> str:
        return self.folder or standard_library()


# One split of the standard library is 15 MB at most.
@functools.lru_cache(maxsize=6)
def _load(root: str, suffix: str, split: str) -> tuple[np.ndarray, list[int]]:
    """Bytes of all files of a split, and the size of each."""
    texts = read_documents(root, suffix, split)
    return np.frombuffer(b"".join(texts), np.uint8), [len(text) for text in texts]
