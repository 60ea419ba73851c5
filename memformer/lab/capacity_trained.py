"""Capacity after training: multi-query associative recall (arXiv 2312.04927) at equal bytes of state.

One layer with a short convolution, which puts a pair into one token, then 16 questions about 16 pairs in 64 tokens. A
matrix memory spends its B bytes (float32) on one head of K = V = sqrt(B / 4). A cache holds every token: one head of
K = V = B / 4 / 64 / 2. Everything else is the same. `capacity` measures memories without training.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memformer.lab.capacity import NUMBER
from memformer.lab.plots import Lines
from memformer.lab.runs import accuracy_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade

__all__ = ["CAPACITY_TRAINED", "MEMORIES", "head_width"]

SIZES, TOKENS, PAIRS = (512, 1024, 2048, 4096), 64, 16
# Display name to memory, its options, whether its state is a cache.
MEMORIES: Mapping[str, tuple[str, Row, bool]] = {
    "linear attention": ("linear_attention", {"feature_map": "identity", "normalize": False, "unit_keys": True}, False),
    "delta rule": ("delta_rule", {}, False),
    "delta product": ("delta_product", {"steps": 2}, False),
    "softmax attention": ("softmax_attention", {"rotary": False}, True),
    "DeltaFormer": ("deltaformer", {"write_kernel": "linear", "unit_keys": True, "beta_limit": 1.0}, True),
}


def head_width(size: int, cache: bool, tokens: int) -> int:
    """K = V of one head whose state has at most `size` bytes.

    Example:
      >>> head_width(4096, False, 64), head_width(4096, True, 64)
      (32, 8)
    """
    numbers = size // NUMBER
    return numbers // (2 * tokens) if cache else math.isqrt(numbers)


def _rows(names: Sequence[str], sizes: Sequence[int], tokens: int) -> dict[str, Row]:
    return {f"{name} {size}": _changes(name, size, tokens) for name in names for size in sizes}


def _changes(name: str, size: int, tokens: int) -> Row:
    memory, options, cache = MEMORIES[name]
    width = head_width(size, cache, tokens)
    return {
        "model.memory": memory,
        "model.memory_options": {memory: {"conv_width": 4, **options}},
        "model.key_width": width,
        "model.value_width": width,
    }


def _measure(runs: Runs, settings: Settings) -> Result:
    one = next(iter(runs.values()))
    tokens, pairs = one.task.length, one.config["task"]["pairs"]
    recalled = {label: accuracy_by_length(run)[tokens] * pairs for label, run in runs.items()}
    rows: dict[str, dict[str, Any]] = {}
    for label, value in recalled.items():
        name, _, size = label.rpartition(" ")
        width = head_width(int(size), MEMORIES[name][2], tokens)
        rows.setdefault(name, {"memory": name})[f"{size} bytes"] = f"{value:.1f} (K = {width})"
    title = f"Pairs recalled, of {pairs} in {tokens} tokens (K = V; test split)"
    values = {label: round(value, 3) for label, value in recalled.items()}
    return Result([Table(title, list(rows.values()))], values)


def _judge(result: Result) -> Verdict:
    found = result.values
    narrow = max(found["softmax attention 1024"], found["DeltaFormer 1024"]) < 2
    better = all(found[f"delta rule {size}"] > found[f"linear attention {size}"] for size in SIZES)
    counts = "; ".join(
        f"{size} bytes: " + ", ".join(f"{name} {found[f'{name} {size}']:.1f}" for name in MEMORIES)
        for size in SIZES[:2]
    )
    return Verdict(grade(narrow, better), f"Pairs recalled of 16, with {counts}.")


STYLES = {name: {"linestyle": "--"} for name, (_, _, cache) in MEMORIES.items() if cache}
CAPACITY_TRAINED = Study(
    name="capacity_trained",
    title="Capacity after training",
    claim="At equal bytes of state a memory of fixed size recalls as many pairs as its matrix has room for, by the "
    "delta rule more than by sums; a cache that must hold every token in so few bytes has keys too narrow to tell "
    "pairs apart.",
    source="arXiv 2312.04927; 2505.19488, section 2",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="memory",
        points="{} bytes",
        x="bytes of state",
        y="pairs recalled",
        options={"styles": STYLES, "x_base": 2},
    ),
    caption="Pairs recalled of 16 after training, by bytes of state; dashed: caches.",
    base={
        "task": {"name": "mqar", "vocab_size": 128, "length": TOKENS, "pairs": PAIRS},
        "model": {"width": 64, "heads": 1, "depth": 1, "feedforward": None},
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 1000, "batch_size": 64, "stop_accuracy": 0.999, "final_batches": 4, "log_every": 50},
    },
    rows=_rows(tuple(MEMORIES), SIZES, TOKENS),
    quick=Quick(
        _rows(("delta rule",), SIZES[-1:], 16),
        {"task.vocab_size": 16, "task.length": 16, "task.pairs": 2, "train.steps": 100},
    ),
)
