"""Every file of configs/ is a complete run: task, model and options build, and the commands of its docstring parse."""

import dataclasses
import importlib.util
import pathlib
import re

import pytest

from memformer.layers.memory import known_options
from memformer.tasks import TASKS
from memformer.training.build import model_settings
from memformer.training.config import default_config, set_values, task_of, unknown_key
from memformer.training.validate import validate

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def variants(name: str) -> tuple[str, ...]:
    """Variants of a config file, given after a colon; () if it has none."""
    return getattr(load(name), "VARIANTS", ())


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_has_a_config():
    arguments = [(name, variant) for name in NAMES for variant in ([(v,) for v in variants(name)] or [()])]
    assert {load(name).get_config(*variant).task.name for name, variant in arguments} == set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    for arguments in [(variant,) for variant in variants(name)] or [()]:
        check_config(load(name).get_config(*arguments))


def check_config(config):
    validate(config.to_dict())
    assert set(config.keys()) == set(default_config().keys())
    task = task_of(config)
    # An override on the command line needs the key to be there.
    assert {*config.task.keys(), *config.data.keys()} == {"name"} | {field.name for field in dataclasses.fields(task)}
    for length in config.train.final_lengths:
        task.with_length(length)
    if config.model.type != "memory_lm":
        assert model_settings(config.to_dict()["model"]) == config.model.to_dict()
        return
    assert config.model.memory in config.model.memory_options
    for memory, options in config.model.memory_options.items():
        assert set(options.keys()) <= set(known_options(memory)), memory
    assert model_settings(config.to_dict()["model"])["memory"] == config.model.memory


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_docstring_name_what_is_there(name):
    text = load(name).__doc__
    for variant in [f":{variant}" for variant in variants(name)] or [""]:
        assert f"python train.py --config=configs/{name}.py{variant} --workdir=runs/" in text
    for path, variant in re.findall(r"--config=([^\s:]+):?(\S*)", text):
        assert pathlib.Path(path).stem in NAMES
        assert not variant or variant in variants(pathlib.Path(path).stem)
    for command in re.sub(r"\\\n\s*", "", text).split("python ")[1:]:
        chosen = re.findall(r"--config=configs/\w+\.py:(\w+)", command.split("\n")[0])
        config = load(name).get_config(*chosen)
        overrides = re.findall(r"--(?:config\.|set=)([\w.]+)=(\S+)", command.split("\n")[0])
        for key, value in overrides:
            assert unknown_key(config, key) is None
            set_values(config, [f"{key}={value}"])
        validate(config.to_dict())
        task_of(config)


def test_the_check_sees_a_typo():
    config = load("swap").get_config()
    assert "did you mean length?" in unknown_key(config, "task.lenght")
