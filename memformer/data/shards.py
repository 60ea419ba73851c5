"""Shards of a token store: what a unit of documents becomes, and the processes that write them."""

import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from memformer.data.source import SPLITS
from memformer.data.tokenizer import load_tokenizer

__all__ = []

PROGRESS = "progress"
# ending of files that are being written
PART = ".part"


class Unit(NamedTuple):
    """Consecutive documents that become one shard of each split.

    Attributes:
      number: counted from 0.
      documents: split, prompt and text.
      record: for progress/: the cursor behind the last document, and the problems met.
    """

    number: int
    documents: list[tuple[str, str, str]]
    record: dict[str, Any]


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file that a crash leaves either whole or absent."""
    with _whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def _whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which a crash leaves either whole or absent."""
    # a worker of a job that was killed may still write its own part
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Workers:
    """Processes that write units; with one process the work is done here.

    Processes are spawned, because JAX may run threads in this one, and end when it does, however it ends.
    """

    def __init__(self, store: pathlib.Path, processes: int, records: dict[int, dict[str, Any]]):
        self._store, self._processes = store, processes
        self._before = _text_bytes(records)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> "Workers":
        if self._processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self._processes, context, _end_with_parent)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, units: Iterable[Unit]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Writes the units, and yields their numbers and records as they are finished."""
        if self._pool is None:
            for unit in units:
                yield unit.number, write_unit(self._store, unit)
            return
        waiting: dict[concurrent.futures.Future, int] = {}
        for unit in units:
            if unit.record["last"] and not waiting:
                # a single unit is not worth another process
                yield unit.number, write_unit(self._store, unit)
                return
            waiting[self._pool.submit(write_unit, self._store, unit)] = unit.number
            # so few units are in memory at once
            if len(waiting) > self._processes:
                done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), _result(future)
        for future in concurrent.futures.as_completed(waiting):
            yield waiting[future], _result(future)

    def show(self, records: dict[int, dict[str, Any]], files: int, log: Callable[[str], None]) -> None:
        """Logs the progress every five seconds; `files` is the number of all."""
        now = time.monotonic()
        if now - self._shown >= 5:
            self._shown = now
            done = _text_bytes(records)
            rate = (done - self._before) / (now - self._began)
            documents = sum(record["read"] for record in records.values())
            at = 1 + max(record["cursor"][0] for record in records.values())
            log(
                f"file {at} of {files}, {documents:,} documents, {done / 1e6:,.0f} MB, {len(records)} shards, "
                f"{rate / 1e6:.1f} MB/s"
            )


def _text_bytes(records: dict[int, dict[str, Any]]) -> int:
    return sum(record["text_bytes"] for record in records.values())


def _result(future: concurrent.futures.Future) -> dict[str, Any]:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that tokenizes was ended from outside, perhaps for lack of memory: rerun the command to resume, "
            "with fewer processes or smaller shard_bytes"
        ) from error


def _end_with_parent() -> None:
    """Makes a worker end when its parent does; it would wait for work for ever where that is killed."""
    # Ctrl-C reaches all processes of a terminal: the parent ends the work, after the units that are under way
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # one worker per core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass
class _Columns:
    """The arrays of one shard while it grows."""

    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    prompts: list[int] = dataclasses.field(default_factory=list)
    bytes: int = 0

    def add(self, prompt: list[int], text: list[int], size: int, dtype: Any) -> None:
        """Adds a document."""
        self.tokens.append(np.array([*prompt, *text], dtype))
        self.ends.append((self.ends[-1] if self.ends else 0) + len(prompt) + len(text))
        self.prompts.append(len(prompt))
        self.bytes += size


def token_dtype(vocab_size: int) -> Any:
    """The smallest dtype of a store that holds all ids."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_unit(store: pathlib.Path, unit: Unit) -> dict[str, Any]:
    """Tokenizes the documents of a unit; writes its shards, and its record last."""
    tokenizer = load_tokenizer(str(store / "tokenizer"))
    dtype, end = token_dtype(tokenizer.vocab_size), tokenizer.end_of_text
    columns = {split: _Columns() for split in SPLITS}
    for split, prompt, text in unit.documents:
        ids = tokenizer.encode(text)
        ids = ids if end is None else [*ids, end]
        if ids:
            columns[split].add(tokenizer.encode(prompt) if prompt else [], ids, len(text.encode()), dtype)
    name, shards = f"{unit.number:05d}", {}
    for split, column in columns.items():
        if not column.ends:
            continue
        _save(store / split / f"{name}.tokens.npy", np.concatenate(column.tokens))
        _save(store / split / f"{name}.ends.npy", np.array(column.ends, np.int64))
        if any(column.prompts):
            _save(store / split / f"{name}.prompts.npy", np.array(column.prompts, np.int32))
        shards[split] = {
            "name": name,
            "tokens": column.ends[-1],
            "documents": len(column.ends),
            "scored": column.ends[-1] - sum(column.prompts),
            "bytes": column.bytes,
            "prompts": any(column.prompts),
        }
    digest = hashlib.sha256(repr(unit.documents).encode()).hexdigest()
    sizes = {"read": len(unit.documents), "text_bytes": sum(column.bytes for column in columns.values())}
    record = {**unit.record, **sizes, "shards": shards, "digest": digest}
    write_json(store / PROGRESS / f"{name}.json", record)
    return record


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with _whole_file(path) as file:
        np.save(file, array)
