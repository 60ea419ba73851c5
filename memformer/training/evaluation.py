"""Scores a model on any split, length or variant of a task, from a run or from its checkpoint alone."""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from memformer.data.source import SPLITS
from memformer.pretrained import Student
from memformer.tasks import Task
from memformer.training.build import Run, build_run
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import RunError, complete_config, run_errors, set_values, task_of
from memformer.training.files import check_folder, check_out, is_url, replace_file
from memformer.training.input import batch_shapes, make_loader
from memformer.training.losses import means
from memformer.training.metrics import format_table, log, model_name
from memformer.training.plots import plot_lengths
from memformer.training.sharding import batch_layout, count_slices, mesh_scope
from memformer.training.step import Arrays, Functional, abstract_state, make_eval_step

__all__ = [
    "LoadedRun",
    "Scorer",
    "evaluate_checkpoint",
    "fits_model",
    "load_run",
    "parameters_of",
    "score_batches",
    "score_split",
]


# A trainer that is running may delete the step that is being read; so often another one is tried.
ATTEMPTS = 5


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores parameters on held-out examples, the same ones in every call.

    Attributes:
      step: from `make_eval_step`.
      mesh: the mesh of `step`.
      batch_size: rows per batch.
      seed: seed of the sources.
    """

    step: Callable[..., Arrays]
    mesh: Mesh
    batch_size: int
    seed: int

    def __call__(
        self, parameters: tuple[Arrays, Arrays], task: Task, *, split: str = "validation", batches: int
    ) -> dict[str, float]:
        """Loss and the task's scores over `batches` batches of `split`; 0 scores each of its examples once."""
        step = functools.partial(self.step, *parameters)
        fetched = score_split(step, self.mesh, task, split, batch_size=self.batch_size, seed=self.seed, batches=batches)
        total = {name: math.fsum(float(part[name]) for part in fetched) for name in fetched[0]}
        return means(total, task.scores, task.bytes_per_step(split))


def score_split(
    step: Callable[[Any], Any], mesh: Mesh, task: Task, split: str, *, batch_size: int, seed: int, batches: int
) -> list[Any]:
    """`score_batches` of the examples of a split; 0 batches take each of its examples once.

    Args:
      step: compiled, from a batch that lies on the mesh.
      mesh: of the step.
      task, split, batch_size, seed: of the batches.
      batches: how many.
    """
    layout = batch_layout(batch_shapes(task, batch_size), mesh)
    loader = make_loader(
        task, split, batch_size=batch_size, seed=seed, rows=layout.rows, place=layout.place, repeat=batches > 0
    )
    with mesh_scope(mesh):
        results = score_batches(step, loader, batches)
    loader.close()
    return results


def score_batches(step: Callable[[Any], Any], loader: Iterable[Any], batches: int) -> list[Any]:
    """The results of a compiled step on each of `batches` batches, fetched; 0 takes all that the loader has.

    Two steps at most are under way. They do not depend on each other, and on CPU many of them in several processes wait
    for each other's collectives forever.

    Example:
      >>> score_batches(lambda batch: 2 * batch, iter([1, 2, 3]), 2)
      [2, 4]
    """
    results: list[Any] = []
    for batch in itertools.islice(loader, batches or None):
        jax.block_until_ready(results[-2:-1])
        results.append(step(batch))
    return jax.device_get(results)


def parameters_of(state: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """The parameters that evaluation uses (averaged if the run averages them), and the other variables."""
    if "ema" not in state:
        return state["params"], state.get("rest", {})
    averaged = {name: x.astype(state["params"][name].dtype) for name, x in state["ema"].items()}
    return {**state["params"], **averaged}, state.get("rest", {})


def fits_model(task: Task, trained: Task) -> None:
    """Raises RunError unless a model trained on `trained` has the inputs and outputs of `task`."""
    for name in ("vocab_size", "num_classes", "features"):
        want, given = getattr(trained, name), getattr(task, name)
        if want != given:
            raise RunError(
                f"the checkpoint's model was built for {name} = {want}, but this task has {given}; "
                "evaluate a variant with the same value, or train on that task."
            )


def evaluate_checkpoint(
    workdir: str,
    *,
    step: int | None = None,
    split: str = "test",
    lengths: Sequence[int | str] | None = None,
    batches: int = 16,
    batch_size: int | None = None,
    settings: Sequence[str] = (),
    out: str | None = None,
) -> dict[str, Any]:
    """Rebuilds a model from its run folder alone and scores it; writes a JSON and a plot there.

    Args:
      workdir: folder of a run, with its checkpoints.
      step: step of the checkpoint; None for the newest that restores.
      split: "train", "validation" or "test".
      lengths: task lengths to evaluate; None for the task's own list, or else its length.
      batches: batches per length; 0 scores each example of a stored split once.
      batch_size: rows per batch; None for that of the run.
      settings: changes to the run's config, such as "task.objects=5", "mesh.data=1".
      out: JSON file to write; None for <workdir>/eval_<split>.json. The plot has the same name with .png.

    Returns:
      The content of the JSON file: step, split, task and the scores by length.

    Raises:
      RunError: a missing or damaged checkpoint, a task the model cannot read, an unknown key or split, an `out` that
        cannot be written.
    """
    if split not in SPLITS:
        raise RunError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}.")
    if jax.process_index() == 0:
        check_out(out)
    loaded = load_run(workdir, step=step, settings=settings, batch_size=batch_size)
    config, run, task = loaded.config, loaded.run, loaded.task
    scorer = Scorer(make_eval_step(run.model, run.mesh), run.mesh, config["train"]["batch_size"], config["seed"])
    curriculum, trained = config["train"]["curriculum"], loaded.trained.length
    trained_on = (curriculum["start"], curriculum["stop"]) if curriculum["enabled"] else (trained,)
    visited = _lengths(task, lengths)
    scores = {}
    for length, variant in visited.items():
        log(f"length {length}: {batches or 'all'} batches of {scorer.batch_size}")
        with run_errors("--batches" if not batches else "the data"):
            scores[length] = scorer(loaded.weights, variant, split=split, batches=batches)
    result = {
        "checkpoint": workdir if is_url(workdir) else os.path.abspath(workdir),
        "step": loaded.step,
        "split": split,
        "task": config["task"],
        "memory": model_name(config["model"]),
        "examples": batches * scorer.batch_size or "all",
        "lengths": {str(length): values for length, values in scores.items()},
    }
    _write(result, scores, visited, trained_on, out or os.path.join(workdir, f"eval_{split}.json"))
    return result


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run read back from its folder.

    Attributes:
      folder: the run's folder.
      step: step of the checkpoint.
      config: the run's config with the changes requested.
      run: task (as requested), mesh and model, without arrays.
      trained: the task of training.
      weights: parameters of the checkpoint (averaged if the run averages them), and other variables.
    """

    folder: str
    step: int
    config: dict[str, Any]
    run: Run
    trained: Task
    weights: tuple[Arrays, Arrays]

    @property
    def task(self) -> Task:
        """The task to evaluate."""
        return self.run.task

    @property
    def model(self) -> Functional:
        """The model as pure functions."""
        return self.run.model

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's result.json, or None if the run has not ended."""
        path = epath.Path(os.path.join(self.folder, "result.json"))
        return json.loads(path.read_text()) if path.exists() else None

    def module(self) -> nnx.Module:
        """The model with its parameters, ready to call; dropout is off."""
        module = self.model.module(*self.weights, jax.random.key(0))
        module.eval()
        if isinstance(module, Student):
            module.release()
        return module


def load_run(
    workdir: str, *, step: int | None = None, settings: Sequence[str] = (), batch_size: int | None = None
) -> LoadedRun:
    """Rebuilds the model of a run from its folder alone.

    Args:
      workdir: folder of a run, with its checkpoints.
      step: step of the checkpoint; None for the newest that restores.
      settings: changes to the run's config, such as "task.objects=5", "mesh.data=1".
      batch_size: rows per batch; None for that of the run.

    Raises:
      RunError: a missing or damaged checkpoint, a task the model cannot read, an unknown key.
    """
    check_folder(workdir)
    folder = os.path.join(workdir, "checkpoints")
    if not epath.Path(folder).is_dir():
        raise RunError(
            f"no checkpoint to evaluate: there is no folder {folder}. --workdir must name the folder of a run that "
            "train.py has saved."
        )
    for attempt in range(1, ATTEMPTS + 1):
        steps = _steps(folder)
        try:
            with Checkpoints(folder) as checkpoints, run_errors(f"cannot read the checkpoint in {folder}"):
                chosen = checkpoints.latest_step() if step is None else step
                if chosen is None:
                    raise RunError(f"no checkpoint to evaluate: {folder} holds no step.")
                return _load(workdir, checkpoints, chosen, settings, batch_size)
        except RunError as error:
            # a running trainer saves new steps and deletes old ones; several processes cannot retry independently
            deleted = steps - _steps(folder)
            if not deleted or jax.process_count() > 1 or (step is not None and step not in deleted):
                raise
            if step is not None or attempt == ATTEMPTS:
                raise RunError(
                    f"a running trainer deleted step {step or max(deleted)} in {folder} while it was read: copy the "
                    "step folder first, or raise --config.checkpoint.keep_last of that run."
                ) from error
    raise RunError(f"no checkpoint to evaluate in {folder}.")


def _steps(folder: str) -> set[int]:
    return {int(path.name) for path in epath.Path(folder).iterdir() if path.name.isdecimal()}


def _load(
    workdir: str, checkpoints: Checkpoints, step: int, settings: Sequence[str], batch_size: int | None
) -> LoadedRun:
    saved = checkpoints.config(step)
    config = complete_config(saved)
    # evaluation may run on other devices than training
    config.mesh = {"data": count_slices(), "fsdp": -1, "expert": 1, "context": 1, "tensor": 1, "slices": 0}
    set_values(config, settings)
    config.train.batch_size = batch_size or config.train.batch_size
    config = config.to_dict()
    config["train"]["accumulate"] = 1
    trained = task_of(saved)
    with run_errors("--set"):
        task = task_of(config)
    fits_model(task, trained)
    run = build_run({**config, "task": saved["task"], "data": saved.get("data", {})}, task=task)
    with mesh_scope(run.mesh):
        target = abstract_state(run.model, run.tx, run.mesh, config["optimizer"]["ema"])
        wanted: dict[str, Any] = {name: target[name] for name in ("params", "rest", "ema") if name in target}
        with run_errors(f"cannot restore the checkpoint in {checkpoints.folder}"):
            state = checkpoints.restore_parts(wanted, step)
    return LoadedRun(workdir, step, config, run, trained, parameters_of(state))


def _lengths(task: Task, lengths: Sequence[int | str] | None) -> dict[int, Task]:
    chosen = lengths or task.eval_lengths or (task.length,)
    for length in chosen:
        if not str(length).isdecimal():
            raise RunError(f"--lengths must be whole numbers separated by commas, such as 16,64, got {length!r}.")
    with run_errors("--lengths"):
        return {int(length): task.with_length(int(length)) for length in chosen}


def _write(result: dict, scores: dict, visited: Mapping[int, Task], trained_on: Sequence[int], out: str) -> None:
    names = list(next(iter(scores.values())))
    rows = [(n, *(format_score(name, values[name]) for name in names)) for n, values in scores.items()]
    log(f"{result['memory']} on {result['task']['name']}, {result['split']} split, step {result['step']}")
    log(format_table(("length", *names), rows))
    if jax.process_index():
        return
    with replace_file(out) as file:
        json.dump(result, file, indent=2)
    if len(scores) > 1 and "accuracy" in names:
        plot_lengths(
            {result["memory"]: {n: values["accuracy"] for n, values in scores.items()}},
            os.path.splitext(out)[0] + ".png",
            title=f"{result['memory']} on {result['task']['name']}",
            chance={n: task.chance for n, task in visited.items() if task.chance is not None},
            trained=trained_on,
        )


def format_score(name: str, value: float) -> str:
    """Formats a score for tables.

    Example:
      >>> format_score("accuracy", 0.9973), format_score("loss", 0.0123)
      ('99.7%', '0.0123')
    """
    if np.isnan(value):
        return "nan"
    return f"{100 * value:.1f}%" if name.endswith("accuracy") else f"{value:.4f}"
