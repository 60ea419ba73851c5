"""Tokenizing a corpus into a token store, in several processes, and resuming where it was stopped.

The documents are read in their order and gathered into units of `shard_bytes` of text. Each unit becomes one shard of
each split and a record in progress/; a unit with a record is finished, so that a job that was killed continues behind
it. The store is the same bytes for any number of processes and interruptions.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from memformer.core.checks import check, check_at_least, check_choice, check_size
from memformer.data.corpus import Corpus
from memformer.data.shards import PART, PROGRESS, Unit, Workers, token_dtype, write_json
from memformer.data.source import SPLITS
from memformer.data.splits import split_by_hash, split_items
from memformer.data.text_files import Cursor, Problem, TextRecord
from memformer.data.token_store import FORMAT, MANIFEST, TokenStore
from memformer.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

__all__ = ["describe_problem", "tokenize_corpus", "training_texts"]

SETTINGS = "settings.json"
# Problems that are shown in full; the summary counts all.
SHOWN_PROBLEMS = 10


def tokenize_corpus(
    corpus: Corpus,
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    validation: int = 5,
    test: int = 5,
    processes: int = 1,
    on_error: str = "skip",
    shard_bytes: int = 2**24,
    log: Callable[[str], None] | None = None,
) -> TokenStore:
    """Tokenizes a corpus into a token store; a call that was stopped is resumed by the same call.

    A document belongs to train, validation or test by the hash of its content, so that copies stay together, adding
    documents never moves others, and the number of files does not matter. In a corpus of a single unit the documents
    are ranked by hash instead where a split would be empty.

    Args:
      corpus: from `open_corpus` or `wrap_source`.
      out: the store's folder.
      tokenizer: as for `load_tokenizer`.
      validation: percentage of the documents in the validation split.
      test: percentage of the documents in the test split.
      processes: number of processes that tokenize; 1 works in this one.
      on_error: "skip" leaves out a document that cannot be read, and counts it; "fail" raises.
      shard_bytes: bytes of text per unit.
      log: called with lines of progress.

    Raises:
      ValueError: an option out of range, a corpus too small for its splits, a document that cannot be read with
        on_error="fail", or a folder that holds a store of something else.
      ImportError: a library that is not installed.

    Example:
      >>> import tempfile
      >>> from memformer.data.corpus import wrap_source
      >>> corpus = wrap_source([f"document {i}" for i in range(60)])
      >>> store = tokenize_corpus(corpus, tempfile.mkdtemp())
      >>> sum(store.split(split).count("documents") for split in ("train", "validation", "test"))
      60
    """
    check_choice("on_error", on_error, ("skip", "fail"))
    shares = {"validation": check_at_least("validation", validation, 0), "test": check_at_least("test", test, 0)}
    check(validation + test < 100, "validation + test", "below 100 percent", validation + test)
    check_size("processes", processes)
    check_size("shard_bytes", shard_bytes)
    loaded = load_tokenizer(tokenizer)
    say = log or _ignore
    store = pathlib.Path(out).expanduser()
    settings = {
        "corpus": [list(part) for part in corpus.identity],
        "tokenizer": loaded.fingerprint,
        "shares": shares,
        "shard_bytes": shard_bytes,
    }
    if (store / MANIFEST).is_file():
        finished = TokenStore(store)
        _check_settings(store, finished.manifest["settings"], settings)
        say(f"{store} is finished already")
        return finished
    _check_most(corpus, shares)
    records = _start(store, settings, loaded)
    if records:
        say(f"resuming behind {len(records)} finished shards")
    units = _gather(corpus, shares, shard_bytes, records, _Reporter(on_error, say))
    with Workers(store, processes, records) as workers:
        for number, record in workers.run(units):
            records[number] = record
            workers.show(records, len(corpus.parts), say)
    _finish(store, settings, loaded, records)
    result = TokenStore(store)
    for line in _warnings(result, shares):
        say(line)
    return result


def training_texts(
    corpus: Corpus, *, validation: int = 5, test: int = 5, report: Callable[[Problem], None] | None = None
) -> Iterator[str]:
    """Yields the texts that `tokenize_corpus` would put into the train split by their hash.

    A tokenizer that is trained on them has not seen held-out documents.

    Raises:
      ValueError: documents of which none is in the train split.
    """
    shares, read, size, used = {"validation": validation, "test": test}, 0, 0, 0
    for _, record in corpus.read(report=report or _ignore):
        key = _key(record)
        read, size = read + 1, size + len(key)
        if split_by_hash(key, **shares) == "train":
            used += 1
            yield record.prompt + record.text
    if read and not used:
        raise _too_small(f"of {read} document{'s' * (read > 1)} none is in train", shares, size)


def _ignore(_: Any) -> None:
    pass


def _key(record: TextRecord) -> bytes:
    return (record.prompt + record.text).encode()


def describe_problem(problem: Problem) -> str:
    """A line on a document that is left out."""
    return f"left out: {problem.place}: {problem.message}"


class _Reporter:
    """Counts problems by kind and shows the first ones, or raises the first."""

    def __init__(self, on_error: str, log: Callable[[str], None]):
        self._fatal, self._log, self._shown = on_error == "fail", log, 0
        self.counts: collections.Counter[str] = collections.Counter()

    def __call__(self, problem: Problem) -> None:
        if self._fatal:
            raise ValueError(f"{problem.place}: {problem.message}")
        self.counts[problem.kind] += 1
        self._shown += 1
        if self._shown <= SHOWN_PROBLEMS:
            self._log(describe_problem(problem))
        elif self._shown == SHOWN_PROBLEMS + 1:
            self._log("left out: more, which the summary counts")

    def take(self) -> dict[str, int]:
        """Counts since the last call."""
        counts, self.counts = dict(self.counts), collections.Counter()
        return counts


def _needed(shares: dict[str, int]) -> list[str]:
    return ["train", *(split for split, share in shares.items() if share)]


def _too_small(found: str, shares: dict[str, int], size: int) -> ValueError:
    """The error of a corpus of `size` bytes that has too few documents."""
    # a few hundred pieces, none shorter than a paragraph
    piece = max(size // 300, 500)
    return ValueError(
        f"the corpus is too small: {found}, and the splits {', '.join(_needed(shares))} need a document each, of "
        "different content. Divide text files into more documents, by separator (--separator='\\n\\n' for blank lines) "
        f"or piece_bytes (--piece_bytes={piece} cuts at line ends); or give validation = 0 or test = 0 to do without "
        "that split"
    )


def _check_most(corpus: Corpus, shares: dict[str, int]) -> None:
    """Refuses a corpus that is known to be too small before anything is read."""
    if corpus.most is not None and corpus.most < len(_needed(shares)):
        raise _too_small(
            f"it has {corpus.most} text file{'s' * (corpus.most > 1)}, each one document",
            shares,
            sum(s for _, s in corpus.identity),
        )


def _check_settings(store: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise ValueError(
            f"{store} holds a store, or part of one, with another {' and '.join(changed)}; choose another folder, or "
            "delete this one"
        )


def _start(store: pathlib.Path, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[int, dict[str, Any]]:
    """Makes the folders of a store, or reads the records of the units that are finished."""
    file = store / PROGRESS / SETTINGS
    if file.is_file():
        _check_settings(store, json.loads(file.read_text(encoding="utf-8")), settings)
        found = {int(path.stem): json.loads(path.read_text()) for path in file.parent.glob("[0-9]*.json")}
        return dict(sorted(found.items()))
    if store.is_dir() and any(store.iterdir()) and not (store / PROGRESS).is_dir():
        raise ValueError(f"{store} must be a new or empty folder, or hold a token store; it holds something else")
    try:
        # first the folder by which a later call knows the others as its own
        for name in (PROGRESS, *SPLITS):
            (store / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be made, got {str(store)!r}: {error.strerror}") from error
    save_tokenizer(tokenizer, store / "tokenizer")
    write_json(file, settings)
    return {}


def _gather(
    corpus: Corpus,
    shares: dict[str, int],
    shard_bytes: int,
    records: dict[int, dict[str, Any]],
    reporter: _Reporter,
) -> Iterator[Unit]:
    """Yields the units that have no record, in order."""
    number, cursor = 0, (0, 0)
    while number in records:
        cursor = tuple(records[number]["cursor"])
        number += 1
    if number and records[number - 1]["last"]:
        return
    held: list[TextRecord] = []
    problems: dict[str, int] = {}
    size = 0
    for after, record in corpus.read(cursor, reporter):
        # a full unit waits for the next document, so that the last one is known as the last
        if size >= shard_bytes:
            if number not in records:
                yield _unit(number, held, cursor, problems, shares, last=False)
            number, held, size = number + 1, [], 0
        held.append(record)
        cursor = after
        size += len(_key(record))
        if size >= shard_bytes:
            # later problems belong to the next unit, which a resumed job reads from `cursor` on
            problems = reporter.take()
    whole = problems if size >= shard_bytes else {}
    problems = dict(collections.Counter(whole) + collections.Counter(reporter.take()))
    if number not in records:
        yield _unit(number, held, cursor, problems, shares, last=True)


def _unit(
    number: int,
    held: list[TextRecord],
    cursor: Cursor,
    problems: dict[str, int],
    shares: dict[str, int],
    *,
    last: bool,
) -> Unit:
    record = {"cursor": list(cursor), "last": last, "problems": problems}
    keys = [_key(item) for item in held]
    if number == 0 and last and len(set(keys)) < len(_needed(shares)):
        count = f"{len(set(keys)) or 'no'} different document{'s' * (len(set(keys)) != 1)}"
        raise _too_small(f"it has {count}{'' if keys else ' that can be read'}", shares, sum(map(len, keys)))
    # one unit is the whole corpus, and may be small
    if number == 0 and last and all(shares.values()):
        splits = split_items(keys, **shares)
    else:
        splits = [split_by_hash(key, **shares) for key in keys]
    documents = [(split, item.prompt, item.text) for split, item in zip(splits, held, strict=True)]
    return Unit(number, documents, record)


def _finish(
    store: pathlib.Path, settings: dict[str, Any], tokenizer: Tokenizer, records: dict[int, dict[str, Any]]
) -> None:
    """Writes the manifest, and removes the records that it replaces."""
    ordered = [records[number] for number in sorted(records)]
    splits = {split: [r["shards"][split] for r in ordered if split in r["shards"]] for split in SPLITS}
    empty = [split for split in _needed(settings["shares"]) if not splits[split]]
    if empty:
        read = sum(record["read"] for record in ordered)
        raise _too_small(
            f"of {read} documents none is in {' or '.join(empty)}",
            settings["shares"],
            sum(r["text_bytes"] for r in ordered),
        )
    problems: collections.Counter[str] = collections.Counter()
    for record in ordered:
        problems.update(record["problems"])
    content = [tokenizer.fingerprint, settings["shares"], *(record["digest"] for record in ordered)]
    manifest = {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32],
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
        },
        "dtype": np.dtype(token_dtype(tokenizer.vocab_size)).name,
        "settings": settings,
        "problems": dict(problems),
        "splits": splits,
    }
    write_json(store / MANIFEST, manifest)
    with contextlib.suppress(OSError):
        shutil.rmtree(store / PROGRESS)
        for left in store.rglob(f"*{PART}"):
            left.unlink()


def _warnings(store: TokenStore, shares: dict[str, int]) -> Iterator[str]:
    """Sentences on splits whose share of the text is far from that of the documents."""
    sizes = {split: store.split(split).count("bytes") for split in SPLITS}
    whole = sum(sizes.values())
    for split, share in {"train": 100 - sum(shares.values()), **shares}.items():
        part = 100 * sizes[split] / max(whole, 1)
        if share and not share / 2 <= part <= 2 * share:
            yield (
                f"the {split} split has {part:.1f}% of the text instead of {share}%: the documents are few or of very "
                "different length; separator or piece_bytes divides text files into more"
            )
