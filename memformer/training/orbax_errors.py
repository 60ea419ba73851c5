"""Errors of Orbax and TensorStore while writing, as one paragraph; their own messages are hidden."""

import contextlib
import logging as std_logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator

from absl import logging
from etils import epath

from memformer.training.checksums import damage
from memformer.training.config import RunError
from memformer.training.files import error_reason, free_space

__all__ = ["SaveError", "hide_orbax", "save_errors", "step_folders"]

# JAX's coroutines that write arrays, of an abandoned save.
_UNBEGUN = r"coroutine 'async_serialize\S*' was never awaited"


class SaveError(RunError):
    """A step that could not be written: its cause, the disk, and the newest whole step."""


@contextlib.contextmanager
def save_errors(folder: epath.Path, name: str, step: int | None) -> Iterator[None]:
    """Raises any error of the enclosed writes as one `SaveError`, and removes what was half written.

    Args:
      folder: the folder of the steps.
      name: the folder as the message names it.
      step: the step being written.
    """
    try:
        yield
    except (NotADirectoryError, SaveError):
        raise
    except (OSError, ValueError, RuntimeError) as error:
        steps = step_folders(folder) if folder.exists() else []
        whole = [s for s in steps if damage(folder / str(s), deep=False) is None]
        kept = f"step {whole[0]} is the newest whole one" if whole else "there is no whole one yet"
        space = free_space(name)
        _drop_partial(folder, step)
        raise SaveError(
            f"cannot write checkpoint {step} in {name}: {error_reason(error)}{space}; {kept}. Free space on "
            "this disk or make it writable, then rerun the command to resume."
        ) from error


def step_folders(folder: epath.Path) -> list[int]:
    """Steps that have a folder, newest first."""
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def _drop_partial(folder: epath.Path, step: int | None) -> None:
    """Removes the files of a failed save, which take the space that the next one needs."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(f"{step}.orbax-checkpoint-tmp"):
                path.rmtree()


class _NoOrbax(std_logging.Filter):
    """Hides messages of Orbax, and of asyncio about writes that Orbax has abandoned; their errors are raised here."""

    def filter(self, record: std_logging.LogRecord) -> bool:
        if record.name != "asyncio":
            return "/orbax/" not in record.pathname
        # a traceback of Orbax's writer, or an error of TensorStore, which Orbax awaits
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += "".join(traceback.format_exception(record.exc_info[1]))
        return not any(word in text for word in ("/orbax/", ".orbax-checkpoint-tmp", "tensorstore"))


def hide_orbax() -> None:
    """Keeps messages of Orbax, and of the writes that it abandons with a failed save, off the terminal.

    Orbax stops at the first write that fails and closes its event loop. The others then fail without a reader: asyncio
    reports them when they are garbage-collected, at the end of the program at the latest, and TensorStore reports that
    the loop is closed. Writes that had not begun are coroutines that nobody awaits, of which Python warns.
    """
    if any(isinstance(known, _NoOrbax) for known in logging.get_absl_logger().filters):
        return
    for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
        logger.addFilter(_NoOrbax())
    warnings.filterwarnings("ignore", _UNBEGUN, RuntimeWarning)
    hook = sys.unraisablehook

    def quiet(report: "sys.UnraisableHookArgs") -> None:
        error, text = report.exc_value, str(report.exc_value)
        closed = isinstance(error, RuntimeError) and text == "Event loop is closed"
        # where warnings are errors
        unbegun = isinstance(error, RuntimeWarning) and re.match(_UNBEGUN, text)
        if not (closed or unbegun):
            hook(report)

    sys.unraisablehook = quiet
