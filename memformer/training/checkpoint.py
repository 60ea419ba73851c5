"""Checkpoints of a run: one wrapper over Orbax's CheckpointManager.

A step folder holds five items: `state` (the arrays), `arrays` (their paths, shapes and dtypes), `data` (position of
the input), `config` and `metrics`; and a list of checksums, written last, before the folder gets its final name.
Orbax alone casts a wrong dtype silently, loads corrupted arrays, takes an empty folder for the latest step and does
not fall back from a damaged one: here every step is checked before it is read.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from memformer.training.checksums import EMPTY, JSON_ITEMS, StateHandler, damage
from memformer.training.distributed import agree, first_text
from memformer.training.files import is_url
from memformer.training.orbax_errors import SaveError, hide_orbax, save_errors, step_folders
from memformer.training.paths import abstract, describe, difference, flatten, nest
from memformer.training.remote import Mirror

__all__ = ["Checkpoints", "Restored"]

PyTree = Any


hide_orbax()


@dataclasses.dataclass(frozen=True)
class Restored:
    """Content of a checkpoint.

    Attributes:
      step: number of steps taken.
      state: pytree of arrays, with the structure and shardings of the target.
      data: position of the input and state of the run.
      config: the run's config.
      metrics: the metrics given to `save`.
    """

    step: int
    state: PyTree
    data: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float]


class Checkpoints:
    """Saves and restores the steps of one run.

    Saving is asynchronous: `save` returns once the arrays are copied off the devices. A step folder gets its final name
    only when it is complete, so a kill at any moment leaves the last complete step. With several processes, every
    process calls every method.

    Restoring without a step takes the newest step whose files are whole, and logs a warning for each damaged one that
    it skips; a step given by number is restored or is an error. The next `save` renames damaged folders to
    `<step>.damaged`.

    Args:
      folder: path or URL; created by the first `save`. Behind URLs other than gs://, saving is synchronous.
      keep_last: number of newest steps to keep, at least 1.
      keep_best: number of further steps to keep, by their metric; 0 for none.
      best_metric: name in `metrics`; NaN is the worst value.
      best_mode: "min" or "max".

    Raises:
      ValueError: an argument out of its range.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> state = {"params": {"w": jnp.arange(3.0)}}
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     saved = checkpoints.save(10, state, data={"position": 320}, config={}, metrics={"loss": 0.5})
      ...     restored = checkpoints.restore(jax.eval_shape(lambda: state))
      >>> restored.step, restored.state["params"]["w"].tolist(), restored.data
      (10, [0.0, 1.0, 2.0], {'position': 320})
    """

    def __init__(
        self,
        folder: str | epath.PathLike,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        best_metric: str = "loss",
        best_mode: str = "min",
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be >= 1 and keep_best >= 0, got {keep_last} and {keep_best}")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {best_mode!r}")
        self._path = epath.Path(folder) if is_url(str(folder)) else epath.Path(folder).absolute()
        # the folder as messages name it
        self.name = str(folder) if is_url(str(folder)) else str(self._path)
        self._mirror: Mirror | None = None
        self._keep = (keep_last, keep_best)
        self._best = (best_metric, best_mode)
        self._manager: ocp.CheckpointManager | None = None
        self._current: int | None = None
        # the step of the save in progress
        self._writing: int | None = None
        self._whole: set[int] = set()
        self._damaged: dict[int, str] = {}
        self._warned: set[int] = set()

    @property
    def folder(self) -> epath.Path:
        """The folder of the steps; the local copy of one behind a URL that Orbax cannot write."""
        if not is_url(self.name) or self.name.startswith("gs://"):
            return self._path
        if self._mirror is None:
            if jax.process_count() > 1:
                raise ValueError(
                    f"{self.name} cannot hold checkpoints of several processes: use gs:// or a shared disk."
                )
            self._mirror = Mirror(self._path)
        return self._mirror.folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
        # the first error says what to do; one of the save in progress would hide it
        with contextlib.suppress(*(() if kind is None else (SaveError,))):
            self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> bool:
        """Starts saving a step; waits for the previous save first.

        Args:
          step: number of steps taken, larger than every step in the folder.
          state: pytree of jax arrays, including typed PRNG keys.
          data: small dict that JSON can represent.
          config: dict that JSON can represent.
          metrics: name -> number; includes `best_metric`, unless empty.

        Returns:
          False if this step was the last one saved or restored: there is nothing to save.

        Raises:
          ValueError: a leaf that is not a jax array, data that JSON cannot represent, or a folder that already
            holds this step or a later one.
          SaveError: the disk is full or cannot be written, now or during the previous save.
        """
        if step == self._current:
            return False
        flat = flatten(state)
        for path, leaf in flat.items():
            if not isinstance(leaf, jax.Array) or leaf.size == 0:
                kind = "one without elements" if isinstance(leaf, jax.Array) else type(leaf).__name__
                raise ValueError(f"state must hold only jax arrays, got {kind} at {'/'.join(path)}")
        metrics = {name: float(value) for name, value in metrics.items()}
        if metrics and self._keep[1] and self._best[0] not in metrics:
            raise ValueError(f"metrics must have {self._best[0]!r}, which ranks the best steps, got {sorted(metrics)}")
        items = {
            name: ocp.args.JsonSave(_jsonable(name, item))
            for name, item in (("arrays", describe(flat)), ("data", data), ("config", config))
        }
        self.wait()
        with self._save_errors(step):
            manager = self._open()
        newest = manager.latest_step()
        if newest is not None and newest >= step:
            raise ValueError(
                f"step {step} cannot be saved: {self.name} already holds step {newest}. Continue from that step, "
                "or write to another folder."
            )
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(nest(flat)), **items)
        with self._save_errors(step):
            manager.save(step, args=arguments, metrics=metrics, force=True)
            self._writing = step
            if self._mirror is not None:
                manager.wait_until_finished()
                self._mirror.push()
        self._current = step
        return True

    def _save_errors(self, step: int | None) -> contextlib.AbstractContextManager[None]:
        return save_errors(self.folder, self.name, step)

    def restore(self, target: PyTree, step: int | None = None) -> Restored:
        """Restores a whole train state.

        Args:
          target: pytree of `jax.ShapeDtypeStruct` (or arrays); their shardings are those of the result, on
            any mesh; without one, the first device.
          step: None for the newest whole step.

        Raises:
          FileNotFoundError: no such folder, no such step, or no step at all.
          NotADirectoryError: the path is a file.
          ValueError: damaged, or the checkpoint of another model (paths, shapes or dtypes differ).
        """
        step = self._choose(step)
        state = self._read_state(step, target, whole=True)
        self._current = step
        data, config, metrics = (self._read_json(step, name) for name in ("data", "config", "metrics"))
        return Restored(step, state, data, config, metrics)

    def restore_parts(self, target: Mapping[str, PyTree], step: int | None = None) -> dict[str, PyTree]:
        """Restores only some top-level entries of the state; arguments and errors as in `restore`."""
        return self._read_state(self._choose(step), dict(target), whole=False)

    def restore_params(self, target: PyTree, step: int | None = None) -> PyTree:
        """Restores only "params"; arguments and errors as in `restore`."""
        return self.restore_parts({"params": target}, step)["params"]

    def config(self, step: int | None = None) -> dict[str, Any]:
        """Returns the config saved with a step; argument and errors as in `restore`."""
        return self._read_json(self._choose(step), "config")

    def latest_step(self) -> int | None:
        """Returns the newest whole step; None if nothing was saved yet.

        Raises:
          NotADirectoryError: the path is a file.
          ValueError: there are steps, and all of them are damaged.
        """
        self.wait()
        return self._newest() if self.folder.exists() else None

    def wait(self) -> None:
        """Waits for the save in progress; raises SaveError if it failed."""
        if self._manager is not None:
            with self._save_errors(self._writing):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and stops Orbax's threads; raises SaveError if the save failed."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._save_errors(self._writing):
                manager.close()
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, created at the first save: it must not see damaged folders, nor create one for reading."""
        if self._manager is not None and not self._damaged:
            return self._manager
        self.close()
        if jax.process_index() == 0 and self.folder.exists():
            self._set_aside()
        self._damaged = {}
        agree(0)
        keep_last, keep_best = self._keep
        policies: list[Any] = [preservation_policy.LatestN(keep_last)]
        if keep_best:
            reverse = self._best[1] == "min"
            policies.append(preservation_policy.BestN(get_metric_fn=self._score, reverse=reverse, n=keep_best))
        options = ocp.CheckpointManagerOptions(
            best_fn=self._score,
            best_mode=self._best[1],
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in JSON_ITEMS:
            handler = (
                ocp.JsonCheckpointHandler(filename="metrics") if name == "metrics" else ocp.JsonCheckpointHandler()
            )
            registry.add(name, ocp.args.JsonSave, handler)
            registry.add(name, ocp.args.JsonRestore, handler)
        # the last item is finalized last: its checksums cover the others
        registry.add("state", ocp.args.PyTreeSave, StateHandler())
        self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=registry)
        return self._manager

    def _score(self, metrics: Mapping[str, float]) -> float:
        worst = float("inf") if self._best[1] == "min" else float("-inf")
        value = metrics.get(self._best[0], worst)
        return worst if np.isnan(value) else value

    def _set_aside(self) -> None:
        for step in self._steps():
            reason = self._damaged.get(step) or damage(self.folder / str(step), deep=False)
            if reason is None:
                continue
            aside, count = self.folder / f"{step}.damaged", 1
            while aside.exists():
                aside, count = self.folder / f"{step}.damaged{count}", count + 1
            (self.folder / str(step)).rename(aside)
            logging.warning("Checkpoint %d in %s %s: renamed to %s.", step, self.name, reason, aside.name)

    def _steps(self) -> list[int]:
        """Steps that have a folder, newest first."""
        if not self.folder.exists():
            raise FileNotFoundError(
                f"no checkpoints in {self.name}: there is no such folder. Give the folder that a run wrote to."
            )
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.name} must be a folder of checkpoints, and is a file.")
        return step_folders(self.folder)

    def _choose(self, step: int | None) -> int:
        self.wait()
        if step is None:
            newest = self._newest()
            if newest is None:
                raise FileNotFoundError(
                    f"no checkpoints in {self.name}: the folder has no step in it. Give the folder that a run wrote "
                    "to, or train first."
                )
            return newest
        steps = self._steps()
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.name}: its steps are {steps[::-1]}.")
        reason = self._inspect(step)
        if reason is not None:
            raise ValueError(
                f"checkpoint {step} in {self.name} {reason}. Give another step of {steps[::-1]}, or none for the "
                "newest whole one."
            )
        return step

    def _newest(self) -> int | None:
        """Finds the newest whole step among those that process 0 sees; all processes check them together."""
        steps = self._steps()
        skipped: dict[int, str] = {}
        for i in range(agree(len(steps))):
            step = agree(steps[i] if i < len(steps) else -1)
            reason = self._inspect(step)
            if reason is None:
                break
            skipped[step] = reason
        else:
            step = -1
        for damaged in skipped.keys() - self._warned:
            logging.warning("Checkpoint %d in %s %s: skipped.", damaged, self.name, skipped[damaged])
        self._warned |= skipped.keys()
        if step >= 0:
            return step
        lost = {step: reason for step, reason in skipped.items() if reason != EMPTY}
        if not lost:
            return None
        raise ValueError(
            f"no checkpoint in {self.name} can be restored: "
            + "; ".join(f"{step} {reason}" for step, reason in lost.items())
            + ". Restore one from a copy, or move them away to start anew."
        )

    def _inspect(self, step: int) -> str | None:
        """Damage of a step's files, or None; all processes together read each step once per `Checkpoints` object."""
        if step in self._whole:
            return None
        share = (jax.process_index(), jax.process_count())
        reason = first_text(damage(self.folder / str(step), True, share))
        if reason is None:
            self._whole.add(step)
        else:
            self._damaged[step] = reason
        return reason

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        name = "metrics" if item == "metrics" else "metadata"
        return json.loads((self.folder / str(step) / item / name).read_text())

    def _read_state(self, step: int, target: PyTree, whole: bool) -> PyTree:
        wanted = {path: abstract(leaf) for path, leaf in flatten(target).items()}
        saved = self._read_json(step, "arrays")
        if not whole:
            parts = {path[0] for path in wanted}
            saved = {name: shape for name, shape in saved.items() if name.split("/")[0] in parts}
        expected = describe(wanted)
        if saved != expected:
            raise ValueError(
                f"checkpoint of another model: step {step} in {self.name} does not fit what this config builds. "
                f"{difference(saved, expected)}. Restore it with the config saved beside it, or give this model "
                "another folder."
            )
        nested = nest(wanted)
        arguments = ocp.args.PyTreeRestore(
            nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=not whole
        )
        restored = ocp.PyTreeCheckpointHandler().restore(self.folder / str(step) / "state", args=arguments)
        flat = flatten(restored)
        return jax.tree.unflatten(jax.tree.structure(target), [flat[path] for path in wanted])


def _jsonable(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"{name} must be a dict that JSON can represent: {error}") from error
