"""The training loop in fast runs: files, exact resume, curriculum, early stop, steps that are not finite, errors."""

import contextlib
import json
import os
import signal
import sys
import threading

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from memformer.tasks import Swap
from memformer.training import build, checksums, loop, metrics, report, step, trackers
from memformer.training.build import build_run
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import RunError
from memformer.training.files import write_bytes
from memformer.training.lock import LOCK, run_lock
from memformer.training.loop import train
from memformer.training.metrics import read_records
from memformer.training.sharding import mesh_scope
from memformer.training.step import abstract_state
from tests.training.small import build_counting, small_config

pytestmark = pytest.mark.usefixtures("programs_kept")
MEASURED = ("step_seconds", "tokens_per_second")
CLIMBING = {
    "train__curriculum__enabled": True,
    "train__curriculum__start": 4,
    "train__curriculum__stop": 8,
    "train__curriculum__accuracy": 0.0,
}


def make_light(monkeypatch):
    """Uses one device, and a model that compiles fast."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(build, "build_model", build_counting)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Curves are written empty: to draw one takes a third of a short run, and `finished` has drawn its own."""
    make_light(monkeypatch)
    monkeypatch.setattr(report, "plot_learning_curve", lambda records, path, **_: write_bytes(path, b""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, programs_kept):
    """Folder and result of one uninterrupted run."""
    folder = str(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        make_light(patch)
        result = train(small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8)), folder)
    return folder, result


def records_of(folder):
    records = read_records(os.path.join(folder, "metrics.jsonl"))
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def last_state(folder, config):
    run = build_run(config.to_dict())
    with mesh_scope(run.mesh), Checkpoints(os.path.join(folder, "checkpoints")) as checkpoints:
        target = abstract_state(run.model, run.tx, run.mesh, config.optimizer.ema)
        return checkpoints.restore(target)


def test_what_a_run_leaves(finished):
    folder, result = finished
    assert {"config.json", "metrics.jsonl", "checkpoints", "curve.png", "result.json"} <= set(os.listdir(folder))
    with open(os.path.join(folder, "result.json")) as file:
        assert json.load(file) == result
    with open(os.path.join(folder, "curve.png"), "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert result["steps"] == 8 and result["finished"] and set(result["lengths"]) == {"4", "8"}
    records = read_records(os.path.join(folder, "metrics.jsonl"))
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in trained] == [2, 4, 6, 8]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8]
    wanted = {"loss", "accuracy", "tokens_per_second", "step_seconds", "learning_rate"}
    wanted |= {"gradient_norm", "parameter_norm", "update_norm"}
    assert all(wanted <= set(r) and r["gradient_norm"] > 0 and r["update_norm"] > 0 for r in trained)
    # 3 start tokens and 8 swaps, 8 rows
    assert trained[-1]["tokens_per_second"] * trained[-1]["step_seconds"] == pytest.approx(8 * 11)


def test_curriculum_climbs_at_the_log_after_its_goal(finished):
    lengths = [r["length"] for r in records_of(finished[0]) if r["kind"] == "train"]
    assert lengths == [4, 8, 8, 8]


@pytest.mark.parametrize(("at", "number"), [(2, signal.SIGTERM), (5, signal.SIGHUP)])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(finished, tmp_path, monkeypatch, at, number):
    config = small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8))
    folder = str(tmp_path)
    advance = loop.Trainer._advance

    def advance_and_ask_to_stop(self):
        advance(self)
        if self._step == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Trainer, "_advance", advance_and_ask_to_stop)
    # under nohup SIGHUP is ignored, and a trainer respects that
    before = signal.signal(number, signal.SIG_DFL)
    try:
        result = train(config, folder)
    finally:
        signal.signal(number, before)
    assert result["steps"] == at and not result["finished"]
    monkeypatch.setattr(loop.Trainer, "_advance", advance)
    # what a kill leaves: records beyond the checkpoint, and a torn line
    with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({"kind": "train", "step": at + 1, "loss": -1.0}) + '\n{"kind": "tra')
    again = train(config, folder)
    whole_folder, whole = finished
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert records_of(folder) == records_of(whole_folder)
    resumed, unbroken = last_state(folder, config), last_state(whole_folder, config)
    assert resumed.step == unbroken.step == 8 and resumed.data == unbroken.data
    for (path, a), b in zip(jax.tree.leaves_with_path(resumed.state), jax.tree.leaves(unbroken.state), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True), jax.tree_util.keystr(path)


def test_a_run_resumes_on_another_mesh(finished, tmp_path, monkeypatch, capsys):
    config = small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8), train__steps=4)
    config.optimizer.schedule_steps = 8
    train(config, str(tmp_path))
    devices = jax.local_devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    config.train.steps, config.mesh = 8, {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    result = train(config, str(tmp_path))
    assert result["steps"] == 8 and [r["step"] for r in records_of(str(tmp_path)) if r["kind"] == "train"] == [
        2,
        4,
        6,
        8,
    ]
    losses = [r["loss"] for r in records_of(str(tmp_path)) if r["kind"] == "train"]
    np.testing.assert_allclose(losses, [r["loss"] for r in records_of(finished[0]) if r["kind"] == "train"], rtol=1e-5)
    shown = capsys.readouterr().out
    assert "results agree to rounding, not bit for bit" in shown and "mesh.fsdp 1 -> 2" in shown


def test_a_finished_run_started_again_only_reports(finished, monkeypatch):
    folder, whole = finished
    monkeypatch.setattr(loop.Trainer, "_advance", lambda self: pytest.fail("a step was taken"))
    before = records_of(folder)
    again = train(small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8)), folder)
    assert again["lengths"] == whole["lengths"] and records_of(folder) == before


def test_folder_of_another_config(finished):
    with pytest.raises(RunError, match="holds a run of another config: model.width .16 there, 32 now."):
        train(small_config(**CLIMBING, optimizer__ema=0.9, model__width=32), finished[0])


def test_checkpoint_of_another_model(finished, tmp_path):
    """config.json is lost; the shapes of the arrays differ."""
    os.symlink(os.path.join(finished[0], "checkpoints"), tmp_path / "checkpoints")
    with pytest.raises(RunError, match="cannot be used.*"):
        train(small_config(**CLIMBING, optimizer__ema=0.9, model__width=32), str(tmp_path))


def test_folder_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="cannot make the run's folder.*--workdir"):
        train(small_config(), str(file / "run"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="config.json must be the config of the run"):
        train(small_config(), str(tmp_path))


def test_early_stop(tmp_path, capsys):
    result = train(small_config(train__stop_accuracy=0.01, train__steps=50, train__tensorboard=True), str(tmp_path))
    assert result["steps"] == 2 and result["finished"]
    assert result["lengths"]["8"]["accuracy"] > 0.01
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
    assert table == [["memory", "steps", "loss", "accuracy"]]
    assert any("tfevents" in name for name in os.listdir(tmp_path / "tensorboard"))


def test_abort_names_the_step_that_was_not_finite(tmp_path):
    config = small_config(optimizer__learning_rate=1e38, optimizer__clip_norm=0.0, train__log_every=4)
    with pytest.raises(RunError, match=r"stopped being finite at step [23]\b. There is no checkpoint .*learning_rate"):
        train(config, str(tmp_path))


def test_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """The run stops between two logs, after the loss stopped being finite."""
    config = small_config(optimizer__learning_rate=1e38, optimizer__clip_norm=0.0, train__log_every=8)
    config.train.update({"checkpoint_every": 0, "eval_every": 0})
    monkeypatch.setattr(loop.Trainer, "_stop_asked", lambda self: self._step == 5)
    with pytest.raises(RunError, match="stopped being finite at step"):
        train(config, str(tmp_path))
    assert not os.path.exists(tmp_path / "checkpoints")


@pytest.mark.parametrize(("steps", "max_skips", "at"), [(40, 5, "5 steps up to step 6"), (7, 20, None)])
def test_a_run_of_skipped_steps_is_an_error(tmp_path, steps, max_skips, at):
    config = small_config(optimizer__learning_rate=1e38, optimizer__clip_norm=0.0, train__on_nan="skip")
    config.train.update({"steps": steps, "max_skips": max_skips, "checkpoint_every": 2, "eval_every": 0})
    if at is None:
        # the first step is taken: a run of 7 steps has 6 skipped ones at its end, below max_skips
        assert train(config, str(tmp_path))["finished"]
        return
    with pytest.raises(RunError, match=f"the last {at} were all skipped.*max_skips is 5.*is of step 4"):
        train(config, str(tmp_path))


def test_a_run_without_any_step_taken_is_an_error(tmp_path, monkeypatch):
    count = step.count_batch
    bad = lambda *arguments: {**(sums := count(*arguments)), "loss": sums["loss"] * jax.numpy.inf}  # noqa: E731
    monkeypatch.setattr(step, "count_batch", bad)
    with pytest.raises(RunError, match="the last 3 steps up to step 3 were all skipped"):
        train(small_config(train__on_nan="skip", train__steps=3), str(tmp_path))


def test_skip_passes_over_steps_that_are_not_finite(tmp_path, monkeypatch):
    config = small_config(train__on_nan="skip")
    count = step.count_batch

    def third_batch_is_bad(logits, targets, weights):
        sums = count(logits, targets, weights)
        bad = targets[0, 3] == 0
        return {**sums, "loss": jax.numpy.where(bad, jax.numpy.inf, 1.0) * sums["loss"]}

    monkeypatch.setattr(step, "count_batch", third_batch_is_bad)
    train(config, str(tmp_path))
    records = [r for r in records_of(str(tmp_path)) if r["kind"] == "train"]
    assert 0 < sum(r.get("skipped_steps", 0) for r in records) < 8
    state = last_state(str(tmp_path), config).state
    assert all(np.all(np.isfinite(x)) for x in state["params"].values())


def test_profile_and_compile_cache(tmp_path):
    """The trace ends with the run if its last step is beyond it."""
    cache = tmp_path / "cache"
    try:
        train(small_config(train__profile=(7, 90), train__compile_cache=str(cache)), str(tmp_path / "run"))
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        # the process keeps the first folder it was given
        compilation_cache.reset_cache()
    assert any(name.endswith(".pb") for _, _, names in os.walk(tmp_path / "run" / "profile") for name in names)
    assert os.listdir(cache)


def test_the_first_log_has_no_time(tmp_path, capsys):
    """With log_every = 1 it holds only the step that compiled."""
    train(small_config(train__log_every=1, train__steps=2, train__eval_every=0), str(tmp_path))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/2")]
    assert shown and "nan" not in shown[0] and " ms" not in shown[0]
    assert read_records(os.path.join(tmp_path, "metrics.jsonl"))[0]["step_seconds"] is None


def test_output_that_nobody_reads(monkeypatch):
    """A closed pipe does not end a run."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        metrics.log("first")
        metrics.log("second")
        assert sys.stdout is not pipe
        sys.stdout.close()
        monkeypatch.undo()
        # what is left in the buffer has no reader either
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def test_another_trainer_in_the_folder(finished):
    folder, _ = finished
    before = records_of(folder)
    with run_lock(folder), pytest.raises(RunError, match="another trainer is running in this folder"):
        train(small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8)), folder)
    assert records_of(folder) == before and LOCK not in os.listdir(folder)


def fail(error):
    raise error


def fail_at(monkeypatch, owner, name, error, when):
    """Makes a method raise `error` where `when(self, *arguments)` holds."""
    method = getattr(owner, name)

    def wrapped(self, *arguments, **options):
        if when(self, *arguments):
            raise error
        return method(self, *arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)
    return lambda: monkeypatch.setattr(owner, name, method)


def steps_in(folder):
    return sorted(int(name) for name in os.listdir(os.path.join(folder, "checkpoints")) if name.isdecimal())


def test_the_end_saves_before_it_evaluates(finished, tmp_path, monkeypatch):
    config = small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8))
    mend = fail_at(monkeypatch, loop.Trainer, "_evaluate", RunError("out of memory"), lambda self: self._step == 8)
    with pytest.raises(RunError, match="out of memory"):
        train(config, str(tmp_path))
    assert steps_in(tmp_path) == [4, 8]
    mend()
    again = train(config, str(tmp_path))
    assert {**again, "seconds": 0} == {**finished[1], "seconds": 0}
    assert records_of(str(tmp_path)) == records_of(finished[0])


@pytest.mark.parametrize(
    ("owner", "name", "error", "says"),
    [
        (loop.Trainer, "_evaluate", RuntimeError("out of memory"), "out of memory"),
        (metrics._Lines, "add", OSError(28, "No space left on device"), "metrics.jsonl: No space left.*MiB free"),
        (trackers.EventFile, "write", OSError(28, "No space left on device"), "No space left.*--workdir"),
    ],
    ids=["evaluation", "records", "tensorboard"],
)
def test_an_error_in_the_middle_saves_first(finished, tmp_path, monkeypatch, capsys, owner, name, error, says):
    config = small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8), train__tensorboard=True)
    config.train.checkpoint_every = 0
    calls, bad = [], 1 if name == "_evaluate" else 2
    mend = fail_at(monkeypatch, owner, name, error, lambda *_: calls.append(0) or len(calls) == bad)
    with pytest.raises((RunError, RuntimeError), match=says):
        train(config, str(tmp_path))
    mend()
    (saved,) = steps_in(tmp_path)
    assert f"saved step {saved} before the error" in capsys.readouterr().out and saved >= 4
    config.train.tensorboard = False
    assert train(config, str(tmp_path))["lengths"] == finished[1]["lengths"]
    lost = {"kind": "train", "step": 4} if owner is metrics._Lines else {}
    kept = [record for record in records_of(finished[0]) if not lost or not lost.items() <= record.items()]
    assert records_of(str(tmp_path)) == kept


def test_a_save_that_fails_keeps_the_newest_whole_step(tmp_path, monkeypatch):
    """The error comes from Orbax's thread; it is one paragraph, and what was half written is gone."""
    full = OSError(28, "No space left on device")
    mend = fail_at(monkeypatch, checksums.StateHandler, "finalize", full, lambda _, path: "/4" in str(path))
    config = small_config(train__checkpoint_every=2, train__eval_every=0)
    with pytest.raises(
        RunError, match="cannot write checkpoint 4 .*No space left .*MiB free.*step 2 is the newest whole"
    ):
        train(config, str(tmp_path))
    mend()
    assert os.listdir(tmp_path / "checkpoints") == ["2"] and LOCK not in os.listdir(tmp_path)
    assert train(config, str(tmp_path))["finished"]


def wait_for_abandoned_writes():
    """Orbax stops at the first write that fails, and its other threads go on in the folder of the next run."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax"):
            # their own `join` raises what the thread failed with
            threading.Thread.join(thread)


def test_each_file_of_a_run_that_cannot_be_written(finished, tmp_path, monkeypatch):
    """One paragraph names it and the disk; the newest whole step stays, and the next run resumes from it."""
    config = small_config(**CLIMBING, optimizer__ema=0.9, train__final_lengths=(4, 8))
    full, stop = OSError(28, "No space left on device"), jax.profiler.stop_trace
    # file that fails, what the error says, steps that are kept
    cases = [
        ("config.json", "config.json: No space .*MiB free", []),
        ("4.orbax-checkpoint-tmp/arrays", "checkpoint 4 in .*: No space .*MiB free.*there is no whole", []),
        ("8.orbax-checkpoint-tmp/data", "checkpoint 8 in .*: No space .*MiB free.*step 4 is the newest", [4]),
        ("profile", "profile: No space .*MiB free", [4, 5]),
        ("curve.png", "curve.png: No space .*MiB free", [5, 8]),
        ("result.json", "result.json: No space .*MiB free", [5, 8]),
    ]
    for file, says, kept in cases:
        bad = lambda path, mode="r", file=file, **_: "w" in mode and file in str(path)  # noqa: E731
        mend = fail_at(monkeypatch, type(epath.Path()), "open", full, bad)
        config.train.profile = (5, 5) if file == "profile" else (0, 0)
        if file == "profile":
            error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {file}; {full.strerror}")
            monkeypatch.setattr(jax.profiler, "stop_trace", lambda error=error: (stop(), fail(error)))
        with pytest.raises(RunError, match=f"cannot write .*{says}"):
            train(config, str(tmp_path))
        mend()
        wait_for_abandoned_writes()
        left = set(os.listdir(tmp_path)) - {"config.json", "metrics.jsonl", "checkpoints", "profile", "curve.png"}
        assert not left and (steps_in(tmp_path) if "checkpoints" in os.listdir(tmp_path) else []) == kept, file
    assert {**train(config, str(tmp_path)), "seconds": 0} == {**finished[1], "seconds": 0}
    assert records_of(str(tmp_path)) == records_of(finished[0])


@pytest.mark.parametrize(
    ("changed", "empty", "says"),
    [
        ({}, lambda self, split: split == "test", "data of task 'swap' cannot be used: the test split .* no example"),
        ({}, lambda self, split: split == "test" and self.length == 9, "test split .* at length 9 .* no example"),
        ({"train__final_lengths": (0,)}, lambda self, split: False, "test split .* at length 0 .*length must be"),
    ],
    ids=["empty split", "empty at a final length", "no such length"],
)
def test_what_the_data_lack_is_reported_before_the_first_step(tmp_path, monkeypatch, changed, empty, says):
    class Empty(list):
        endless = False

    full = Swap.source
    monkeypatch.setattr(
        Swap, "source", lambda self, split, seed: Empty() if empty(self, split) else full(self, split, seed)
    )
    with pytest.raises(RunError, match=says):
        train(small_config(**{"train__final_lengths": (9,), **changed}), str(tmp_path))
    assert not {"metrics.jsonl", "checkpoints"} & set(os.listdir(tmp_path))


def test_more_steps_leave_the_schedule_where_it_was(tmp_path, capsys):
    config = small_config(train__steps=4, train__eval_every=0, train__log_every=1)
    train(config, str(tmp_path))
    config.train.steps = 8
    train(config, str(tmp_path))
    shown = capsys.readouterr().out
    assert "changed since the last start: train.steps 4 -> 8" in shown
    assert "the learning rate stays at its value of step 4: optimizer.schedule_steps is 4" in shown
    rates = [record["learning_rate"] for record in records_of(str(tmp_path)) if record["kind"] == "train"]
    np.testing.assert_allclose(rates[4:], 1e-2 * 0.1, rtol=1e-5)
    assert np.all(np.diff(rates[:5]) < 0)
    # a longer schedule is the user's decision
    config.train.steps, config.optimizer.schedule_steps = 9, 18
    train(config, str(tmp_path))
    assert "optimizer.schedule_steps 4 -> 18" in capsys.readouterr().out
    assert records_of(str(tmp_path))[-2]["learning_rate"] > 5e-3


def test_flops_and_peak():
    model = {"memory": "softmax_attention, delta_rule", "depth": 2, "heads": 2, "width": 8, "key_width": None}
    got = metrics.flops_per_token({**model, "value_width": None}, 100, 16)
    assert got == 3 * (2 * 100 + 2 * (16 * 8) + 2 * (6 * 16))
    assert metrics.peak_flops("NVIDIA A100-SXM4") == 312e12 and metrics.peak_flops("TPU v5 lite") == 197e12
