"""Capacity after training: multi-query associative recall (arXiv 2312.04927) at equal bytes of state.

One layer with a short convolution, which lays a pair into one token, then 16 questions about 16 pairs in 64 tokens. A
matrix memory spends its B bytes (float32) on one head of K = V = sqrt(B / 4). A cache holds every token: one head of
K = V = B / 4 / 64 / 2. Everything else is the same. What no training could improve is measured by `capacity`.
"""

import math
from collections.abc import Mapping
from typing import Any

from memformer.lab.capacity import NUMBER
from memformer.lab.runs import accuracy_by_length, run_rows, train_runs
from memformer.lab.study import Study, new_figure
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["MEMORIES", "head_width", "measure"]

SIZES = (512, 1024, 2048, 4096)
# Display name: memory, its options, whether its state is a cache.
MEMORIES: Mapping[str, tuple[str, Mapping[str, Any], bool]] = {
    "linear attention": ("linear_attention", {"feature_map": "identity", "normalize": False, "unit_keys": True}, False),
    "delta rule": ("delta_rule", {}, False),
    "delta product": ("delta_product", {"steps": 2}, False),
    "softmax attention": ("softmax_attention", {"rotary": False}, True),
    "DeltaFormer": ("deltaformer", {"write_kernel": "linear", "unit_keys": True, "beta_limit": 1.0}, True),
}
BASE: Mapping[str, Any] = {
    "task": {"name": "mqar", "vocab_size": 128, "length": 64, "pairs": 16},
    "model": {"width": 64, "heads": 1, "depth": 1, "feedforward": None},
    "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 50},
    "train": {"steps": 1000, "batch_size": 64, "stop_accuracy": 0.999, "final_batches": 4, "log_every": 50},
}
CLAIM = (
    "At equal bytes of state a memory of fixed size recalls as many pairs as its matrix has room for, by the delta "
    "rule more than by sums; a cache that must hold every token with so few bytes has keys too narrow to tell pairs "
    "apart (2312.04927; 2505.19488, section 2)."
)


def head_width(size: int, cache: bool, tokens: int) -> int:
    """K = V of one head whose state has at most `size` bytes.

    Example:
      >>> head_width(4096, False, 64), head_width(4096, True, 64)
      (32, 8)
    """
    numbers = size // NUMBER
    return numbers // (2 * tokens) if cache else math.isqrt(numbers)


def measure(study: Study, *, quick: bool = False) -> None:
    """Trains one layer of each memory at each size of its state.

    Args:
      study: takes what comes out.
      quick: 2 pairs in 16 tokens, two memories, 4 KiB.
    """
    names, sizes = (("delta rule", "softmax attention"), SIZES[-1:]) if quick else (tuple(MEMORIES), SIZES)
    tokens = 16 if quick else BASE["task"]["length"]
    table = {f"{name} {size}": _changes(name, size, tokens) for name in names for size in sizes}
    smaller = {"task.vocab_size": 16, "task.length": tokens, "task.pairs": 2, "train.steps": 100}
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=smaller)
    pairs = next(iter(runs.values())).config["task"]["pairs"]
    recalled = {label: accuracy_by_length(run)[tokens] * pairs for label, run in runs.items()}
    study.claim = CLAIM
    rows = [_row(name, sizes, tokens, recalled) for name in names]
    study.add_table(f"Of {pairs} pairs in {tokens} tokens, recalled (K = V; test split)", rows)
    study.add_table("What was trained", run_rows(runs))
    study.values = {label: round(value, 3) for label, value in recalled.items()}
    shown = {name: ", ".join(f"{recalled[f'{name} {size}']:.1f}" for size in sizes) for name in names}
    told = "; ".join(f"{name} {counts}" for name, counts in shown.items())
    study.outcome = f"Of {pairs} pairs, with {', '.join(map(str, sizes))} bytes of state: {told}."
    _draw(study, names, sizes, recalled, runs)


def _changes(name: str, size: int, tokens: int) -> dict[str, Any]:
    memory, options, cache = MEMORIES[name]
    width = head_width(size, cache, tokens)
    return {
        "model.memory": memory,
        "model.memory_options": {memory: {"conv_width": 4, **options}},
        "model.key_width": width,
        "model.value_width": width,
    }


def _row(name: str, sizes: tuple[int, ...], tokens: int, recalled: Mapping[str, float]) -> dict[str, Any]:
    cache = MEMORIES[name][2]
    told = {f"{n} bytes": f"{recalled[f'{name} {n}']:.1f} (K = {head_width(n, cache, tokens)})" for n in sizes}
    return {"memory": name} | told


def _draw(
    study: Study,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    recalled: Mapping[str, float],
    runs: Mapping[str, LoadedRun],
) -> None:
    task = next(iter(runs.values())).config["task"]
    figure, axes = new_figure()
    axis = axes[0, 0]
    for colour, name in zip(COLOURS, names, strict=False):
        line = "o--" if MEMORIES[name][2] else "o-"
        axis.plot(sizes, [recalled[f"{name} {size}"] for size in sizes], line, color=colour, label=name, markersize=5)
    axis.axhline(task["pairs"], color="0.4", linestyle=":", label="all")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size / 1024:g}" for size in sizes])
    axis.minorticks_off()
    axis.set_ylim(0, None)
    axis.set_xlabel("state, KiB")
    axis.set_ylabel(f"pairs recalled, of {task['pairs']}")
    figure.legend(loc="outside right center", frameon=False)
    study.save_figure(figure, "pairs", f"Recall after training against bytes of state; dashes: caches. Claim: {CLAIM}")
