"""Checksums of the files of a checkpoint: Orbax loads corrupted arrays without an error.

The list of checksums is written before the step folder gets its final name, so a step folder without one is incomplete.
"""

import concurrent.futures
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

__all__ = ["CHECKSUMS", "EMPTY", "JSON_ITEMS", "StateHandler", "damage"]

JSON_ITEMS = ("arrays", "data", "config", "metrics")
EMPTY = "is empty"
CHECKSUMS = "checksums.json"
# Orbax marks a finished folder with this file after the checksums are taken
COMMIT_MARK = "commit_success.txt"
# Orbax's folder for the files of one process, and ours for their checksums until all are written
PROCESS = "ocdbt.process_"
PART = "checksums.process_{}.json"
BLOCK_BYTES = 1 << 23


class StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's array writer; adds the checksums of all files of the step, each computed by the process that wrote it."""

    async def async_save(self, directory: epath.Path, *arguments: Any, **options: Any) -> list[Any]:
        """Starts writing; the result of its last future is on disk together with the checksums of this process."""
        futures = await super().async_save(directory, *arguments, **options) or []
        return [_WithChecksums(futures, directory)]

    def finalize(self, directory: epath.Path) -> None:
        """Writes the checksums once all files of the step are written; process 0 calls it."""
        super().finalize(directory)
        known: dict[str, Any] = {}
        for path in directory.glob(PART.format("*")):
            known |= json.loads(path.read_text())
            path.unlink()
        files = {f"state/{name}": path for name, path in _files(directory)}
        for item in JSON_ITEMS:
            files |= {f"{item}/{name}": path for name, path in _files(directory.parent / item)}

        def checksum(name: str) -> Any:
            # merging the files of all processes may have rewritten one
            same = name in known and files[name].stat().length == known[name][0]
            return known[name] if same else _checksum(files[name])

        text = json.dumps(dict(zip(files, _in_threads(checksum, files), strict=True)))
        (directory / CHECKSUMS).write_text(f"{zlib.crc32(text.encode())}\n{text}")


@dataclasses.dataclass(frozen=True)
class _WithChecksums:
    """A future of Orbax: waits for the writes of this process, then writes their checksums to a file of its own."""

    futures: list[Any]
    directory: epath.Path

    def result(self, timeout: float | None = None) -> None:
        for future in self.futures:
            future.result(timeout)
        own = self.directory / f"{PROCESS}{jax.process_index()}"
        files = {f"state/{own.name}/{name}": path for name, path in _files(own)} if own.exists() else {}
        sums = dict(zip(files, _in_threads(_checksum, files.values()), strict=True))
        (self.directory / PART.format(jax.process_index())).write_text(json.dumps(sums))

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


def damage(folder: epath.Path, deep: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """Describes the damage to a step folder, or returns None; without `deep`, arrays are checked by size alone.

    Args:
      folder: of the step.
      deep: whether to read the arrays too.
      share: (index, count) of the processes that check one step together: each reads the arrays that the process of
        its index wrote, and the first everything else.
    """
    try:
        check, _, text = (folder / "state" / CHECKSUMS).read_bytes().partition(b"\n")
        if check != str(zlib.crc32(text)).encode():
            return f"is damaged (state/{CHECKSUMS} is garbled)"
        sums = json.loads(text)

        def differs(name: str) -> str | None:
            size, check = sums[name]
            if (folder / name).stat().length != size:
                return f"is damaged ({name} has {(folder / name).stat().length} bytes of {size})"
            if (deep or not name.startswith("state/")) and _checksum(folder / name)[1] != check:
                return f"is damaged (the bytes of {name} have changed)"
            return None

        own = [name for name in sums if _writer(name) % share[1] == share[0]]
        return next(filter(None, _in_threads(differs, own)), None)
    except FileNotFoundError as error:
        if not any(folder.iterdir()):
            return EMPTY
        return f"is not complete ({epath.Path(error.filename or CHECKSUMS).name} is missing)"
    except OSError as error:
        return f"cannot be read ({type(error).__name__}: {error})"


def _writer(name: str) -> int:
    """The process that wrote a file; 0 for those that belong to no process."""
    number = name.removeprefix(f"state/{PROCESS}").partition("/")[0]
    return int(number) if name.startswith(f"state/{PROCESS}") and number.isdecimal() else 0


def _files(folder: epath.Path, prefix: str = "") -> Iterable[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif path.name != COMMIT_MARK:
            yield prefix + path.name, path


def _checksum(path: epath.Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size, check = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, check = size + len(block), zlib.crc32(block, check)
    return size, check


def _in_threads(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, values))
