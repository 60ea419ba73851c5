"""Programs that do one request at a time, and may hang or die without taking the rest along.

One JSON object a line on stdin, one answer a line on stdout, marked. A kernel that waits forever, or that leaves the
device unusable, costs the request that started it: the program is ended, and the next request starts a fresh one.
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

__all__ = ["Worker", "WorkerError", "serve"]

# What a CUDA context does not survive.
FATAL = ("CUDA_ERROR", "illegal", "misaligned", "unspecified launch failure", "device-side assert", "CUDA error")

# How an answer's line begins; what a library prints before `serve` begins otherwise.
ANSWER = "answer: "

# The key of an answer that says what went wrong.
FAILED = "request failed"


class WorkerError(RuntimeError):
    """A request that failed; the message says how, in the program's own words."""


class Worker:
    """A program of ours, started when it is first asked.

    Attributes:
      starts: how often it was started; a change means that what it held is gone.
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
          WorkerError: the request failed, took longer than `limit` seconds, or ended the program.
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
            raise WorkerError(f"no answer within {limit:.0f} s: ended") from None
        if not line:
            words = pathlib.Path(self.log.name).read_text(errors="replace").strip().splitlines()
            status = process.wait()
            self.close()
            raise WorkerError(f"ended with status {status}: {' | '.join(words[-3:])}"[:500])
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
        # Its own queue: a late answer of an ended program is nobody's.
        self.answers = queue.Queue()
        self.reader = threading.Thread(target=_read, args=(process.stdout, self.answers), daemon=True)
        self.reader.start()
        return process

    def close(self) -> None:
        """Ends the program."""
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
    """Answers requests until stdin ends; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        # Whatever goes wrong is the answer; the program lives on.
        except Exception as error:  # noqa: BLE001
            # Compilers say where first, and what last.
            words = [word.strip() for word in str(error).splitlines() if word.strip()] or [""]
            answer = {FAILED: f"{type(error).__name__}: {' ... '.join(dict.fromkeys([words[0], words[-1]]))}"[:600]}
        answers.write(f"{ANSWER}{json.dumps(answer)}\n")
        answers.flush()
