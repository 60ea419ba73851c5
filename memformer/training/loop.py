"""The training loop: steps, records, evaluations, checkpoints, and resuming a run."""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from memformer.training.build import Run, build_run
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import complete_config, run_errors
from memformer.training.curriculum import Curriculum
from memformer.training.distill import start_student
from memformer.training.evaluation import Scorer, format_score, parameters_of
from memformer.training.files import check_folder, disk_errors, is_url
from memformer.training.folder import (
    check_same_config,
    describe_changes,
    make_folder,
    read_run_config,
    schedule_steps,
    write_run_config,
)
from memformer.training.guards import FiniteGuard, NotFiniteError
from memformer.training.initial import start_from
from memformer.training.input import Loader, batch_shapes, check_split, make_loader
from memformer.training.lock import run_lock
from memformer.training.losses import means
from memformer.training.metrics import RunLog, Tracker, flops_per_token, log, looked_up, model_name, peak_flops
from memformer.training.orbax_errors import SaveError
from memformer.training.profiling import Profiler
from memformer.training.report import draw_curve, final_scores, write_report
from memformer.training.sharding import batch_layout, mesh_scope
from memformer.training.signals import StopSignal
from memformer.training.step import abstract_state, init_state, make_eval_step, make_train_step
from memformer.training.trackers import make_trackers

__all__ = ["Trainer", "train"]

# options with the number of batches of a held-out split; 0 scores all of it
BATCHES = {"validation": "eval_batches", "test": "final_batches"}


def train(config: Mapping[str, Any], workdir: str = "", *, trackers: Sequence[Tracker] = ()) -> dict[str, Any]:
    """Trains the model of a config, or resumes the run of this config in `workdir`.

    A run that is killed and restarted with the same config, number of processes and mesh ends with the same bits as an
    uninterrupted one; under another layout it agrees to rounding. The folder then holds config.json, metrics.jsonl,
    tensorboard/, checkpoints/, curve.png, result.json.

    Args:
      config: nested dicts with the sections of `default_config`.
      workdir: the run's folder; "" is runs/<task>-<memory>, or runs/<task>-<type> for models other than memory_lm.
      trackers: receive the numbers of the run beside those of the config.

    Returns:
      The content of result.json: last step, scores by length, and whether the run finished.

    Raises:
      RunError: a config, folder, data or checkpoint that cannot be used, another trainer in the folder, a disk that
        cannot be written, or a loss that is not finite.
    """
    plain = complete_config(config).to_dict()
    if plain["train"]["compile_cache"]:
        jax.config.update("jax_compilation_cache_dir", plain["train"]["compile_cache"])
        # keep every program: a limit in seconds would depend on the speed of the machine
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    name = model_name(plain["model"]).replace(", ", "-").replace(",", "-")
    folder = workdir or os.path.join("runs", f"{plain['task']['name']}-{name}")
    check_folder(folder)
    old = read_run_config(folder)
    plain["optimizer"]["schedule_steps"] = schedule_steps(plain, old)
    run = build_run(plain)
    make_folder(folder)
    with run_lock(folder), mesh_scope(run.mesh):
        check_same_config(folder, old)
        write_run_config(folder, old, run.config)
        _write_files(run, folder)
        changes = [] if old is None else describe_changes(old, run.config)
        return Trainer(run, folder, trackers).train(changes)


def _write_files(run: Run, folder: str) -> None:
    # elsewhere the store itself has them
    if jax.process_index() == 0 and not is_url(folder):
        with disk_errors(folder):
            run.task.write_files(folder)


def _layout_change(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    if old is None or old == new:
        return []
    changed = ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name])
    return [f"another layout than that of the checkpoint ({changed}): results agree to rounding, not bit for bit"]


class Trainer:
    """One run: its state, input and records.

    Args:
      run: from `build_run`.
      folder: the run's folder; it may hold an earlier part of the run.
      trackers: receive the numbers of the run beside those of the config.
    """

    def __init__(self, run: Run, folder: str, trackers: Sequence[Tracker] = ()):
        self._own_trackers = trackers
        self._run, self._folder, self._options = run, folder, run.config["train"]
        self._ema = run.config["optimizer"]["ema"]
        with run_errors("config.train.curriculum"):
            self._curriculum = Curriculum(run.task, self._options["curriculum"])
        keep = run.config["checkpoint"]
        self._checkpoints = Checkpoints(os.path.join(folder, "checkpoints"), **keep)
        scorer = make_eval_step(run.model, run.mesh)
        self._score = Scorer(scorer, run.mesh, self._options["batch_size"], run.config["seed"])
        self._solved, self._evaluated = False, -1
        with run_errors("config.data"):
            self._bytes_per_step = run.task.bytes_per_step("train")
        self._guard = FiniteGuard(self._options)
        self._profiler = Profiler(folder, self._options["profile"])
        self._held_out: dict[str, float] = {}
        self._step = 0
        # the newest step on disk, or on its way there
        self._saved: int | None = None
        self._first = True

    def train(self, changes: Sequence[str] = ()) -> dict[str, Any]:
        """Trains to the last step, an early stop or a signal; returns the result. Call it inside `mesh_scope`.

        Args:
          changes: sentences to print when a run resumes.
        """
        started = time.monotonic()
        self._check_data()
        layout = self._start()
        self._log_start([*changes, *layout])
        options, run = self._options, self._run
        self._log = RunLog(
            self._folder,
            step=self._step,
            evaluated=self._evaluated,
            total=options["steps"],
            trackers=(*make_trackers(self._folder, self._step, run.config), *self._own_trackers),
            progress=options["progress"],
        )
        self._compiled = make_train_step(run.model, run.tx, run.schedule, run.mesh, options, self._ema)
        self._signal = StopSignal()
        with self._signal, contextlib.closing(self._log), self._checkpoints, contextlib.ExitStack() as stack:
            self._loader = self._load(self._step * options["batch_size"])
            # closes the current loader: a curriculum replaces it
            stack.callback(lambda: self._loader.close())
            stack.callback(lambda: self._note(self._profiler.stop(self._step, self._state["step"])))
            self._tick()
            with contextlib.ExitStack() as rescue:
                rescue.push(self._rescue)
                # the error that ended the last run may have come before this evaluation
                self._evaluate_if_due()
                while self._step < options["steps"] and not self._solved and not self._stop_asked():
                    self._advance()
            stopped = self._step < options["steps"] and not self._solved
            self._end(stopped)
        return self._report(stopped, time.monotonic() - started)

    def _check_data(self) -> None:
        """Raises RunError for a split or length that the task's data lack, before the first step."""
        options, task, seed = self._options, self._run.task, self._run.config["seed"]
        with run_errors(f"the data of task {task.name!r} cannot be used"):
            task.check_data(seed)
        lengths = {"train": self._curriculum.lengths, "validation": self._curriculum.lengths}
        lengths["test"] = (task.length, *options["final_lengths"])
        for split, visited in lengths.items():
            size = task.with_length if split == "test" else task.up_to
            for length in dict.fromkeys(visited):
                with run_errors(f"the {split} split of task {task.name!r} at length {length} cannot be used"):
                    check_split(size(length), split, seed, once=not options[BATCHES.get(split, "steps")])

    def _start(self) -> list[str]:
        """Restores the newest checkpoint, or initializes the state; returns sentences on a change of layout."""
        run = self._run
        with run_errors(f"the checkpoints in {self._folder} cannot be used"):
            if self._checkpoints.latest_step() is not None:
                found = self._checkpoints.restore(abstract_state(run.model, run.tx, run.mesh, self._ema))
                self._state, self._step, self._saved = found.state, found.step, found.step
                self._curriculum.length = found.data["length"]
                self._solved, self._evaluated = found.data["solved"], found.data["evaluated"]
                self._guard.skips = found.data.get("skips", 0)
                scores = found.data["held_out"]
                self._held_out = {name: math.nan if value is None else value for name, value in scores.items()}
                return _layout_change(found.data.get("layout"), self._layout())
        self._state = init_state(run.model, run.tx, run.mesh, seed=run.config["seed"], ema=self._ema)
        with run_errors("config.init_from"):
            self._state = start_from(run.config["init_from"], self._state)
        with run_errors("config.distill"):
            self._state = start_student(run.config, self._state)
        return []

    def _layout(self) -> dict[str, Any]:
        """Everything besides the config that the bits of a step depend on."""
        kind = jax.devices()[0].device_kind
        return {"processes": jax.process_count(), "mesh": dict(self._run.mesh.shape), "device": kind}

    def _log_start(self, changes: Sequence[str]) -> None:
        run, mesh = self._run, dict(self._run.mesh.shape)
        devices = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
        log(
            f"{run.task.name}, {model_name(run.config['model'])}: {run.model.count()}, "
            f"{devices} ({jax.devices()[0].device_kind}), folder {self._folder}"
        )
        if self._step:
            log(f"resuming from step {self._step}")
            for line in changes:
                log(line)

    def _load(self, position: int) -> Loader:
        task, size = self._curriculum.task, self._options["batch_size"]
        layout = batch_layout(batch_shapes(task, size), self._run.mesh)
        here: dict[str, Any] = {"rows": layout.rows, "place": layout.place, "workers": self._options["input_workers"]}
        return make_loader(task, "train", batch_size=size, seed=self._run.config["seed"], position=position, **here)

    def _advance(self) -> None:
        """Takes one step, then logs, evaluates and saves if they are due."""
        options = self._options
        self._profiler.before(self._step + 1)
        self._state, report = self._compiled(self._state, next(self._loader))
        self._step += 1
        if self._first:
            # the first step at a length compiles
            self._first = False
            jax.block_until_ready(report)
            self._tick()
        self._note(self._profiler.after(self._step, self._state["step"]))
        last = self._step == options["steps"]
        if self._step % options["log_every"] == 0 or last:
            self._write(jax.device_get(report))
        if last:
            # the end of the run saves first, then evaluates
            return
        self._evaluate_if_due()
        if options["checkpoint_every"] and self._step % options["checkpoint_every"] == 0:
            self._save()

    def _write(self, report: Mapping[str, Any]) -> None:
        """Records the steps since the last log, and updates the curriculum and early stopping."""
        self._guard.check(report, self._last_checkpoint())
        self._guard.count(report, self._step, self._last_checkpoint())
        now, steps = time.monotonic(), float(report["steps"])
        timed = self._step - self._ticked
        seconds = (now - self._since) / timed if timed else math.nan
        values = means(report, self._run.task.scores, self._bytes_per_step)
        shown = [f"{name} {format_score(name, value)}" for name, value in values.items()]
        values["length"] = self._curriculum.length
        if float(report["aux"]):
            values["auxiliary_loss"] = float(report["aux"]) / steps
        if float(report["bad_count"]):
            values["skipped_steps"] = int(report["bad_count"])
        for name in ("learning_rate", "gradient_norm", "parameter_norm", "update_norm"):
            values[name] = float(report[name])
        values["step_seconds"] = seconds
        values["tokens_per_second"] = float(report["tokens"]) / steps / seconds
        # share of the steps that are no padding
        examples = steps * self._options["batch_size"]
        values["packing_efficiency"] = float(report["tokens"]) / (examples * self._curriculum.task.steps)
        epochs = self._loader.epochs
        values.update({"epoch" if len(epochs) == 1 else f"epoch_{i}": epoch for i, epoch in enumerate(epochs)})
        mfu = self._flops_used(values["tokens_per_second"])
        if mfu is not None and timed:
            values["mfu"] = mfu
        self._log.write("train", self._step, values)
        shown.append(f"length {values['length']}")
        # with log_every = 1 the first log holds only the step that compiled
        shown += [f"{1e3 * seconds:.0f} ms", f"{values['tokens_per_second']:,.0f} tokens/s"] if timed else []
        shown += [f"epoch {' '.join(f'{epoch:.2f}' for epoch in epochs)}"] if epochs else []
        self._log.show(self._step, "  ".join(shown))
        self._decide(values.get("accuracy", math.nan))
        self._tick()

    def _decide(self, accuracy: float) -> None:
        if self._curriculum.done:
            goal = self._options["stop_accuracy"]
            if goal and accuracy >= goal:
                self._evaluate()
                self._solved = self._held_out["accuracy"] >= goal
        elif self._curriculum.advance(accuracy):
            self._log.note(f"step {self._step}: accuracy {accuracy:.4f}, length is now {self._curriculum.length}")
            self._first = True
            self._loader.close()
            self._loader = self._load(self._step * self._options["batch_size"])

    def _last_checkpoint(self) -> str:
        if self._saved is None:
            return f"There is no checkpoint in {self._folder} yet."
        return f"The last checkpoint in {self._folder} is of step {self._saved}."

    def _flops_used(self, tokens_per_second: float) -> float | None:
        """Fraction of the peak FLOP/s of the devices (MFU), or None if the peak is unknown."""
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is None:
            return None
        model = self._run.config["model"]
        parameters = self._run.model.matrix_size(without=looked_up(model))
        flops = flops_per_token(model, parameters, self._curriculum.task.steps)
        return tokens_per_second * flops / (peak * self._run.mesh.size)

    def _evaluate_if_due(self) -> None:
        every = self._options["eval_every"]
        if every and 0 < self._step < self._options["steps"] and self._step % every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Scores held-out examples, at most once per step."""
        if self._evaluated == self._step:
            return
        values = self._score(parameters_of(self._state), self._curriculum.task, batches=self._options["eval_batches"])
        self._held_out = {**values, "length": self._curriculum.length}
        self._log.write("eval", self._step, self._held_out)
        self._evaluated = self._step
        shown = "  ".join(f"{name} {format_score(name, value)}" for name, value in values.items())
        self._log.show(self._step, f"held out: {shown}", always=True)
        self._tick()

    def _save(self, *, sync: bool = True) -> None:
        # the steps since the last log have not been checked yet
        self._guard.check(jax.device_get(self._state["sums"]), self._last_checkpoint())
        if sync:
            self._log.sync()
        data = {
            "position": self._step * self._options["batch_size"],
            "length": self._curriculum.length,
            "solved": self._solved,
            "evaluated": self._evaluated,
            "skips": self._guard.skips,
            "layout": self._layout(),
            "held_out": {name: value if math.isfinite(value) else None for name, value in self._held_out.items()},
        }
        scored = math.isfinite(self._held_out.get("loss", math.nan))
        with run_errors(f"cannot save step {self._step}"):
            self._checkpoints.save(self._step, self._state, data, self._run.config, self._held_out if scored else {})
        self._saved = self._step
        self._tick()

    def _rescue(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Saves the current step when an error leaves the loop, if the state is whole; an `ExitStack` calls it."""
        if kind is None or not issubclass(kind, Exception) or issubclass(kind, (NotFiniteError, SaveError)):
            return
        # a step that failed has taken the state with it
        whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))
        # other processes may not see the error, and saving needs all of them
        if whole and jax.process_count() == 1 and self._saved != self._step:
            # the first error is the one to report
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                # it may be an error of the log
                self._save(sync=False)
                self._checkpoints.wait()
                log(f"saved step {self._step} before the error; rerun the command to resume")

    def _note(self, line: str | None) -> None:
        if line is not None:
            self._log.note(line)
            self._tick()

    def _tick(self) -> None:
        """Restarts the clock of the step time, which excludes compilation, evaluation and saving."""
        self._since, self._ticked = time.monotonic(), self._step

    def _end(self, stopped: bool) -> None:
        self._save()
        self._checkpoints.wait()
        if not stopped:
            self._evaluate()

    def _report(self, stopped: bool, seconds: float) -> dict[str, Any]:
        """Scores a finished run on the test split, and prints how the run ended."""
        result: dict[str, Any] = {
            "task": self._run.task.name,
            "memory": model_name(self._run.config["model"]),
            "steps": self._step,
            "finished": not stopped,
            "length": self._curriculum.length,
            "parameters": self._run.model.size(),
            "seconds": round(seconds, 1),
        }
        task = self._curriculum.task
        draw_curve(self._folder, str(result["memory"]), task)
        if stopped:
            log(f"stopped by {self._signal.name} after step {self._step}, saved; rerun the command to resume")
            return result
        scores = final_scores(self._score, parameters_of(self._state), task, self._options)
        result["lengths"] = {str(length): values for length, values in scores.items()}
        write_report(self._folder, result)
        log(f"{self._step} steps in {seconds:.0f} s; curve, metrics and checkpoints in {self._folder}")
        return result

    def _stop_asked(self) -> bool:
        return self._signal.asked(self._step)
