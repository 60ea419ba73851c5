"""The run config: every key with its default, overrides whose typos are errors, and checks.

A file of configs/ starts from `default_config()` and overrides. Sections: `task` (name and that
task's fields), `model`, `optimizer`, `train`, `mesh`, `checkpoint`.
"""

import ast
import contextlib
import difflib
import os
import re
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_dict

__all__ = [
    "RunError",
    "changed_keys",
    "default_config",
    "parse_flags",
    "report_errors",
    "run_errors",
    "set_values",
    "unknown_key",
    "validate",
]

SCHEDULES = ("constant", "cosine", "warmup_stable_decay", "rsqrt", "exponential")

# What may differ between a run and its resumption: nothing here changes the bits of a step.
FREE_KEYS = (
    "train.steps",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.final_lengths",
    "train.final_batches",
    "train.profile",
    "train.compile_cache",
    "train.progress",
    "train.tensorboard",
    "checkpoint",
    "mesh",
)


# Sections whose keys depend on the name chosen in them: whatever reads them names the known keys.
OPEN_SECTIONS = ("task.", "model.")


class RunError(ValueError):
    """A mistake of the one who runs: one paragraph that says what was expected, what came, what to do."""


def default_config(model: str = "memory_lm") -> ml_collections.ConfigDict:
    """Returns the config of a run with every key and its default.

    Args:
      model: a name in `memformer.models.MODELS`, whose keys the section `model` then has.

    Raises:
      RunError: unknown model.

    Example:
      >>> default_config().optimizer.schedule
      'cosine'
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = ml_collections.ConfigDict({"name": "swap"})
    config.model = _memory_lm_defaults() if model == "memory_lm" else _model_defaults(model)
    config.optimizer = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            # constant | cosine | warmup_stable_decay | rsqrt | exponential
            "schedule": "cosine",
            "warmup_steps": 0,
            # cosine and warmup_stable_decay end at this fraction of the learning rate
            "end_factor": 0.1,
            # warmup_stable_decay: fraction of the steps that decay
            "decay_fraction": 0.2,
            # exponential: times `step_factor` every `step_every` steps
            "step_factor": 0.7,
            "step_every": 500,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            # 0 = do not clip
            "clip_norm": 1.0,
            # decay of the exponential moving average of the parameters, used in evaluation; 0 = none
            "ema": 0.0,
        }
    )
    config.train = _train_defaults()
    # one of the four may be -1: whatever devices the others leave
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
    config.checkpoint = ml_collections.ConfigDict({"keep_last": 2, "keep_best": 1})
    return config


def _model_defaults(model: str) -> ml_collections.ConfigDict:
    # here, so that a typo in a flag is told before JAX is loaded
    from memformer.models import MODELS, default_options

    _one_of("model.type", model, tuple(MODELS))
    section = ml_collections.ConfigDict()
    for key, default in default_options(model).items():
        # a placeholder accepts a first value of any type from the command line
        section[key] = config_dict.placeholder(object) if default is None else default
    return section


def _memory_lm_defaults() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "type": "memory_lm",
            # a name in MEMORIES, or several joined by commas: the pattern that layers repeat
            "memory": "deltaformer",
            # options of each memory by its name, so that one file serves --config.model.memory=any
            "memory_options": {},
            "width": 128,
            "depth": 1,
            "heads": 4,
            "key_width": config_dict.placeholder(int),
            "value_width": config_dict.placeholder(int),
            # "none" for blocks of the memory alone
            "feedforward": config_dict.FieldReference("swiglu", field_type=str),
            "feedforward_options": {},
            "positions": config_dict.placeholder(str),
            "max_length": 2048,
            "norm": "rms",
            "tie_embeddings": False,
            "scan_layers": False,
            "remat": config_dict.placeholder(str),
            "dtype": "float32",
            "param_dtype": "float32",
            "dropout": 0.0,
        }
    )


def _train_defaults() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "steps": 1000,
            "batch_size": 64,
            # micro-batches a step: same gradient, less memory
            "accumulate": 1,
            # share of the uniform distribution in what the training loss is taken against
            "label_smoothing": 0.0,
            "log_every": 10,
            # 0 = only at the end
            "eval_every": 100,
            "eval_batches": 4,
            # 0 = only at the end
            "checkpoint_every": 500,
            # ends the run once training and held-out accuracy reach it; 0 = never
            "stop_accuracy": 0.0,
            # abort | skip: what a step with a loss or gradient that is not finite does
            "on_nan": "abort",
            "curriculum": {"enabled": False, "start": 32, "stop": 256, "factor": 2, "accuracy": 0.99},
            # lengths of the table printed at the end; () = the task's own
            "final_lengths": (),
            "final_batches": 8,
            # trace of steps (first, last), both counted from 1, to <workdir>/profile; (0, 0) = none
            "profile": (0, 0),
            # folder of compiled programs kept between runs; "" = none
            "compile_cache": "",
            "tensorboard": True,
            "progress": True,
        }
    )


def validate(config: Mapping[str, Any]) -> None:
    """Raises `RunError` for the first key that is unknown or missing, or value that no run could use."""
    _check_keys(config, default_config(config.get("model", {}).get("type", "memory_lm")).to_dict())
    train, optimizer = config["train"], config["optimizer"]
    for name in ("steps", "batch_size", "accumulate", "log_every", "eval_batches", "final_batches"):
        _expect(train[name] >= 1, f"train.{name}", "at least 1", train[name])
    for name in ("eval_every", "checkpoint_every"):
        _expect(train[name] >= 0, f"train.{name}", "0 (only at the end) or more", train[name])
    size, parts = train["batch_size"], train["accumulate"]
    _expect(size % parts == 0, "train.batch_size", f"a multiple of train.accumulate = {parts}", size)
    _expect(0 <= train["stop_accuracy"] <= 1, "train.stop_accuracy", "between 0 and 1", train["stop_accuracy"])
    _expect(0 <= train["label_smoothing"] < 1, "train.label_smoothing", "0 or more, below 1", train["label_smoothing"])
    _one_of("train.on_nan", train["on_nan"], ("abort", "skip"))
    first, last = train["profile"]
    _expect(0 <= first <= last, "train.profile", "(first, last) with first <= last", train["profile"])
    curriculum = train["curriculum"]
    if curriculum["enabled"]:
        ordered = 1 <= curriculum["start"] <= curriculum["stop"]
        _expect(ordered, "train.curriculum", "1 <= start <= stop", (curriculum["start"], curriculum["stop"]))
        _expect(curriculum["factor"] >= 2, "train.curriculum.factor", "at least 2", curriculum["factor"])
    _one_of("optimizer.name", optimizer["name"], ("adamw",))
    _one_of("optimizer.schedule", optimizer["schedule"], SCHEDULES)
    _expect(optimizer["learning_rate"] > 0, "optimizer.learning_rate", "above 0", optimizer["learning_rate"])
    for name in ("warmup_steps", "weight_decay", "clip_norm"):
        _expect(optimizer[name] >= 0, f"optimizer.{name}", "0 or more", optimizer[name])
    _expect(0 <= optimizer["ema"] < 1, "optimizer.ema", "0 (none) or a decay below 1", optimizer["ema"])
    _expect(optimizer["step_every"] >= 1, "optimizer.step_every", "at least 1", optimizer["step_every"])


def _check_keys(config: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "config") -> None:
    for key in config:
        message = unknown_key(known, key, prefix)
        if message:
            raise RunError(message)
    for key, value in known.items():
        if key not in config:
            raise RunError(f"{prefix} has no {key}; a config file must start from default_config().")
        open_section = f"{key}." in OPEN_SECTIONS
        if isinstance(value, Mapping) and not open_section:
            if not isinstance(config[key], Mapping):
                raise RunError(f"{prefix}.{key} must be a section with {', '.join(value)}, got {config[key]!r}.")
            _check_keys(config[key], value, f"{prefix}.{key}")


def _expect(holds: bool, key: str, expected: str, came: Any) -> None:
    if not holds:
        raise RunError(f"config.{key} must be {expected}, got {came!r}; set it with --config.{key}=VALUE.")


def _one_of(key: str, came: Any, known: Sequence[str]) -> None:
    _expect(came in known, key, "one of " + ", ".join(known), came)


def unknown_key(config: Mapping[str, Any], path: str, prefix: str = "config") -> str | None:
    """Returns the message for a dotted `path` that is not in `config`, or None where it is there.

    Example:
      >>> unknown_key({"train": {"steps": 1, "log_every": 2}}, "train.step")
      'config.train has no key step (from config.train.step); did you mean steps? It has: log_every, steps.'
    """
    at, here = prefix, config
    for part in path.split("."):
        if not isinstance(here, (Mapping, ml_collections.ConfigDict)):
            return f"{at} is a value, not a section, so {prefix}.{path} cannot be set; set {at} itself."
        if part not in here:
            near = difflib.get_close_matches(part, list(here), 3, 0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            return f"{at} has no key {part} (from {prefix}.{path}){hint} It has: {', '.join(sorted(here))}."
        at, here = f"{at}.{part}", here[part]
    return None


def set_values(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
    """Sets `key=value` texts such as "task.objects=6" in place; a typo is a `RunError`.

    Example:
      >>> config = default_config()
      >>> set_values(config, ["train.steps=20"])
      >>> config.train.steps
      20
    """
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign:
            raise RunError(f"expected key=value such as task.length=64, got {text!r}.")
        message = unknown_key(config, path)
        if message and not path.startswith(OPEN_SECTIONS):
            raise RunError(message)
        *parents, last = path.split(".")
        section = config
        try:
            for name in parents:
                if name not in section:
                    section[name] = {}
                section = section[name]
            section[last] = _literal(value)
        except (TypeError, ValueError) as error:
            raise RunError(f"config.{path} cannot be set to {value!r}: {error}") from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, those of `FREE_KEYS` left out.

    Example:
      >>> changed_keys({"seed": 0, "train": {"steps": 5}}, {"seed": 1, "train": {"steps": 9}})
      ['seed']
    """
    changed = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        if path in FREE_KEYS:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_keys(a, b, f"{path}.")
        elif _plain(a) != _plain(b):
            changed.append(path)
    return changed


def _plain(value: Any) -> Any:
    # JSON has lists only
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


@contextlib.contextmanager
def run_errors(what: str) -> Iterator[None]:
    """Turns a ValueError or OSError of the enclosed set-up into a `RunError` that says what was being done."""
    try:
        yield
    except RunError:
        raise
    except (ValueError, OSError) as error:
        raise RunError(f"{what}: {error}") from error


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Ends the program with one paragraph and exit code 1 on a `RunError`; bugs keep their traceback."""
    try:
        yield
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl flag parser, for `app.run`, that holds every --config.KEY against the keys of the config file.

    The flag itself must accept new keys (`accept_new_attributes`): those of `OPEN_SECTIONS` are checked by
    what reads them, which knows what each task and memory takes.
    """
    with report_errors():
        _check_overrides(argv)
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            reason = str(error).replace("=None: Flag --", ": --").replace("have a value other than None", "be given")
            raise RunError(f"{reason} See {os.path.basename(argv[0])} --help.") from error
    verbosity = flags.FLAGS["verbosity"]
    if verbosity.using_default_value:
        # what JAX and Orbax tell at INFO is for their developers; absl leaves alone what was set
        verbosity.value, verbosity.using_default_value = logging.WARNING, False
    return rest


def _check_overrides(argv: Sequence[str]) -> None:
    text = "\n".join(argv)
    found = re.search(r"^--?config[=\n](\S+)", text, re.MULTILINE)
    overrides = re.findall(r"^--?(?:no)?config\.([\w.]+)", text, re.MULTILINE)
    if found is None:
        if overrides:
            raise RunError(f"--config.{overrides[0]} came without --config=configs/NAME.py; name the file first.")
        return
    path, _, argument = found.group(1).partition(":")
    if not os.path.isfile(path):
        raise RunError(
            f"--config must name a Python file that has get_config(), such as configs/swap.py, got {path!r}."
        )
    get_config = runpy.run_path(path)["get_config"]
    config = get_config(argument) if argument else get_config()
    for override in overrides:
        message = unknown_key(config, override)
        if message and not override.startswith(OPEN_SECTIONS):
            raise RunError(message)
