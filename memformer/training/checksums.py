"""Checksums of the files of a checkpoint: Orbax loads corrupted arrays without an error.

The list of checksums is written before the step folder gets its final name, so a step folder without one is incomplete.
"""

import concurrent.futures
import json
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

__all__ = ["CHECKSUMS", "EMPTY", "JSON_ITEMS", "StateHandler", "damage"]

JSON_ITEMS = ("arrays", "data", "config", "metrics")
EMPTY = "is empty"
CHECKSUMS = "checksums.json"
# Orbax marks a finished folder with this file after the checksums are taken
COMMIT_MARK = "commit_success.txt"
BLOCK_BYTES = 1 << 23


class StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's array writer; adds the checksums of all files of the step."""

    def finalize(self, directory: epath.Path) -> None:
        """Writes the checksums once all files of the step are written."""
        super().finalize(directory)
        files = {f"state/{name}": path for name, path in _files(directory)}
        for item in JSON_ITEMS:
            files |= {f"{item}/{name}": path for name, path in _files(directory.parent / item)}
        text = json.dumps(dict(zip(files, _in_threads(_checksum, files.values()), strict=True)))
        (directory / CHECKSUMS).write_text(f"{zlib.crc32(text.encode())}\n{text}")


def damage(folder: epath.Path, deep: bool) -> str | None:
    """Describes the damage to a step folder, or returns None; without `deep`, arrays are checked by size alone."""
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

        return next(filter(None, _in_threads(differs, sums)), None)
    except FileNotFoundError as error:
        if not any(folder.iterdir()):
            return EMPTY
        return f"is not complete ({epath.Path(error.filename or CHECKSUMS).name} is missing)"
    except OSError as error:
        return f"cannot be read ({type(error).__name__}: {error})"


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
