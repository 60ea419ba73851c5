"""Trackers: where the numbers of a run go beside its metrics.jsonl: TensorBoard, Weights & Biases, or one's own."""

import importlib
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from memformer.training.config import RunError
from memformer.training.files import disk_errors, is_url
from memformer.training.metrics import Tracker, log

__all__ = ["EventFile", "WandbRun", "make_trackers"]

# Holds the id of a run at Weights & Biases, which a resumed run continues.
WANDB_ID = "wandb_id"


class EventFile:
    """TensorBoard's event file, written in the caller's thread.

    tensorboardX writes in a thread of its own: an error of the disk ends that thread, and the run blocks on its queue.
    """

    def __init__(self, folder: str, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        os.makedirs(folder, exist_ok=True)
        self._event = Event
        self._file = EventsWriter(os.path.join(folder, "events"))
        # hides what an earlier part of the run wrote from this step on
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Adds the numbers of one record."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandbRun:
    """A run at Weights & Biases, which a resumed run continues.

    WANDB_MODE=offline and the other settings of the environment apply.

    Args:
      folder: the run's folder.
      project: the project's name.
      config: shown with the run.

    Raises:
      RunError: the package wandb is not installed.
    """

    def __init__(self, folder: str, project: str, config: Mapping[str, Any]):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise RunError(
                "config.train.wandb needs the package wandb, which is not installed: pip install wandb, or leave "
                "train.wandb empty."
            ) from error
        file = epath.Path(folder) / WANDB_ID
        with disk_errors(str(file)):
            if not file.exists():
                file.write_text(secrets.token_hex(4))
            name = file.read_text().strip()
        own = None if is_url(folder) else folder
        self._run = wandb.init(project=project, id=name, resume="allow", dir=own, config=dict(config))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Adds the numbers of one record."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Uploads the rest."""
        self._run.finish()


def make_trackers(folder: str, step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run's config: TensorBoard with train.tensorboard, Weights & Biases with train.wandb.

    Args:
      folder: the run's folder.
      step: the step the run resumes from.
      config: the run's config.

    Raises:
      RunError: a package that is not installed, or a disk that cannot be written.
    """
    found: list[Tracker] = []
    if jax.process_index():
        return found
    if config["train"]["tensorboard"] and is_url(folder):
        log(f"no TensorBoard files: they need a local --workdir; the same values are in {folder}/metrics.jsonl")
    elif config["train"]["tensorboard"]:
        with disk_errors(os.path.join(folder, "tensorboard")):
            found.append(EventFile(os.path.join(folder, "tensorboard"), step + 1))
    if config["train"]["wandb"]:
        found.append(WandbRun(folder, config["train"]["wandb"], config))
    return found
