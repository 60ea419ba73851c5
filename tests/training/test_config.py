"""The run config: defaults, overrides and their typos, checks, comparing two runs."""

import json
import math
import re
import sys

import numpy as np
import pytest
from absl import flags

from memformer.training.build import model_settings
from memformer.training.config import (
    RunError,
    complete_config,
    default_config,
    run_errors,
    set_values,
    unknown_key,
)
from memformer.training.flags import define_config, parse_flags, report_errors
from memformer.training.folder import FREE_KEYS, changed_keys
from memformer.training.validate import validate
from tests.processes import run_script

CONFIG_FILE = """
from memformer.training.config import default_config


def get_config():
    return default_config()
"""

BAD_VALUES = [
    ("seed", -1, "at least 0"),
    ("train.steps", 0, "at least 1"),
    ("train.batch_size", 0, "at least 1"),
    ("train.log_every", 0, "at least 1"),
    ("train.eval_every", -1, "at least 0"),
    ("train.accumulate", 3, "a multiple of train.accumulate = 3"),
    ("train.stop_accuracy", 1.5, "between 0 and 1"),
    ("train.stop_accuracy", math.nan, "between 0 and 1"),
    ("train.label_smoothing", 1.0, "in [0, 1)"),
    ("train.on_nan", "ignore", "'abort', 'skip'"),
    ("train.profile", (5, 2), "first <= last"),
    ("train.profile", (0, 2), "first <= last"),
    ("train.profile", (1,), "two steps"),
    ("train.profile", (1, 2, 3), "two steps"),
    ("train.profile", (1.5, 2), "whole numbers"),
    ("train.final_lengths", ("8",), "whole numbers"),
    ("train.curriculum.start", 300, "at least train.curriculum.start = 300"),
    ("train.curriculum.factor", 1, "at least 2"),
    ("train.curriculum.accuracy", -0.1, "between 0 and 1"),
    ("checkpoint.keep_last", 0, "at least 1"),
    ("optimizer.name", "sgd", "adamw"),
    ("optimizer.schedule", "linear", "warmup_stable_decay"),
    ("optimizer.learning_rate", 0.0, "above 0"),
    ("optimizer.learning_rate", math.inf, "above 0 and finite"),
    ("optimizer.learning_rate", math.nan, "above 0 and finite"),
    ("optimizer.b1", 1.5, "in [0, 1)"),
    ("optimizer.b1", -0.1, "in [0, 1)"),
    ("optimizer.b2", 1.0, "in [0, 1)"),
    ("optimizer.eps", 0.0, "above 0"),
    ("optimizer.eps", -1.0, "above 0"),
    ("optimizer.end_factor", -1.0, "between 0 and 1"),
    ("optimizer.decay_fraction", 5.0, "between 0 and 1"),
    ("optimizer.step_factor", -2.0, "above 0, at most 1"),
    ("optimizer.step_every", 0, "at least 1"),
    ("optimizer.warmup_steps", -1, "at least 0"),
    ("optimizer.weight_decay", math.nan, "0 or more and finite"),
    ("optimizer.clip_norm", -1.0, "0 (no clipping) or more"),
    ("optimizer.ema", 1.0, "a decay below 1"),
]


def test_defaults_are_valid():
    validate(default_config().to_dict())


@pytest.mark.parametrize(("key", "value", "says"), BAD_VALUES, ids=[f"{k}={v}" for k, v, _ in BAD_VALUES])
def test_bad_value(key, value, says):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(RunError) as error:
        validate(config.to_dict())
    name = "train.batch_size" if key == "train.accumulate" else key.replace("curriculum.start", "curriculum.stop")
    assert says in str(error.value) and f"config.{name} must be" in str(error.value)
    assert f"--config.{name}=" in str(error.value)


@pytest.mark.parametrize("key", ["train.steps", "optimizer.learning_rate", "optimizer.b1", "seed"])
def test_value_of_another_type(key):
    config = default_config().to_dict()
    *section, last = key.split(".")
    (config[section[0]] if section else config)[last] = "1"
    for function in (validate, complete_config):
        with pytest.raises(RunError, match=f"config.{key} "):
            function(config)


def test_numpy_numbers():
    """Values from a sweep over numpy arrays; config.json and the optimizer get Python's."""
    config = default_config().to_dict()
    config["optimizer"]["learning_rate"], config["train"]["steps"] = np.float32(0.5), np.int64(7)
    config["train"]["final_lengths"], config["task"]["length"] = [np.int64(8)], np.int32(9)
    config = complete_config(config).to_dict()
    validate(config)
    assert json.loads(json.dumps(config))["train"]["final_lengths"] == [8]
    assert type(config["optimizer"]["learning_rate"]) is float and config["task"]["length"] == 9


def test_typo_or_gap_in_a_config_file():
    config = default_config().to_dict()
    with pytest.raises(RunError, match="config.train has no key step .*did you mean steps"):
        validate({**config, "train": {**config["train"], "step": 3}})
    with pytest.raises(RunError, match="config has no key trian .*did you mean train"):
        validate({**config, "trian": {}})
    with pytest.raises(RunError, match="config.optimizer has no learning_rate; .*default_config"):
        validate({**config, "optimizer": {k: v for k, v in config["optimizer"].items() if k != "learning_rate"}})
    with pytest.raises(RunError, match="config.mesh must be a section with context, data, expert, fsdp, .*got 8"):
        validate({**config, "mesh": 8})


def test_unknown_key_names_the_near_ones():
    message = unknown_key(default_config(), "train.step")
    assert "config.train has no key step" in message and "did you mean steps" in message and "batch_size" in message
    assert unknown_key(default_config(), "train.steps") is None
    assert "is a value, not a section" in unknown_key(default_config(), "seed.x")


def test_set_values():
    config = default_config()
    set_values(
        config, ["train.steps=7", "model.memory=delta_rule", "task.length=9", "model.memory_options.gla.decay=None"]
    )
    assert (config.train.steps, config.model.memory, config.task.length) == (7, "delta_rule", 9)
    assert config.model.memory_options.gla.decay is None
    for bad, says in (("train.step=1", "did you mean steps"), ("seed", "key=value"), ("seed=x", "cannot be set")):
        with pytest.raises(RunError, match=says):
            set_values(config, [bad])


def parse(monkeypatch, *arguments):
    """The config of a command line of train.py."""
    values = flags.FlagValues()
    holder = define_config(values)
    argv = ["train.py", *map(str, arguments)]
    # config_flags looks there for overrides
    monkeypatch.setattr(sys, "argv", argv)
    parse_flags(argv, values)
    return holder.value


def test_overrides(monkeypatch):
    config = parse(
        monkeypatch,
        "--config=configs/swap.py",
        "--config.train.steps=1e3",
        "--config.train.final_lengths=(8, 16)",
        "--config.task.objects=7",
        "--config.task.queries=True",
        "--config.model.memory=delta_rule,gla",
        "--config.model.memory_options.gla.decay=None",
        "--config.model.memory_options.kda.conv_width=2",
        "--config.model.preset=tiny",
        "--config.model.heads=8",
        "--config.optimizer.learning_rate=1",
    )
    assert (config.train.steps, config.train.final_lengths, config.optimizer.learning_rate) == (1000, (8, 16), 1.0)
    assert (config.task.objects, config.task.queries, config.task.length) == (7, True, 32)
    options = config.model.memory_options.to_dict()
    assert options["gla"] == {"decay": None} and options["kda"] == {"beta_limit": 2.0, "conv_width": 2}
    # the layers' other options are not in the config, nor memories without any
    assert options["delta_rule"] == {"beta_limit": 2.0} and "retnet" not in options
    # an override goes before the preset, and the preset before the file
    assert (config.model.depth, config.model.width, config.model.heads) == (2, 128, 8)
    assert config.model.preset is None and config.is_locked
    settings = model_settings(config.to_dict()["model"])
    assert settings["memory"] == ("delta_rule", "gla") and set(settings["memory_options"]) == {"delta_rule", "gla"}


def test_command_line_that_cannot_be_used(monkeypatch, tmp_path, capsys):
    """One line and exit code 1 each."""
    path = tmp_path / "a b" / "c.py"
    path.parent.mkdir()
    path.write_text(CONFIG_FILE)
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text(
        "from memformer.training.config import default_config\n\n\ndef get_config():\n    default_config().stpes = 1\n"
    )
    (tmp_path / "text.py").write_text("get_config = dict\n")
    cases = [
        ([f"--config={path}", "--config.train.step=3"], "did you mean steps"),
        ([f"--config={path}", "--config.trian.steps=3"], "did you mean train"),
        ([f"--config={path}", "--config.task.lenght=3"], "config.task has no key lenght .*did you mean length"),
        ([f"--config={path}", "--config.model.memory_options.gla.decy=3"], "memory_options.gla has no key decy"),
        ([f"--config={path}", "--config.model.memory_options.gal.decay=3"], "did you mean gsa or gla"),
        (["--config", path, "--config.optimizer.learningrate", "3"], "did you mean learning_rate"),
        ([f"--config={path}", "--config.train.steps=1.5"], "train.steps=1.5: must be a whole number"),
        ([f"--config={path}", "--config.train.steps=nan"], "must be a whole number, got 'nan'"),
        ([f"--config={path}", "--config.model.preset=huge"], "config.model.preset: preset must be one of tiny"),
        ([f"--config={path}", "--config.task.name=mqar"], r"default_config\('mqar'\)"),
        ([f"--config={path}", f"--config={path}"], "--config is given twice"),
        ([f"--config={tmp_path}/none.py"], "there is no file"),
        ([f"--config={tmp_path}"], "there is no file"),
        ([f"--config={tmp_path}/empty.py"], "empty.py does not define it"),
        ([f"--config={tmp_path}/bad.py"], "bad.py, line 5: AttributeError.*stpes"),
        ([f"--config={tmp_path}/text.py"], "must return the config of default_config"),
        (["--config=configs/copy.py:nosuch"], "has no variant 'nosuch'.*ntm, ntm_feedforward, lstm"),
        (["--config=configs/copy.py:ntn"], "did you mean ntm"),
        (["--config=configs/swap.py:x"], "swap.py has no variants"),
        (["--config.train.steps=3"], "needs --config="),
    ]
    for arguments, says in cases:
        with pytest.raises(SystemExit) as stop:
            parse(monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 1 and re.search(says, error) and error.count("\n") == 1, (arguments, error)
    assert parse(monkeypatch, f"--config={path}").task.length == 16


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train.py", "--config must be given"),
        ("eval.py", "--workdir must be given"),
        ("train.py --config=configs/swap.py --config.train.steps=many", "must be a whole number, got 'many'"),
        ("train.py --config=configs/swap.py --speed=9", "Unknown command line flag 'speed'"),
    ],
)
def test_flags_that_cannot_be(command, says):
    """One line and exit code 1, no traceback."""
    done = run_script(*command.split())
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(f"error: .*{says}.* See {command.split()[0]} --help", done.stderr), done.stderr


def test_errors_of_the_user_and_bugs_part(capsys):
    with pytest.raises(SystemExit), report_errors(), run_errors("config.task"):
        raise ValueError("objects must be at least 3")
    assert capsys.readouterr().err == "error: config.task: objects must be at least 3\n"
    with pytest.raises(KeyError), report_errors(), run_errors("config.task"):
        raise KeyError("a bug")
    with pytest.raises(SystemExit), report_errors():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"


def test_changed_keys():
    old = default_config()
    # as config.json gives it back
    new = json.loads(json.dumps(old.to_dict()))
    assert changed_keys(old.to_dict(), new) == []
    new["train"]["steps"], new["mesh"]["tensor"] = 5, 2
    assert changed_keys(old.to_dict(), new, free=FREE_KEYS) == []
    assert changed_keys(old.to_dict(), new) == ["mesh.tensor", "train.steps"]
    new["model"]["width"], new["task"]["objects"], new["optimizer"]["ema"] = 7, 6, 0.5
    assert changed_keys(old.to_dict(), new, free=FREE_KEYS) == ["model.width", "optimizer.ema", "task.objects"]


def test_options_go_to_the_memories_in_use():
    options = {"delta_rule": {"conv_width": 0}, "gla": {"decay_rank": 4}, "softmax_attention": {"window": 8}}
    one = model_settings({"memory": "gla", "memory_options": options})
    assert one == {"memory": "gla", "memory_options": {"decay_rank": 4}}
    several = model_settings({"memory": "delta_rule,delta_rule, gla", "memory_options": options})
    assert several["memory"] == ("delta_rule", "delta_rule", "gla")
    assert several["memory_options"] == {name: options[name] for name in ("delta_rule", "gla")}
    with pytest.raises(RunError, match="one section of options per memory name.*got conv_width = 4"):
        model_settings({"memory": "gla", "memory_options": {"conv_width": 4}})
