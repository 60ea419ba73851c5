"""docs/launch.md: its commands are parsed with their overrides; its meshes have the devices that the text names."""

import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest
from absl import flags

from memformer.training.build import build_run
from memformer.training.flags import define_config, define_processes, parse_flags
from memformer.training.topology import TPUS
from memformer.training.validate import validate

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"(train\.py --[^\n\"&]*)", "\n".join(BLOCKS))


def parse(command: str, monkeypatch):
    """Flags and config of a command line of train.py."""
    values = flags.FlagValues()
    holder = define_config(values)
    define_processes(values)
    for kind, name in re.findall(r'flags\.DEFINE_(\w+)\(\s*"(\w+)"', (ROOT / "train.py").read_text()):
        getattr(flags, f"DEFINE_{kind}")(name, None, name, flag_values=values)
    argv = shlex.split(command)
    # config_flags looks there for overrides
    monkeypatch.setattr(sys, "argv", argv)
    assert parse_flags(argv, values) == ["train.py"]
    return values, holder.value


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_commands_are_parsed(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    values, config = parse(COMMANDS[number], monkeypatch)
    validate(config.to_dict())
    shards = config.mesh.data * config.mesh.fsdp
    assert shards < 0 or config.train.batch_size % shards == 0
    kind = re.fullmatch(r"(\w+)-(\d+)", values["dryrun"].value or "")
    if kind and shards > 0 and not values["dryrun_search"].value:
        assert shards * config.mesh.tensor == int(kind[2]) // TPUS[kind[1]][1]


def test_models_are_built(monkeypatch):
    """The task and the model of each command fit each other."""
    monkeypatch.chdir(ROOT)
    seen = []
    for command in COMMANDS:
        config = parse(command, monkeypatch)[1].to_dict()
        if (config["task"], config["model"]) not in seen:
            seen.append((config["task"], config["model"]))
            config["mesh"] = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
            assert build_run(config, devices=jax.devices()[:1]).model.size() > 0
    assert len(seen) >= 4


def test_the_page_has_every_way():
    assert len(COMMANDS) == 10
    for words in ("TPU VM", "xpk", "SLURM", "H200", "--processes=auto", "not run"):
        assert words in PAGE


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_are_shell(number):
    assert subprocess.run(["bash", "-n"], input=BLOCKS[number], text=True, capture_output=True).stderr == ""
