"""Files of a run's folder, local or behind a URL (gs://, s3://, az://), and errors that name the disk."""

import contextlib
import errno
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import TextIO

from etils import epath

from memformer.training.config import RunError

__all__ = [
    "check_folder",
    "check_out",
    "disk_errors",
    "error_reason",
    "free_space",
    "is_url",
    "replace_file",
    "write_bytes",
]

# URL scheme to the package that serves it
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}


def is_url(path: str) -> bool:
    """Whether `path` is a URL and not a path of a local disk.

    Example:
      >>> is_url("gs://bucket/run"), is_url("runs/swap")
      (True, False)
    """
    return "://" in str(path)


def check_folder(folder: str) -> None:
    """Raises RunError unless the file system of `folder` can be used here.

    Example:
      >>> check_folder("ftp://host/run")
      Traceback (most recent call last):
      ...
      memformer.training.config.RunError: --workdir must be a local path or a URL of gs://, s3://, az://, got ...
    """
    if not is_url(folder):
        return
    scheme = folder.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise RunError(f"--workdir must be a local path or a URL of {known}, got {folder!r}.")
    package = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise RunError(
            f"--workdir={folder} needs the package {package}, which is not installed: pip install {package}, or give a "
            "local --workdir."
        )


def check_out(path: str | None) -> None:
    """Raises RunError where no file can be written at `path`, if one is given; for commands that compute for long.

    Example:
      >>> check_out("nowhere/scores.json")
      Traceback (most recent call last):
      ...
      memformer.training.config.RunError: --out=nowhere/scores.json: there is no folder nowhere.
    """
    if not path or is_url(path):
        return
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise RunError(f"--out={path}: there is no folder {folder}.")
    if os.path.isdir(path):
        raise RunError(f"--out={path} must name a file, and is a folder.")
    if not os.access(folder, os.W_OK):
        raise RunError(f"--out={path}: the folder {folder} cannot be written.")


def error_reason(error: BaseException) -> str:
    """The cause of a failed write in a few words, for errors of Python and of TensorStore alike.

    Example:
      >>> error_reason(OSError(28, "No space left on device"))
      'No space left on device'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore puts the words of the system last, after its own paths
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def free_space(folder: str) -> str:
    """The free space of the disk that holds `folder`, as the end of a sentence; "" for URLs."""
    path = os.path.abspath(folder)
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    if is_url(folder) or not os.path.exists(path):
        return ""
    usage = shutil.disk_usage(path)
    return f" (its disk has {usage.free / 2**20:.1f} MiB free of {usage.total / 2**20:.1f} MiB)"


@contextlib.contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turns an OSError of the enclosed writes into a `RunError` that names the file and its disk."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error_reason(error)}{free_space(os.path.dirname(path))}. Free space there or make "
            "it writable, then rerun the command to resume; or choose another --workdir."
        ) from error


@contextlib.contextmanager
def replace_file(path: str) -> Iterator[TextIO]:
    """Writes a text file atomically: a kill leaves the old file or the new one, never a part.

    Raises:
      RunError: the folder cannot be written.
    """
    # a URL names an object, which is replaced as a whole
    target = path if is_url(path) else path + ".new"
    with disk_errors(path):
        try:
            with epath.Path(target).open("w") as file:
                yield file
            if target != path:
                os.replace(target, path)
        except OSError:
            if target != path:
                # a part of the file takes the space that the next one needs
                with contextlib.suppress(OSError):
                    os.unlink(target)
            raise


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file; raises RunError if the folder cannot be written."""
    with disk_errors(path):
        epath.Path(path).write_bytes(content)
