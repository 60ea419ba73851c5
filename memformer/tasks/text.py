"""Byte-level language modelling on text files, by default the sources of the Python standard library."""

import dataclasses
import functools
import logging
import os

import numpy as np

from memformer.core.checks import check, check_at_least, check_choice
from memformer.data.documents import Document, read_documents, split_documents, standard_library
from memformer.data.packing import PackedDocuments
from memformer.data.source import SPLITS
from memformer.data.tokenizer import ByteTokenizer, save_tokenizer
from memformer.tasks.task import Task

__all__ = ["Text"]

_LOG = logging.getLogger(__name__)

# Id before the first byte of a file; ids 0...255 are the bytes.
START = 256


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Predict every byte of a text file from the bytes before it.

    The files of a split are packed into windows of `length` steps (`memformer.data.PackedDocuments`): a file is a
    segment, and each byte is scored exactly once. About 90% of the text is train, 5% validation and 5% test: whole
    files by the hash of their content or, for a single file or a few, the parts of each file
    (`memformer.data.split_documents`).

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

    def documents(self, split: str) -> list[Document]:
        """The files of a split, or their parts, in the order of their paths."""
        check_choice("split", split, SPLITS)
        return split_documents(read_documents(self._root(), self.suffix))[split]

    def source(self, split: str, seed: int) -> PackedDocuments:
        """Windows of one split; the seed has no effect."""
        check_choice("split", split, SPLITS)
        return PackedDocuments(*_load(self._root(), self.suffix)[split], self.length, START)

    def write_files(self, folder: str) -> None:
        """Writes the tokenizer to <folder>/tokenizer, so that a run can generate text."""
        save_tokenizer(ByteTokenizer(), os.path.join(folder, "tokenizer"))

    def check_data(self, seed: int = 0) -> None:
        """Checks that no split is empty and that the train split fills a window.

        Raises:
          ValueError: a folder that cannot be read, or too little text.
        """
        sizes = {split: len(tokens) for split, (tokens, _) in _load(self._root(), self.suffix).items()}
        if sizes["train"] < self.length or not all(sizes.values()):
            found = ", ".join(f"{size} bytes {split}" for split, size in sizes.items())
            raise ValueError(
                f"task.folder {self._root()!r} has too little text in files that end in {self.suffix!r}: {found}. The "
                f"train split (90% of the text) must have at least task.length={self.length} bytes, validation and "
                "test (5% each) at least one: add text, or lower task.length"
            )
        for split, size in sizes.items():
            if size < self.length:
                _LOG.warning("task text: the %s split has %d bytes, less than a window of %d", split, size, self.length)

    def _root(self) -> str:
        return os.path.expanduser(self.folder) or standard_library()


# The standard library has about 15 MB.
@functools.lru_cache(maxsize=2)
def _load(root: str, suffix: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Bytes of all files of each split, and the size of each file."""
    loaded = {}
    for split, documents in split_documents(read_documents(root, suffix)).items():
        texts = [document.text for document in documents]
        loaded[split] = np.frombuffer(b"".join(texts), np.uint8), [len(text) for text in texts]
    return loaded
