"""The training loop: steps, records, evaluations, checkpoints, and resuming a run."""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from memformer.training.build import Run, build_run
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import RunError, changed_keys, complete_config, run_errors
from memformer.training.curriculum import Curriculum
from memformer.training.evaluation import Scorer, format_score, parameters_of
from memformer.training.input import Loader, make_loader
from memformer.training.losses import means
from memformer.training.metrics import RunLog, flops_a_token, log, model_name, peak_flops, replace_file
from memformer.training.report import draw_curve, final_scores, write_report
from memformer.training.sharding import global_batch, mesh_scope
from memformer.training.step import abstract_state, init_state, make_eval_step, make_train_step

__all__ = ["Trainer", "train"]

# parameters that are not operands of a matrix product
LOOKED_UP = ("embedding", "positions")


def train(config: Mapping[str, Any], workdir: str = "") -> dict[str, Any]:
    """Trains the model of a config, or resumes the run of this config in `workdir`.

    A run that is killed and restarted with the same config ends with the same bits as an uninterrupted one. The folder
    then holds config.json, metrics.jsonl, tensorboard/, checkpoints/, curve.png, result.json.

    Args:
      config: nested dicts with the sections of `default_config`.
      workdir: the run's folder; "" is runs/<task>-<memory>, or runs/<task>-<type> for models other than memory_lm.

    Returns:
      The content of result.json: last step, scores by length, and whether the run finished.

    Raises:
      RunError: a config, folder or checkpoint that cannot be used, or a loss that is not finite.
    """
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    if plain["train"]["compile_cache"]:
        jax.config.update("jax_compilation_cache_dir", plain["train"]["compile_cache"])
        # keep every program: a limit in seconds would depend on the speed of the machine
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    run = build_run(plain)
    name = model_name(plain["model"]).replace(", ", "-").replace(",", "-")
    folder = _open_folder(workdir or os.path.join("runs", f"{run.task.name}-{name}"), run.config)
    trainer = Trainer(run, folder)
    with mesh_scope(run.mesh):
        return trainer.train()


def _open_folder(folder: str, config: Mapping[str, Any]) -> str:
    """Creates the run's folder, or checks that it holds a run of the same config.

    Raises:
      RunError: the folder cannot be written, or holds another run.
    """
    path = os.path.join(folder, "config.json")
    if os.path.exists(path):
        with run_errors(f"{path} must be the config of the run in this folder, and cannot be read"):
            with open(path, encoding="utf-8") as file:
                old = complete_config(json.load(file)).to_dict()
        changed = changed_keys(old, config)
        if changed:
            was = ", ".join(f"{key} ({_at(old, key)} there, {_at(config, key)} now)" for key in changed[:4])
            raise RunError(
                f"{folder} holds a run of another config: {was} differ{'' if len(changed) > 1 else 's'}. Give the same "
                "config to resume that run, or another --workdir."
            )
    if jax.process_index() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the run's folder {folder}: {error.strerror}; choose another --workdir."
            ) from error
        with replace_file(path) as file:
            json.dump(config, file, indent=2)
    return folder


def _at(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


class Trainer:
    """One run: its state, input and records.

    Args:
      run: from `build_run`.
      folder: the run's folder; it may hold an earlier part of the run.
    """

    def __init__(self, run: Run, folder: str):
        self._run, self._folder, self._options = run, folder, run.config["train"]
        self._ema = run.config["optimizer"]["ema"]
        with run_errors("config.train.curriculum"):
            self._curriculum = Curriculum(run.task, self._options["curriculum"])
        keep = run.config["checkpoint"]
        self._checkpoints = Checkpoints(os.path.join(folder, "checkpoints"), **keep)
        scorer = make_eval_step(run.model, run.mesh)
        self._score = Scorer(scorer, run.mesh, self._options["batch_size"], run.config["seed"])
        self._solved, self._evaluated = False, -1
        self._held_out: dict[str, float] = {}
        self._step = 0
        self._first = True
        self._signal: int | None = None

    def train(self) -> dict[str, Any]:
        """Runs to the last step, an early stop or a signal; returns the result. Call inside `mesh_scope`."""
        started = time.monotonic()
        self._start()
        self._log_start()
        options, run = self._options, self._run
        self._log = RunLog(
            self._folder,
            step=self._step,
            total=options["steps"],
            tensorboard=options["tensorboard"],
            progress=options["progress"],
        )
        self._compiled = make_train_step(run.model, run.tx, run.schedule, run.mesh, options, self._ema)
        with self._signals(), contextlib.closing(self._log), self._checkpoints, contextlib.ExitStack() as stack:
            self._loader = self._load(self._step * options["batch_size"])
            # closes the current loader: a curriculum replaces it
            stack.callback(lambda: self._loader.close())
            self._tick()
            while self._step < options["steps"] and not self._solved and not self._stop_asked():
                self._advance()
            stopped = self._step < options["steps"] and not self._solved
            self._end(stopped)
        return self._report(stopped, time.monotonic() - started)

    def _start(self) -> None:
        run = self._run
        with run_errors(f"the checkpoints in {self._folder} cannot be used"):
            if self._checkpoints.latest_step() is not None:
                found = self._checkpoints.restore(abstract_state(run.model, run.tx, run.mesh, self._ema))
                self._state, self._step = found.state, found.step
                self._curriculum.length = found.data["length"]
                self._solved, self._evaluated = found.data["solved"], found.data["evaluated"]
                scores = found.data["held_out"]
                self._held_out = {name: math.nan if value is None else value for name, value in scores.items()}
                return
        self._state = init_state(run.model, run.tx, run.mesh, seed=run.config["seed"], ema=self._ema)

    def _log_start(self) -> None:
        run, mesh = self._run, dict(self._run.mesh.shape)
        devices = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
        log(
            f"{run.task.name}, {model_name(run.config['model'])}: {run.model.size():,} parameters, "
            f"{devices} ({jax.devices()[0].device_kind}), folder {self._folder}"
        )
        if self._step:
            log(f"resuming from step {self._step}")

    def _load(self, position: int) -> Loader:
        return make_loader(
            self._curriculum.task,
            "train",
            batch_size=self._options["batch_size"],
            seed=self._run.config["seed"],
            position=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _advance(self) -> None:
        """Takes one step, then logs, evaluates and saves if they are due."""
        options = self._options
        self._profile(self._step + 1, starts=True)
        batch = global_batch(next(self._loader), self._run.mesh)
        self._state, report = self._compiled(self._state, batch)
        self._step += 1
        if self._first:
            # the first step at a length compiles
            self._first = False
            jax.block_until_ready(report)
            self._tick()
        self._profile(self._step, starts=False)
        last = self._step == options["steps"]
        if self._step % options["log_every"] == 0 or last:
            self._write(jax.device_get(report))
        if options["eval_every"] and self._step % options["eval_every"] == 0:
            self._evaluate()
        if options["checkpoint_every"] and self._step % options["checkpoint_every"] == 0:
            self._save()

    def _write(self, report: Mapping[str, Any]) -> None:
        """Records the steps since the last log, and updates the curriculum and early stopping."""
        self._check_finite(report)
        now, steps = time.monotonic(), float(report["steps"])
        timed = self._step - self._ticked
        seconds = (now - self._since) / timed if timed else math.nan
        values = means(report, self._run.task.scores)
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
        mfu = self._flops_used(values["tokens_per_second"])
        if mfu is not None:
            values["mfu"] = mfu
        self._log.write("train", self._step, values)
        self._log.show(self._step, "  ".join([*shown, f"length {values['length']}", f"{1e3 * seconds:.0f} ms"]))
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

    def _check_finite(self, report: Mapping[str, Any]) -> None:
        if float(report["bad_count"]) and self._options["on_nan"] == "abort":
            raise RunError(
                f"the loss or its gradient stopped being finite at step {int(report['bad_step'])}. The last checkpoint "
                f"in {self._folder} is from before that. Lower --config.optimizer.learning_rate, increase "
                "--config.optimizer.warmup_steps, or skip such steps with --config.train.on_nan=skip."
            )

    def _flops_used(self, tokens_per_second: float) -> float | None:
        """Fraction of the peak FLOP/s of the devices (MFU), or None if the peak is unknown."""
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is None:
            return None
        parameters = self._run.model.size(without=LOOKED_UP)
        flops = flops_a_token(self._run.config["model"], parameters, self._curriculum.task.steps)
        return tokens_per_second * flops / (peak * self._run.mesh.size)

    def _evaluate(self) -> None:
        """Scores held-out examples, at most once per step."""
        if self._evaluated == self._step:
            return
        self._evaluated = self._step
        values = self._score(parameters_of(self._state), self._curriculum.task, batches=self._options["eval_batches"])
        self._held_out = {**values, "length": self._curriculum.length}
        self._log.write("eval", self._step, self._held_out)
        shown = "  ".join(f"{name} {format_score(name, value)}" for name, value in values.items())
        self._log.show(self._step, f"held out: {shown}", always=True)
        self._tick()

    def _save(self) -> None:
        # the steps since the last log have not been checked yet
        self._check_finite(jax.device_get(self._state["sums"]))
        self._log.sync()
        data = {
            "position": self._step * self._options["batch_size"],
            "length": self._curriculum.length,
            "solved": self._solved,
            "evaluated": self._evaluated,
            "held_out": {name: value if math.isfinite(value) else None for name, value in self._held_out.items()},
        }
        scored = math.isfinite(self._held_out.get("loss", math.nan))
        with run_errors(f"cannot save step {self._step}"):
            self._checkpoints.save(self._step, self._state, data, self._run.config, self._held_out if scored else {})
        self._tick()

    def _tick(self) -> None:
        """Restarts the clock of the step time, which excludes compilation, evaluation and saving."""
        self._since, self._ticked = time.monotonic(), self._step

    def _end(self, stopped: bool) -> None:
        if not stopped:
            self._evaluate()
        self._save()

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
            name = signal.Signals(self._signal).name if self._signal else "the scheduler"
            log(f"stopped by {name} after step {self._step}, saved; rerun the command to resume")
            return result
        scores = final_scores(self._score, parameters_of(self._state), task, self._options)
        result["lengths"] = {str(length): values for length, values in scores.items()}
        write_report(self._folder, result)
        log(f"{self._step} steps in {seconds:.0f} s; curve, metrics and checkpoints in {self._folder}")
        return result

    def _profile(self, step: int, *, starts: bool) -> None:
        first, last = self._options["profile"]
        if starts and step == first:
            jax.profiler.start_trace(os.path.join(self._folder, "profile"))
        elif not starts and first and step == last:
            jax.block_until_ready(self._state)
            jax.profiler.stop_trace()
            self._log.note(f"profile of steps {first}..{last} in {self._folder}/profile")
            self._tick()

    def _stop_asked(self) -> bool:
        if jax.process_count() > 1:
            # all processes agree on the step
            return multihost_utils.reached_preemption_sync_point(self._step)
        return self._signal is not None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C stop the run after the current step, with a checkpoint; a second one ends it at once."""
        if jax.process_count() > 1:
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            self._signal = number
            for known, handler in before.items():
                signal.signal(known, handler)

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
