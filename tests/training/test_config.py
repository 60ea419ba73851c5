"""The run config: defaults, overrides and their typos, checks, comparing two runs."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from memformer.training.build import model_settings
from memformer.training.config import (
    RunError,
    changed_keys,
    default_config,
    parse_flags,
    report_errors,
    run_errors,
    set_values,
    unknown_key,
    validate,
)

CONFIG_FILE = """
from memformer.training.config import default_config


def get_config():
    return default_config()
"""

BAD_VALUES = [
    ("train.steps", 0, "at least 1"),
    ("train.batch_size", 0, "at least 1"),
    ("train.log_every", 0, "at least 1"),
    ("train.eval_every", -1, "0 (only at the end)"),
    ("train.accumulate", 3, "a multiple of train.accumulate = 3"),
    ("train.stop_accuracy", 1.5, "between 0 and 1"),
    ("train.on_nan", "ignore", "abort, skip"),
    ("train.profile", (5, 2), "first <= last"),
    ("optimizer.name", "sgd", "adamw"),
    ("optimizer.schedule", "linear", "warmup_stable_decay"),
    ("optimizer.learning_rate", 0.0, "above 0"),
    ("optimizer.clip_norm", -1.0, "0 or more"),
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
    section = key.split(".")[0]
    assert says in str(error.value) and f"config.{section}." in str(error.value)


def test_typo_or_gap_in_a_config_file():
    config = default_config().to_dict()
    with pytest.raises(RunError, match="config.train has no key step .*did you mean steps"):
        validate({**config, "train": {**config["train"], "step": 3}})
    with pytest.raises(RunError, match="config has no key trian .*did you mean train"):
        validate({**config, "trian": {}})
    with pytest.raises(RunError, match="config.optimizer has no learning_rate; .*default_config"):
        validate({**config, "optimizer": {k: v for k, v in config["optimizer"].items() if k != "learning_rate"}})
    with pytest.raises(RunError, match="config.mesh must be a section with context, data, fsdp, tensor, got 8"):
        validate({**config, "mesh": 8})


def test_curriculum_must_climb():
    config = default_config()
    config.train.curriculum.update({"enabled": True, "start": 64, "stop": 32})
    with pytest.raises(RunError, match="1 <= start <= stop"):
        validate(config.to_dict())


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


def test_typo_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "c.py"
    path.write_text(CONFIG_FILE)
    cases = [
        (["train.py", f"--config={path}", "--config.train.step=3"], "did you mean steps"),
        (["train.py", f"--config={path}", "--config.trian.steps=3"], "did you mean train"),
        (["train.py", "--config", str(path), "--config.optimizer.learningrate", "3"], "did you mean learning_rate"),
        (["train.py", f"--config={tmp_path}/none.py"], "must name a Python file"),
        (["train.py", "--config.train.steps=3"], "without --config"),
    ]
    for argv, says in cases:
        with pytest.raises(SystemExit) as stop:
            parse_flags(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 1 and says in error and error.count("\n") == 1, (argv, error)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train.py", "--config must be given"),
        ("eval.py", "--workdir must be given"),
        ("train.py --config=configs/swap.py --config.train.steps=many", "invalid literal for int.*'many'"),
        ("train.py --config=configs/swap.py --speed=9", "Unknown command line flag 'speed'"),
    ],
)
def test_flags_that_cannot_be(command, says):
    """One line and exit code 1, no traceback."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *command.split()], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(f"error: .*{says}.* See {command.split()[0]} --help", done.stderr), done.stderr


def test_errors_of_the_user_and_bugs_part(capsys):
    with pytest.raises(SystemExit), report_errors(), run_errors("config.task"):
        raise ValueError("objects must be at least 3")
    assert capsys.readouterr().err == "error: config.task: objects must be at least 3\n"
    with pytest.raises(KeyError), report_errors(), run_errors("config.task"):
        raise KeyError("a bug")


def test_changed_keys():
    old = default_config()
    # as config.json gives it back
    new = json.loads(json.dumps(old.to_dict()))
    assert changed_keys(old.to_dict(), new) == []
    new["train"]["steps"], new["mesh"]["tensor"] = 5, 2
    assert changed_keys(old.to_dict(), new) == []
    new["model"]["width"], new["task"]["objects"], new["optimizer"]["ema"] = 7, 6, 0.5
    assert changed_keys(old.to_dict(), new) == ["model.width", "optimizer.ema", "task.objects"]


def test_options_go_to_the_memories_in_use():
    options = {"delta_rule": {"conv_width": 0}, "gla": {"decay_rank": 4}, "softmax_attention": {"window": 8}}
    one = model_settings({"memory": "gla", "memory_options": options})
    assert one == {"memory": "gla", "memory_options": {"decay_rank": 4}}
    several = model_settings({"memory": "delta_rule,delta_rule, gla", "memory_options": options})
    assert several["memory"] == ("delta_rule", "delta_rule", "gla")
    assert several["memory_options"] == {name: options[name] for name in ("delta_rule", "gla")}
    with pytest.raises(RunError, match="a section of options for each memory by its name.*got conv_width = 4"):
        model_settings({"memory": "gla", "memory_options": {"conv_width": 4}})
