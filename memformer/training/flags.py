"""The command line of train.py and eval.py: the --config flag, its overrides, and errors as one paragraph."""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from memformer.tasks import import_tasks
from memformer.training.config import (
    RunError,
    add_options,
    apply_preset,
    complete_config,
    drop_options,
    run_errors,
    unknown_key,
)

__all__ = ["define_config", "define_processes", "parse_flags", "read_config", "report_errors", "run_command"]


class _WholeNumber(flags.ArgumentParser):
    """Parses an integer, also written as 1e3."""

    def parse(self, argument: Any) -> int:
        """Returns the integer; raises ValueError for any other text."""
        try:
            return int(argument)
        except ValueError:
            with contextlib.suppress(ValueError, OverflowError):
                if float(argument).is_integer():
                    return int(float(argument))
        raise ValueError(f"must be a whole number, got {argument!r}.")

    def flag_type(self) -> str:
        """The type as --help shows it."""
        return "int"


class _ConfigParser(flags.ArgumentParser):
    """Reads the config file of a --config flag; remembers what it read, to explain errors in overrides."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets the last command line."""
        self.path: str | None = None
        self.task_module = ""
        self.config: ml_collections.ConfigDict | None = None
        self.options: set[str] = set()

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        """Returns the locked config, with room for overrides of all options."""
        if self.path is not None:
            raise RunError(f"--config is given twice, as {self.path} and {argument}; give one config file.")
        self.path, self.config = argument, read_config(argument)
        if self.task_module:
            self.config.task_module = self.task_module
        self.options = add_options(self.config)
        return self.config

    def flag_type(self) -> str:
        """The type as --help shows it."""
        return "config file"


def define_config(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines the flag --config=FILE[:VARIANT] with overrides --config.section.key=value; see `parse_flags`."""
    config_flags.register_flag_parser_for_type(int, _WholeNumber())
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "A file of configs/, or FILE:VARIANT; any key is overridden as --config.section.key=value.",
        flag_values=flag_values,
        lock_config=True,
    )
    flag_values["config"].parser = _ConfigParser()
    return holder


def define_processes(flag_values: flags.FlagValues = flags.FLAGS) -> Callable[[], dict[str, Any]]:
    """Defines --processes, --heartbeat_timeout and --join_timeout; returns what reads them for `join_processes`.

    Example:
      >>> values = flags.FlagValues()
      >>> processes = define_processes(values)
      >>> values(["train.py", "--processes=auto"])
      ['train.py']
      >>> processes()
      {'where': 'auto', 'heartbeat': 100, 'wait': 300}
    """
    where = flags.DEFINE_string(
        "processes",
        "",
        "For several processes: auto (TPU pods, SLURM), or host:port,processes,index.",
        flag_values=flag_values,
    )
    heartbeat = flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds without a sign of life after which a process of several counts as lost.",
        lower_bound=1,
        flag_values=flag_values,
    )
    wait = flags.DEFINE_integer(
        "join_timeout",
        300,
        "Seconds that a process of several waits for the others at the start.",
        lower_bound=1,
        flag_values=flag_values,
    )
    return lambda: {"where": where.value, "heartbeat": heartbeat.value, "wait": wait.value}


def read_config(argument: str) -> ml_collections.ConfigDict:
    """Returns the complete, locked config of "path/to/file.py" or "path/to/file.py:variant".

    Where there is no such file, "configs/swap.py" and "swap" name a config of this library, wherever it is installed.

    Raises:
      RunError: no such file, no get_config, an unknown variant, or an error in the file.
    """
    path, variant = argument, None
    if not os.path.isfile(path) and ":" in argument:
        path, _, variant = argument.rpartition(":")
    path = _find_config(path)
    expected = "--config must name a Python file that defines get_config(), such as configs/swap.py"
    if not os.path.isfile(path):
        raise RunError(f"{expected}; there is no file {path!r}.")
    with open(path, encoding="utf-8", errors="replace") as file:
        # do not run another kind of script
        if "get_config" not in file.read():
            raise RunError(f"{expected}; {path} does not define it.")
    spec = importlib.util.spec_from_loader("run_config", importlib.machinery.SourceFileLoader("run_config", path))
    if spec is None or spec.loader is None:
        raise RunError(f"{expected}, got {path!r}.")
    module = importlib.util.module_from_spec(spec)
    with _ErrorsOf(path):
        spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise RunError(f"{expected}; {path} does not define it.")
    if variant is not None:
        _check_variant(path, variant, module, get_config)
    with _ErrorsOf(path):
        config = get_config() if variant is None else get_config(variant)
    if not isinstance(config, ml_collections.ConfigDict):
        raise RunError(f"get_config() of {path} must return the config of default_config(), got {config!r}.")
    return complete_config(config)


def _find_config(path: str) -> str:
    """The path itself where it is a file, else that of the library's config of this name, if there is one."""
    given, package = pathlib.PurePath(path), pathlib.Path(__file__).parents[1]
    if os.path.isfile(path) or given.parent.parts not in ((), ("configs",)) or given.suffix not in ("", ".py"):
        return path
    # in an installed package, and in a checkout
    places = (folder / "configs" / f"{given.stem}.py" for folder in (package, package.parent))
    return next((str(place) for place in places if place.is_file()), path)


def _check_variant(path: str, variant: str, module: Any, get_config: Any) -> None:
    known = getattr(module, "VARIANTS", None)
    if known is None and not inspect.signature(get_config).parameters:
        raise RunError(f"{path} has no variants, got {path}:{variant}; give --config={path}.")
    if known is not None and variant not in known:
        near = difflib.get_close_matches(variant, known, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise RunError(f"{path} has no variant {variant!r}{hint} It has: {', '.join(known)}.")


class _ErrorsOf:
    """Context manager that reports an error raised by the code of a config file with its line."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None or error is None or not issubclass(kind, Exception):
            return
        frames = [frame for frame in traceback.extract_tb(trace) if frame.filename == self._path]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        where = f"{self._path}, line {line}" if line else self._path
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise RunError(f"{where}: {kind.__name__}: {' '.join(reason.split())}") from error


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Flag parser for `app.run` that reports every mistake in one line.

    The config is locked: an override of a key that it does not have is an error that names the known keys.
    `model.preset` replaces the sizes of the config file, and other overrides win over the preset.
    """
    # eval.py has no such flag
    found = flag_values["config"].parser if "config" in flag_values else None
    parser = found if isinstance(found, _ConfigParser) else _ConfigParser()
    parser.reset()
    with report_errors():
        parser.task_module = _import_tasks(argv) if "task_module" in flag_values else ""
        try:
            rest = flag_values(argv)
        except (flags.Error, AttributeError, KeyError, TypeError) as error:
            explained = _explain(error, argv, parser)
            if explained is None:
                raise
            raise explained from error
        if parser.config is not None:
            _finish(parser.config, parser, config_flags.get_override_values(flag_values["config"]))
    if "verbosity" in flag_values and flag_values["verbosity"].using_default_value:
        # the INFO messages of JAX and Orbax are for their developers; absl keeps a value that the user set
        flag_values["verbosity"].value, flag_values["verbosity"].using_default_value = logging.WARNING, False
    return rest


def _import_tasks(argv: Sequence[str]) -> str:
    """Imports the module of --task_module, before the config file that may use its tasks; returns its name."""
    names = ("--task_module", "-task_module")
    found = [value for flag, sign, value in (each.partition("=") for each in argv) if sign and flag in names]
    found += [value for flag, value in itertools.pairwise(argv) if flag in names]
    for module in found:
        with run_errors("--task_module"):
            import_tasks(module)
    return found[-1] if found else ""


def _finish(config: ml_collections.ConfigDict, parser: _ConfigParser, overrides: dict[str, Any]) -> None:
    """Applies the preset and removes the options that were not set."""
    for key in ("task.name", "model.type"):
        if key in overrides:
            raise RunError(
                f"config.{key} is chosen by the config file, which defines the keys that go with it: give the file "
                f"for {overrides[key]}, or a copy of {parser.path} with default_config({overrides[key]!r})."
            )
    if overrides.get("model.preset") is not None:
        apply_preset(config, overrides["model.preset"], given=tuple(overrides))
    drop_options(config, parser.options - overrides.keys())


def _explain(error: Exception, argv: Sequence[str], parser: _ConfigParser) -> RunError | None:
    """The error of a command line as a sentence; None for a bug."""
    if isinstance(error.__context__, RunError):
        return error.__context__
    keys = [argument.lstrip("-").partition("=")[0] for argument in argv if argument.startswith("-")]
    keys = [key.removeprefix("no") if key.startswith("noconfig.") else key for key in keys]
    overrides = [key.removeprefix("config.") for key in keys if key.startswith("config.")]
    if overrides and parser.config is None:
        return RunError(f"--config.{overrides[0]} needs --config=configs/NAME.py before it.")
    if parser.config is not None and not isinstance(error, flags.Error):
        for key in overrides:
            message = unknown_key(parser.config, key)
            if message:
                return RunError(message)
    if not isinstance(error, (flags.Error, TypeError)):
        return None
    reason = str(error).replace("=None: Flag --", ": --").replace("have a value other than None", "be given")
    return RunError(f"{reason} See {os.path.basename(argv[0])} --help.")


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Ends the program with one paragraph and exit code 1 on a `RunError`; bugs keep their traceback."""
    try:
        yield
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs `main` with the flags that its module defines, from a file such as train.py or as an installed command."""
    for module in (main.__module__, __name__):
        for flag in flags.FLAGS.get_flags_for_module(module):
            # --help shows the flags of the program that was started
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=parse_flags)
