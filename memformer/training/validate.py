"""Checks of the run config: unknown and missing keys, and values that no run can use."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from memformer.core.checks import check, check_at_least, check_choice, check_positive
from memformer.training.config import RunError, default_config, unknown_key
from memformer.training.optimizer import OPTIMIZERS, parse_rate_factors

__all__ = ["OPTIMIZER_RANGES", "SCHEDULES", "validate"]

SCHEDULES = ("constant", "cosine", "warmup_stable_decay", "rsqrt", "exponential")


def validate(config: Mapping[str, Any]) -> None:
    """Raises RunError for the first key that is unknown or missing, or value that no run can use."""
    _check_keys(config, default_config(config.get("model", {}).get("type", "memory_lm")).to_dict())
    try:
        check_at_least("seed", config["seed"], 0)
        _check_train(config["train"])
        _check_optimizer(config["optimizer"])
        check_at_least("lora.rank", config["lora"]["rank"], 0)
        _check_number("lora.alpha", config["lora"]["alpha"], "above 0 and finite", lambda x: 0 < x < math.inf)
        check(isinstance(config["lora"]["targets"], str), "lora.targets", "a string", config["lora"]["targets"])
        for name, least in (("keep_last", 1), ("keep_best", 0)):
            check_at_least(f"checkpoint.{name}", config["checkpoint"][name], least)
    except ValueError as error:
        raise RunError(f"config.{error}; set it with --config.{str(error).split()[0]}=VALUE.") from error


def _check_train(train: Mapping[str, Any]) -> None:
    for name in ("steps", "batch_size", "accumulate", "log_every", "max_skips"):
        check_at_least(f"train.{name}", train[name], 1)
    for name in ("eval_every", "checkpoint_every", "input_workers", "eval_batches", "final_batches"):
        # 0: only at the end, no workers, or all
        check_at_least(f"train.{name}", train[name], 0)
    size, parts = train["batch_size"], train["accumulate"]
    check(size % parts == 0, "train.batch_size", f"a multiple of train.accumulate = {parts}", size)
    _check_number("train.stop_accuracy", train["stop_accuracy"], "between 0 and 1", lambda x: 0 <= x <= 1)
    _check_number("train.label_smoothing", train["label_smoothing"], "in [0, 1)", lambda x: 0 <= x < 1)
    check(isinstance(train["wandb"], str), "train.wandb", "the name of a project, or ''", train["wandb"])
    check_choice("train.on_nan", train["on_nan"], ("abort", "skip"))
    for name in ("profile", "final_lengths"):
        whole = isinstance(train[name], (tuple, list)) and all(_is_whole(x) and x >= 0 for x in train[name])
        check(whole, f"train.{name}", "a tuple of whole numbers", train[name])
    profile = tuple(train["profile"])
    ordered = len(profile) == 2 and profile[0] <= profile[1] and (profile[0] >= 1 or profile == (0, 0))
    check(ordered, "train.profile", "two steps (first, last) with 1 <= first <= last, or (0, 0) for none", profile)
    curriculum = train["curriculum"]
    for name, least in (("start", 1), ("stop", 1), ("factor", 2)):
        check_at_least(f"train.curriculum.{name}", curriculum[name], least)
    start, stop, goal = curriculum["start"], curriculum["stop"], curriculum["accuracy"]
    check(start <= stop, "train.curriculum.stop", f"at least train.curriculum.start = {start}", stop)
    _check_number("train.curriculum.accuracy", goal, "between 0 and 1", lambda x: 0 <= x <= 1)


# The values that an optimizer can use; NaN fails every comparison.
OPTIMIZER_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("above 0 and finite", lambda x: 0 < x < math.inf),
    "end_factor": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "decay_fraction": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "step_factor": ("above 0, at most 1", lambda x: 0 < x <= 1),
    "b1": ("in [0, 1)", lambda x: 0 <= x < 1),
    "b2": ("in [0, 1)", lambda x: 0 <= x < 1),
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "eps": ("above 0 and finite", lambda x: 0 < x < math.inf),
    "weight_decay": ("0 or more and finite", lambda x: 0 <= x < math.inf),
    "clip_norm": ("0 (no clipping) or more and finite", lambda x: 0 <= x < math.inf),
    "ema": ("0 (no average) or a decay below 1", lambda x: 0 <= x < 1),
}


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    check_choice("optimizer.name", optimizer["name"], OPTIMIZERS)
    for name in ("rate_factors", "freeze"):
        check(isinstance(optimizer[name], str), f"optimizer.{name}", "a string", optimizer[name])
    parse_rate_factors(optimizer["rate_factors"])
    check_choice("optimizer.schedule", optimizer["schedule"], SCHEDULES)
    for name, (expected, holds) in OPTIMIZER_RANGES.items():
        _check_number(f"optimizer.{name}", optimizer[name], expected, holds)
    check_positive("optimizer.schedule_steps", optimizer["schedule_steps"])
    check_at_least("optimizer.warmup_steps", optimizer["warmup_steps"], 0)
    check_at_least("optimizer.step_every", optimizer["step_every"], 1)


def _check_number(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    check(number and holds(float(value)), name, expected, value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_keys(config: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "config") -> None:
    for key in config:
        message = unknown_key(known, key, prefix)
        if message:
            raise RunError(message)
    for key, value in known.items():
        if key not in config:
            raise RunError(f"{prefix} has no {key}; a config file must start from default_config().")
        # the keys of these depend on a name in them; what reads them checks them
        open_section = prefix == "config" and key in ("task", "data", "model")
        if isinstance(value, Mapping) and not open_section:
            if not isinstance(config[key], Mapping):
                raise RunError(f"{prefix}.{key} must be a section with {', '.join(value)}, got {config[key]!r}.")
            _check_keys(config[key], value, f"{prefix}.{key}")
