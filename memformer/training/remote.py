"""Checkpoints behind a URL that Orbax cannot write itself: a local copy, uploaded after each save."""

import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from memformer.training.checksums import CHECKSUMS

__all__ = ["Mirror", "copy_folder"]


class Mirror:
    """A local copy of a folder of checkpoints behind a URL.

    A step counts as whole once its checksums are there: they are uploaded last and deleted first.

    Args:
      url: the folder, which need not exist.
    """

    def __init__(self, url: epath.Path):
        self._url = url
        self._root = epath.Path(tempfile.mkdtemp(prefix="memformer-checkpoints-"))
        self.folder = self._root / "checkpoints"
        for path in url.iterdir() if url.exists() else ():
            if path.is_dir():
                copy_folder(path, self.folder / path.name)

    def push(self) -> None:
        """Uploads new steps, then deletes those that are no longer kept."""
        local = {path.name: path for path in self.folder.iterdir() if path.is_dir()}
        remote = {path.name: path for path in self._url.iterdir()} if self._url.exists() else {}
        for name, path in local.items():
            if name not in remote or _mark(remote[name]) != _mark(path):
                if name in remote:
                    _delete(remote[name])
                copy_folder(path, self._url / name)
        for name in remote.keys() - local.keys():
            _delete(remote[name])

    def close(self) -> None:
        """Deletes the local copy."""
        shutil.rmtree(self._root, ignore_errors=True)


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder with everything in it; the checksums of a checkpoint last."""
    files = list(_files(source))
    target.mkdir(parents=True, exist_ok=True)
    for names in sorted(files, key=lambda names: names[-1] == CHECKSUMS):
        place = target.joinpath(*names)
        place.parent.mkdir(parents=True, exist_ok=True)
        source.joinpath(*names).copy(place, overwrite=True)


def _files(folder: epath.Path) -> Iterator[tuple[str, ...]]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from ((path.name, *rest) for rest in _files(path))
        else:
            yield (path.name,)


def _mark(step: epath.Path) -> bytes | None:
    path = step / "state" / CHECKSUMS
    return path.read_bytes() if path.exists() else None


def _delete(step: epath.Path) -> None:
    (step / "state" / CHECKSUMS).unlink(missing_ok=True)
    step.rmtree()
