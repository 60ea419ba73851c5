"""Records of a run: progress line, metrics.jsonl, trackers, model FLOPs utilization.

Only process 0 writes; in the others every call does nothing.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath

from memformer.training.chips import find_chip
from memformer.training.files import disk_errors, is_url, replace_file

__all__ = [
    "RunLog",
    "Tracker",
    "flops_per_token",
    "looked_up",
    "format_table",
    "memory_pattern",
    "model_name",
    "peak_flops",
    "read_records",
    "log",
]


def log(text: str, end: str = "\n") -> None:
    """Prints a line to the terminal; process 0 only."""
    if jax.process_index():
        return
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except OSError:
        # the reader of a pipe is gone, or the disk of a redirected output is full: that must not end a run
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device, or None if unknown (CPUs).

    Example:
      >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
      (989000000000000.0, None)
    """
    chip = find_chip(device_kind)
    return None if chip is None else chip.flops


def flops_per_token(model: Mapping[str, Any], matrix_parameters: int, steps: int) -> float:
    """Analytic training FLOPs per token: 3 (forward, and twice that backward) times

        2 (parameters of matrix products) + depth * heads * mix

    where mix, the reads and writes of a memory with one write per token, is 2 S (K + V) / 2 for softmax attention over
    S = `steps` tokens (the causal half), twice that for deltaformer (its writes attend too), and 6 K V for a matrix
    state. For models other than memory_lm only the parameters count, of experts the chosen ones. Rematerialization is
    not counted, as is usual for MFU.
    """
    if model.get("type", "memory_lm") != "memory_lm":
        return 6.0 * matrix_parameters
    heads = model["heads"]
    key = model["key_width"] or model["width"] // heads
    value = model["value_width"] or key
    total = 0.0
    names = memory_pattern(model["memory"])
    for layer in range(model["depth"]):
        name = names[layer % len(names)]
        attention = steps * (key + value)
        mixes = {"softmax_attention": attention, "fox": attention}
        mixes |= {"deltaformer": 2 * attention, "gated_deltaformer": 2 * attention}
        total += heads * mixes.get(name, 6 * key * value)
    return 3.0 * (2.0 * matrix_parameters + total)


def looked_up(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Words in the paths of parameters that enter no matrix product; a tied embedding is the matrix of the logits.

    Example:
      >>> looked_up({"tie_embeddings": True})
      ('positions',)
    """
    return ("positions",) if model.get("tie_embeddings") else ("embedding", "positions")


def memory_pattern(memory: str | Sequence[str]) -> tuple[str, ...]:
    """The repeating per-layer pattern of a config's `model.memory`.

    Example:
      >>> memory_pattern("delta_rule, softmax_attention")
      ('delta_rule', 'softmax_attention')
    """
    return tuple(part.strip() for part in memory.split(",")) if isinstance(memory, str) else tuple(memory)


def model_name(model: Mapping[str, Any]) -> str:
    """Name of a config's model in tables and folders: its memory, or its type for models other than memory_lm.

    Example:
      >>> model_name({"type": "ntm"}), model_name({"memory": "delta_rule, softmax_attention"})
      ('ntm', 'delta_rule, softmax_attention')
    """
    kind = model.get("type", "memory_lm")
    return str(model["memory"]) if kind == "memory_lm" else str(kind)


def read_records(path: str) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, without a last line that a kill left incomplete."""
    records: list[dict[str, Any]] = []
    if epath.Path(path).exists():
        for line in epath.Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain-text table; all columns but the first are right-aligned.

    Example:
      >>> print(format_table(("memory", "accuracy"), [("delta_rule", "99.9%")]))
      memory      accuracy
      delta_rule     99.9%
    """
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]).rstrip())
    return "\n".join(lines)


class Tracker(Protocol):
    """Receives the numbers of a run; process 0 alone has trackers.

    Pass one's own to `memformer.training.train`. An exception ends the run, after a save.
    """

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Takes the numbers of one record by name, such as "train/loss" or "eval/accuracy".

        A resumed run repeats the steps after its checkpoint, with the same numbers.
        """

    def close(self) -> None:
        """Ends the run, whether it is finished or not."""


class RunLog:
    """The records of one run, in its folder and on the terminal.

    One JSON object per line, with `step` and `kind` ("train" or "eval"). Times and rates are measured; everything
    else is reproducible bit for bit.

    Args:
      folder: the run's folder.
      step: the step the run resumes from; later records are dropped, so that none appears twice.
      evaluated: the last step whose evaluation the run remembers; later evaluations are dropped.
      total: number of steps, for the progress line.
      trackers: also receive the numbers of each record.
      progress: show progress, as a progress bar on a terminal, as plain lines otherwise.
    """

    def __init__(
        self,
        folder: str,
        *,
        step: int,
        total: int,
        evaluated: int | None = None,
        trackers: Sequence[Tracker] = (),
        progress: bool = True,
    ):
        self._records: _Lines | None = None
        self._trackers = tuple(trackers)
        self._bar: Any = None
        self._progress, self._total, self._last_shown = progress, total, -math.inf
        if jax.process_index():
            return
        self._path = os.path.join(folder, "metrics.jsonl")
        with disk_errors(self._path):
            self._records = _Lines(
                self._path, _kept_records(self._path, step, step if evaluated is None else evaluated)
            )
        if progress and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds one record; its numbers go to the trackers as <kind>/<name>.

        Raises:
          RunError: the disk is full or gone.
        """
        if self._records is None:
            return
        record = {"kind": kind, "step": step, **{name: _json(value) for name, value in values.items()}}
        with disk_errors(self._path):
            self._records.add(json.dumps(record))
            # the first log may have no rate yet
            finite = {n: x for n, x in values.items() if isinstance(x, (int, float)) and math.isfinite(x)}
            numbers = {f"{kind}/{name}": value for name, value in finite.items()}
            for tracker in self._trackers:
                tracker.write(numbers, step)

    def show(self, step: int, text: str, *, always: bool = False) -> None:
        """Updates the progress bar; without a terminal, prints a line every five seconds. `always` prints a line."""
        if self._records is None or not self._progress:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if always:
                self.note(f"step {step}/{self._total}  {text}")
            else:
                self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if always or now - self._last_shown >= 5 or step >= self._total:
            self._last_shown = now
            log(f"step {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._progress:
            log(text)

    def sync(self) -> None:
        """Flushes the records to disk; called before a checkpoint that relies on them."""
        if self._records is not None:
            with disk_errors(self._path):
                self._records.sync()

    def close(self) -> None:
        """Closes the progress bar and the files."""
        if self._bar is not None:
            self._bar.close()
        records, self._records = self._records, None
        if records is not None:
            with disk_errors(self._path), contextlib.ExitStack() as stack:
                stack.callback(records.close)
                for tracker in self._trackers:
                    stack.callback(tracker.close)


class _Lines:
    """A text file that grows by lines, starting from `lines`.

    Objects behind a URL cannot grow: there the lines are kept here too, and the object is replaced at each `sync`.
    """

    def __init__(self, path: str, lines: Sequence[str]):
        self._path, self._file, self._lines = path, None, list(lines)
        self.sync()
        if not is_url(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, line: str) -> None:
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()

    def sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        else:
            with replace_file(self._path) as file:
                file.write("".join(line + "\n" for line in self._lines))

    def close(self) -> None:
        try:
            self.sync()
        finally:
            if self._file is not None:
                # after an error of the disk, the rest of the buffer cannot be written either
                with contextlib.suppress(OSError):
                    self._file.close()


def _json(value: Any) -> Any:
    # JSON has no NaN
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _kept_records(path: str, step: int, evaluated: int) -> list[str]:
    """The lines that a run resumed at `step` keeps: no later record, and no evaluation after step `evaluated`."""
    last = {"eval": min(step, evaluated)}
    return [json.dumps(record) for record in read_records(path) if record["step"] <= last.get(record["kind"], step)]
