"""Language modelling on token stores: one's own text, tokenized by `python -m memformer.data tokenize`."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from memformer.core.checks import check, check_at_least, check_choice, check_number
from memformer.data.source import SPLITS, RandomAccessSource
from memformer.data.token_store import MANIFEST, TokenSplit, TokenStore
from memformer.data.token_windows import MixedSource, PackedTokens, TokenWindows
from memformer.data.tokenizer import Tokenizer, save_tokenizer
from memformer.tasks.task import Task

__all__ = ["LanguageModeling"]

_LOG = logging.getLogger(__name__)

PACKING: dict[str, Callable[[TokenSplit, int, int], RandomAccessSource]] = {
    "windows": TokenWindows,
    "best_fit": PackedTokens,
}


@dataclasses.dataclass(frozen=True)
class LanguageModeling(Task):
    """Predict every token of a document from the tokens before it.

    Inputs start with the end of text, which also ends each document. Options other than the length stand in section
    `data` of a run's config.

    Attributes:
      length: time steps per example.
      path: a token store, or several, separated by commas, which are mixed by `weights`.
      weights: share of each store in the examples; () gives each the same.
      packing: "windows" cuts the stream of tokens into windows without padding; "best_fit" packs whole documents.
      vocab: number of ids; 0 reads it from the store, and a run records it. A larger one leaves ids unused, to divide
        by a number of devices; a dry run needs no store where it is set.
      fingerprint: of the tokenizer and the stores; "" reads it from the stores, and a run records it.

    Raises:
      ValueError: an option out of range; from all that reads data, a path that is no store, stores of different
        tokenizers, or a tokenizer other than the recorded one.

    Example:
      >>> import tempfile
      >>> from memformer.data import tokenize_corpus, wrap_source
      >>> folder = tempfile.mkdtemp()
      >>> store = tokenize_corpus(wrap_source([f"document {i}" for i in range(60)]), folder)
      >>> task = LanguageModeling(length=8, path=folder)
      >>> task.source("train", 0)[0]["inputs"]
      array([256, 100, 111,  99, 117, 109, 101, 110], dtype=int32)
    """

    name = "lm"
    scores = ("bits_per_byte", "perplexity")
    data_fields: ClassVar[tuple[str, ...]] = ("path", "weights", "packing", "vocab", "fingerprint")

    length: int = 1024
    path: str = ""
    weights: tuple[float, ...] = ()
    packing: str = "windows"
    vocab: int = 0
    fingerprint: str = ""

    def __post_init__(self):
        check_at_least("length", self.length, 1)
        check(isinstance(self.path, str), "path", "a string", self.path)
        check_choice("packing", self.packing, PACKING)
        check_at_least("vocab", self.vocab, 0)
        check(isinstance(self.fingerprint, str), "fingerprint", "a string", self.fingerprint)
        check(isinstance(self.weights, tuple | list), "weights", "a tuple of numbers", self.weights)
        for weight in self.weights:
            check_number("weights", weight, above=0)

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Vocabulary and fingerprint of the stores, unless they are recorded already."""
        # a recorded model is used where its data are not, and a dry run may know the vocabulary alone
        if self.vocab and (self.fingerprint or not self._paths_exist()):
            return {}
        stores = self._stores()
        prints = [stores[0].manifest["tokenizer"]["fingerprint"], *(store.fingerprint for store in stores)]
        return {"vocab": self.vocab_size, "fingerprint": "/".join(prints)}

    @property
    def vocab_size(self) -> int:
        """The ids of the tokenizer, and a start token where it has no end of text."""
        if self.vocab:
            return self.vocab
        return _ids(self._stores()[0])

    @property
    def num_classes(self) -> int:
        """The ids of the vocabulary."""
        return self.vocab_size

    @property
    def chance(self) -> None:
        """None: text is not scored by accuracy."""
        return None

    def source(self, split: str, seed: int) -> RandomAccessSource:
        """Examples of one split, in the order of the store; a mixture of several stores is shuffled by the seed."""
        check_choice("split", split, SPLITS)
        paths = [str(store.path) for store in self._stores()]
        sources = [_open_source(path, _written(path), split, self.packing, self.length) for path in paths]
        if len(sources) == 1:
            return sources[0]
        weights = self.weights or (1.0,) * len(sources)
        # held-out examples are the same ones in every evaluation
        return MixedSource(sources, weights, seed if split == "train" else None)

    def bytes_per_step(self, split: str) -> float:
        """Bytes of text per scored token of a split."""
        parts = [store.split(split) for store in self._stores()]
        shares = self.weights or (1.0,) * len(parts)
        ratios = [part.count("bytes") / max(part.count("scored"), 1) for part in parts]
        return sum(share * ratio for share, ratio in zip(shares, ratios, strict=True)) / sum(shares)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store."""
        return self._stores()[0].tokenizer()

    def write_files(self, folder: str) -> None:
        """Writes the tokenizer to <folder>/tokenizer, so that a run can generate text without the store."""
        save_tokenizer(self.tokenizer(), os.path.join(folder, "tokenizer"))

    def check_data(self, seed: int = 0) -> None:
        """Checks that all files of the stores are whole, and that no split is empty.

        Raises:
          ValueError: no store, a store that is damaged, or one without a split.
        """
        for store in self._stores():
            store.check()
            for split in SPLITS:
                part = store.split(split)
                if not part.count("scored"):
                    raise ValueError(
                        f"data.path: the token store {store.path} has no {split} documents, and a run scores all "
                        f"splits: write it with validation and test above 0 percent"
                    )
                if part.count("tokens") < self.length:
                    tokens = part.count("tokens")
                    _LOG.warning("%s: the %s split has %d tokens, less than task.length", store.path, split, tokens)

    def _paths(self) -> list[str]:
        # a path of one store may hold a comma
        whole = os.path.expanduser(self.path)
        return [whole] if os.path.isdir(whole) else [path.strip() for path in self.path.split(",")]

    def _paths_exist(self) -> bool:
        return bool(self.path) and all(os.path.isdir(os.path.expanduser(path)) for path in self._paths())

    def _stores(self) -> list[TokenStore]:
        if not self.path:
            raise ValueError(
                "data.path must name a token store; write one with: python -m memformer.data tokenize TEXT --out=STORE"
            )
        paths = self._paths()
        fits = not self.weights or len(self.weights) == len(paths)
        check(fits, "data.weights", f"one number per store, {len(paths)}", self.weights)
        stores = [_open_store(path) for path in paths]
        tokenizers = [store.manifest["tokenizer"]["fingerprint"] for store in stores]
        recorded = self.fingerprint.partition("/")[0] or tokenizers[0]
        for path, found in zip(paths, tokenizers, strict=True):
            if found != recorded:
                raise ValueError(
                    f"data.path: the tokens of {path} were made by another tokenizer ({found}) than those of "
                    f"{'the run' if self.fingerprint else paths[0]} ({recorded})"
                )
        if self.vocab:
            check_at_least("data.vocab", self.vocab, _ids(stores[0]))
        return stores


def _ids(store: TokenStore) -> int:
    return max(store.vocab_size, store.start + 1)


def _open_store(path: str) -> TokenStore:
    try:
        return _read_store(path, _written(path))
    except ValueError as error:
        raise ValueError(f"data.path: {error}") from error


def _written(path: str) -> int:
    """When a store was written: one that is written again in its place is another."""
    try:
        return os.stat(os.path.join(os.path.expanduser(path), MANIFEST)).st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=16)
def _read_store(path: str, written: int) -> TokenStore:
    return TokenStore(path)


@functools.lru_cache(maxsize=64)
def _open_source(path: str, written: int, split: str, packing: str, length: int) -> RandomAccessSource:
    store = _read_store(path, written)
    return PACKING[packing](store.split(split), length, store.start)
