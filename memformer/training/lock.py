"""One trainer per folder: a lock file names the process that owns a run."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from memformer.training.config import RunError
from memformer.training.distributed import agree
from memformer.training.files import disk_errors, is_url
from memformer.training.metrics import log

__all__ = ["LOCK", "run_lock"]

LOCK = "lock.json"
# An owner elsewhere shows that it is alive by changing the file every BEAT seconds; without a change for STALE
# seconds the lock is stale.
BEAT = 10.0
STALE = 60.0
POLL = 1.0


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Holds the lock of a run's folder, which exists.

    The processes of one run are one owner: process 0 takes the lock for all. The lock of a process that ended without
    releasing it is stale, and is replaced: on this host (same boot and container) if no such process runs, elsewhere if
    its heartbeat has stopped.

    Raises:
      RunError: another trainer uses the folder.
    """
    lock = _Lock(os.path.join(folder, LOCK))
    refusal = None
    if jax.process_index() == 0:
        try:
            refusal = lock.acquire()
        except RunError as error:
            # the other processes wait in `agree`
            refusal = str(error)
    if agree(int(refusal is not None)):
        raise RunError(refusal or f"another trainer is running in {folder}; process 0 names it.")
    try:
        with lock.heartbeat():
            yield
    finally:
        if jax.process_index() == 0:
            lock.release()


class _Lock:
    def __init__(self, path: str):
        self.path = path
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start(os.getpid()), **_scope()}
        self.owner["since"] = time.strftime("%Y-%m-%d %H:%M:%S")

    def acquire(self) -> str | None:
        """Takes the lock; returns the error message if another trainer holds it."""
        if epath.Path(self.path).is_dir():
            raise RunError(f"{self.path} must be the lock of a run, a file, and is a folder: move it away.")
        for _ in range(10):
            with disk_errors(self.path):
                if self._create():
                    return None
            other = self._read()
            if other is None:
                # its owner may be writing it
                time.sleep(POLL)
                other = self._read()
            if other is not None and self._alive(other):
                return (
                    f"another trainer is running in this folder: {os.path.dirname(self.path)} is in use by process "
                    f"{other.get('pid')} on host {other.get('host')}, since {other.get('since')}. Wait for it or stop "
                    "it, or choose another --workdir."
                )
            with disk_errors(self.path):
                if self._replace(other):
                    return None
        return f"cannot take the lock {self.path}: other trainers keep replacing it; choose another --workdir."

    def release(self) -> None:
        """Removes the lock if it is still ours."""
        with contextlib.suppress(OSError), self._guard():
            if self._read() == self.owner:
                epath.Path(self.path).unlink()

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Changes the file regularly while the enclosed code runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):
                    self._touch()

        thread = threading.Thread(target=beat, name="run lock", daemon=True)
        if jax.process_index() == 0:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if thread.is_alive():
                thread.join()

    def _create(self) -> bool:
        """Creates the file with its content; False if it exists."""
        if is_url(self.path):
            return not epath.Path(self.path).exists() and self._upload()
        with self._written() as own:
            try:
                # a link, unlike opening the file, appears together with its content
                os.link(own, self.path)
            except FileExistsError:
                return False
            except OSError:
                # a file system without links
                with contextlib.suppress(FileExistsError), open(self.path, "x", encoding="utf-8") as file:
                    file.write(json.dumps(self.owner))
                    return True
                return False
        return True

    def _replace(self, other: dict[str, Any] | None) -> bool:
        """Replaces a stale lock, which names `other`; False if another trainer has done so, or the lock is gone."""
        if is_url(self.path):
            return self._read() == other and self._upload()
        with self._guard(), self._written() as own:
            # the file exists at every moment: nobody can create it meanwhile
            if self._read() != other or not os.path.exists(self.path):
                return False
            os.replace(own, self.path)
        return True

    def _upload(self) -> bool:
        """Writes the object of a URL, which cannot be created exclusively; False if another trainer wrote it too."""
        epath.Path(self.path).write_text(json.dumps(self.owner))
        time.sleep(POLL)
        return self._read() == self.owner

    @contextlib.contextmanager
    def _written(self) -> Iterator[str]:
        """A file of our own with the content of the lock."""
        # process ids are not unique: containers may share the folder
        own = f"{self.path}.{uuid.uuid4().hex}"
        try:
            with open(own, "w", encoding="utf-8") as file:
                file.write(json.dumps(self.owner))
            yield own
        finally:
            with contextlib.suppress(OSError):
                os.unlink(own)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Serialises trainers that read a lock to replace or remove it; it ends with the process at the latest."""
        if is_url(self.path):
            yield
            return
        folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
        try:
            # some network file systems cannot lock a folder
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _read(self) -> dict[str, Any] | None:
        """The owner; None if the file is gone or unreadable."""
        try:
            owner = json.loads(epath.Path(self.path).read_text())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _touch(self) -> None:
        if is_url(self.path):
            epath.Path(self.path).write_text(json.dumps(self.owner) + " " * (int(time.time()) % 97))
        else:
            os.utime(self.path)

    def _pulse(self) -> Any:
        """A value that the owner's heartbeat changes."""
        try:
            return epath.Path(self.path).read_text() if is_url(self.path) else os.stat(self.path).st_mtime_ns
        except OSError:
            return None

    def _alive(self, other: dict[str, Any]) -> bool:
        if all(other.get(name) == self.owner[name] for name in ("host", "boot", "namespace")):
            return _start(other.get("pid")) == other.get("start")
        first, end = self._pulse(), time.monotonic() + STALE
        log(
            f"{self.path} names process {other.get('pid')} on host {other.get('host')}; waiting up to {STALE:.0f} s to "
            "see whether it is running"
        )
        while time.monotonic() < end:
            time.sleep(POLL)
            pulse = self._pulse()
            if pulse != first:
                # gone: the owner has released it
                return pulse is not None
        return False


def _scope() -> dict[str, str | None]:
    """Identifies this boot and container: hosts may share a name, and process ids mean nothing elsewhere."""
    scope: dict[str, str | None] = {"boot": None, "namespace": None}
    with contextlib.suppress(OSError):
        scope["boot"] = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        scope["namespace"] = os.readlink("/proc/self/ns/pid")
    return scope


def _start(pid: Any) -> str | None:
    """When the process of this id started; None if there is none. A reused id has another start."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return None
    except PermissionError:
        pass
    try:
        # after the name in parentheses: state, ..., start time as the 22nd field
        fields = epath.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "running"
    return None if fields[0] in "ZX" else fields[19]
