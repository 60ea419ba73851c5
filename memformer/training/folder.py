"""The folder of a run: its config, and what a restart of the run changes."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from memformer.training.config import RunError, complete_config, run_errors
from memformer.training.distributed import agree
from memformer.training.files import check_folder, disk_errors, replace_file

__all__ = [
    "FREE_KEYS",
    "changed_keys",
    "describe_changes",
    "make_folder",
    "read_run_config",
    "schedule_steps",
    "write_run_config",
]

CONFIG = "config.json"

# A resumed run may change these. Only schedule_steps, mesh and max_skips affect its results: the learning rate, the
# rounding of sums, the step at which a run of skipped steps stops.
FREE_KEYS = (
    "train.steps",
    "optimizer.schedule_steps",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.final_lengths",
    "train.final_batches",
    "train.profile",
    "train.compile_cache",
    "train.input_workers",
    "train.progress",
    "train.tensorboard",
    "train.wandb",
    "train.max_skips",
    # a record of what is in the stores must stay the same
    "data.path",
    "checkpoint",
    "mesh",
)


def make_folder(folder: str) -> None:
    """Creates the run's folder; raises RunError if that is impossible."""
    check_folder(folder)
    if jax.process_index():
        return
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run's folder {folder}: {error.strerror}; choose another --workdir.") from error


def read_run_config(folder: str) -> dict[str, Any] | None:
    """Returns the config of the run in `folder`, or None if there is none yet.

    Raises:
      RunError: a file that cannot be read.
    """
    path = os.path.join(folder, CONFIG)
    with run_errors(f"{path} must be the config of the run in this folder, and cannot be read"):
        if not epath.Path(path).exists():
            return None
        return complete_config(json.loads(epath.Path(path).read_text())).to_dict()


def check_same_config(folder: str, old: Mapping[str, Any] | None) -> None:
    """Checks under the run's lock that the folder's config is still `old`, which was read before the lock was taken.

    Raises:
      RunError: another trainer has used the folder in between.
    """
    changed = False
    if jax.process_index() == 0:
        try:
            changed = read_run_config(folder) != old
        except RunError:
            # the other processes wait in `agree`
            changed = True
    if agree(int(changed)):
        raise RunError(f"another trainer wrote to {folder} while this one started; run the command again.")


def schedule_steps(config: Mapping[str, Any], old: Mapping[str, Any] | None) -> int:
    """The horizon of the learning-rate schedule: as configured, else that of the run's first start.

    Example:
      >>> new = {"optimizer": {"schedule_steps": None}, "train": {"steps": 200}}
      >>> schedule_steps(new, None), schedule_steps(new, {**new, "train": {"steps": 100}})
      (200, 100)
    """
    started = config if old is None else old
    return config["optimizer"]["schedule_steps"] or started["optimizer"]["schedule_steps"] or started["train"]["steps"]


def write_run_config(folder: str, old: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
    """Records the config of a run in its folder.

    Raises:
      RunError: the folder holds a run of another config, or cannot be written.
    """
    changed = [] if old is None else changed_keys(old, config, free=FREE_KEYS)
    if changed:
        was = ", ".join(f"{key} ({_at(old, key)} there, {_at(config, key)} now)" for key in changed[:4])
        raise RunError(
            f"{folder} holds a run of another config: {was} differ{'' if len(changed) > 1 else 's'}. Give the same "
            "config to resume that run, or another --workdir."
        )
    if jax.process_index() == 0:
        path = os.path.join(folder, CONFIG)
        with disk_errors(path), replace_file(path) as file:
            json.dump(config, file, indent=2)


def changed_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "", *, free: Sequence[str] = ()
) -> list[str]:
    """Dotted keys whose values differ, without those of `free`.

    Example:
      >>> changed_keys({"seed": 0, "train": {"steps": 5}}, {"seed": 1, "train": {"steps": 9}}, free=FREE_KEYS)
      ['seed']
    """
    changed = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        if path in free:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_keys(a, b, f"{path}.", free=free)
        elif _plain(a) != _plain(b):
            changed.append(path)
    return changed


def _plain(value: Any) -> Any:
    # JSON has lists only
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def describe_changes(old: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Sentences on the keys that differ from the last start of the run.

    Example:
      >>> old = {"optimizer": {"schedule_steps": 4}, "train": {"steps": 4}}
      >>> for line in describe_changes(old, {**old, "train": {"steps": 8}}):
      ...     print(line)
      changed since the last start: train.steps 4 -> 8
      the learning rate stays at its value of step 4: optimizer.schedule_steps is 4
    """
    changed = changed_keys(old, config)
    if not changed:
        return []
    lines = ["changed since the last start: " + ", ".join(f"{k} {_at(old, k)} -> {_at(config, k)}" for k in changed)]
    horizon, steps = config["optimizer"]["schedule_steps"], config["train"]["steps"]
    schedule = config["optimizer"].get("schedule", "cosine")
    if "train.steps" in changed and steps > horizon and schedule in ("cosine", "warmup_stable_decay"):
        lines.append(f"the learning rate stays at its value of step {horizon}: optimizer.schedule_steps is {horizon}")
    return lines


def _at(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
