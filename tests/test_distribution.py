"""The distribution: its files, commands and extras; an installed command runs without a checkout."""

import configparser
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = ("train", "eval", "generate")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The packages as they are installed."""
    pytest.importorskip("setuptools")
    where = tmp_path_factory.mktemp("distribution")
    arguments = ["build", f"--build-base={where / 'base'}", f"--build-lib={where / 'lib'}"]
    # egg_info is written where the sources are, so sources are linked
    for path in (
        "setup.py",
        "setup.cfg",
        "memformer",
        "configs",
        "README.md",
        "LICENSE",
        *map("{}.py".format, COMMANDS),
    ):
        (where / path).symlink_to(ROOT / path)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return where / "lib"


def test_every_module_and_config_is_installed(installed):
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "memformer").rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "memformer" / "data" / "files").glob("*.tsv")}
    wanted |= {f"memformer/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert found == wanted | {f"memformer/commands/{name}.py" for name in COMMANDS} | {"memformer/py.typed"}


def test_an_installed_command_finds_the_configs(installed, tmp_path):
    code = "import sys; sys.argv[0] = 'memformer-train'; from memformer.commands.train import run; run()"
    arguments = ["--config=swap", "--config.task.lenght=3"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "config.task has no key lenght" in done.stderr, done.stderr


def test_the_metadata():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["metadata"]["name"] == "memformer-jax"
    scripts = settings["options.entry_points"]["console_scripts"].split("\n")[1:]
    assert scripts == [f"memformer-{name} = memformer.commands.{name}:run" for name in COMMANDS]
    for name in COMMANDS:
        assert "\ndef run() -> None:\n" in (ROOT / f"{name}.py").read_text()
    supported = [f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")]
    assert set(supported) <= set(settings["metadata"]["classifiers"].split("\n"))
    extras = dict(settings["options.extras_require"])
    assert {"train", "text", "hf", "evals", "cuda12", "cuda13", "tpu", "test"} <= set(extras)
    # each Python has a jax, and each jax its own libtpu: one line holds on either side of 3.12
    lines = extras["tpu"].split("\n")[1:]
    assert [line.split(";")[1].strip() for line in lines] == ['python_version < "3.12"', 'python_version >= "3.12"']
