"""Worker processes: one request at a time, isolated from hangs and crashes.

The protocol of every benchmark process: one JSON object per line on stdin, one marked answer per line on stdout. A
kernel that deadlocks, or leaves the device unusable, fails its own request only: the process is killed, and the next
request starts a new one.
"""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

__all__ = ["Worker", "WorkerError", "serve", "shorten"]

# Errors after which a CUDA context is unusable.
FATAL = ("CUDA_ERROR", "illegal", "misaligned", "unspecified launch failure", "device-side assert", "CUDA error")

# Prefix of an answer, which tells it from what libraries print.
ANSWER = "answer: "

# Key of an answer that reports a failure.
FAILED = "request failed"


class WorkerError(RuntimeError):
    """A failed request, with the worker's own error message."""


class Worker:
    """A worker process, started by its first request.

    Attributes:
      starts: number of starts; when it changes, everything the process held is gone.
    """

    def __init__(self, module: str, python: str = sys.executable, environment: Mapping[str, str] | None = None):
        self.command, self.environment = [python, "-m", module], {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()
        self.log: Any = None
        self.reader: threading.Thread | None = None
        self.starts = 0

    def ask(self, limit: float, /, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer.

        Raises:
          WorkerError: the request failed, took longer than `limit` seconds, or killed the process.
        """
        process = self.process = self.process if self.process and self.process.poll() is None else self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        try:
            line = self.answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer within {limit:.0f} s: killed") from None
        if not line:
            lines = pathlib.Path(self.log.name).read_text(errors="replace").strip().splitlines()
            status = process.wait()
            self.close()
            raise WorkerError(f"exited with status {status}: {' | '.join(lines[-3:])}"[:500])
        answer = json.loads(line)
        if FAILED in answer:
            if any(word in answer[FAILED] for word in FATAL):
                self.close()
            raise WorkerError(answer[FAILED])
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        self.starts += 1
        self.log = tempfile.NamedTemporaryFile("w", prefix="benchmark-", suffix=".log")
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=self.environment
        )
        # A queue of its own: a late answer of a killed process must not reach the next request.
        self.answers = queue.Queue()
        self.reader = threading.Thread(target=_read, args=(process.stdout, self.answers), daemon=True)
        self.reader.start()
        return process

    def close(self) -> None:
        """Kills the process."""
        if self.process is None or self.reader is None:
            return
        self.process.kill()
        self.process.wait()
        self.reader.join()
        streams: tuple[Any, ...] = (self.process.stdin, self.process.stdout, self.log)
        for stream in streams:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.process = None


def _read(stream: TextIO, answers: "queue.Queue[str]") -> None:
    for line in stream:
        if line.startswith(ANSWER):
            answers.put(line.removeprefix(ANSWER))
    answers.put("")


def serve(actions: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until stdin closes; the output of libraries goes to stderr.

    Args:
      actions: functions by the request's "do"; the other keys of a request are their arguments.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        # Any error is an answer; the process carries on.
        except Exception as error:  # noqa: BLE001
            answer = {FAILED: shorten(error)}
        answers.write(f"{ANSWER}{json.dumps(answer)}\n")
        answers.flush()


def shorten(error: BaseException) -> str:
    """Type, first and last line of an error: compilers name the place first and the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys([lines[0], lines[-1]]))}"[:600]
