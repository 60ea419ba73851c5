"""Capacity after training: multi-query associative recall (arXiv 2312.04927) at equal bytes of state.

One layer with a short convolution, which puts a pair into one token, then 16 questions about 16 pairs in 64 tokens. A
memory spends its B bytes (float32) on one head of the greatest K = V whose state fits: a matrix memory on K x V numbers
(Based: 1 + K + K^2 rows, and a column of normalisers), a cache on a key and a value of every token and, where it
forgets, the two parts of the token's cumulative decay. Everything else is the same. `capacity` measures memories
without training.

A pair is asked for some 32 tokens after it was written. Where a memory starts with a half-life of one token (HGRN2, the
Forgetting Transformer and gated DeltaFormer, as their papers have it, and Comba, whose one head drew 1.2 tokens with
this seed; most channels of Gated DeltaNet-2 too), 1e-8 to 1e-11 of it is left by then, and the gradient is as small.
`SLOW` has such rows with a slow start. Of Comba that alone is not enough: with a half-life of 69 tokens, but reads at
q - c w with c = 1, it recalls 0.7 pairs after 500 steps. The authors' code advises c = 0.02 for small models.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from memformer.lab.capacity import NUMBER
from memformer.lab.plots import Lines, line_style
from memformer.lab.runs import accuracy_by_length
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade

__all__ = ["CAPACITY_TRAINED", "MEMORIES", "Contender", "head_width"]

SIZES, TOKENS, PAIRS = (512, 1024, 2048, 4096), 64, 16
SUMS, ERASING, CACHES = "sums", "erasing", "caches"


class Contender(NamedTuple):
    """A memory that is trained.

    Attributes:
      kind: the panel of the figure.
      memory: name in `memformer.layers.MEMORIES`.
      options: of its layer.
      numbers: (K = V, tokens) -> numbers of state.
    """

    kind: str
    memory: str
    options: Row
    numbers: Callable[[int, int], int]


def _matrix(width: int, tokens: int) -> int:
    return width * width


def _features(width: int, tokens: int) -> int:
    return (1 + width + width * width) * (width + 1)


def _cache(width: int, tokens: int) -> int:
    return tokens * 2 * width


def _decaying_cache(width: int, tokens: int) -> int:
    return tokens * (2 * width + 2)


_DELTAFORMER: Row = {"write_kernel": "linear", "unit_keys": True, "beta_limit": 1.0}
_SUM: Row = {"feature_map": "identity", "normalize": False, "unit_keys": True}
MEMORIES: Mapping[str, Contender] = {
    "linear attention": Contender(SUMS, "linear_attention", _SUM, _matrix),
    "Based": Contender(SUMS, "based", {}, _features),
    "HGRN2": Contender(SUMS, "hgrn2", {}, _matrix),
    "delta rule": Contender(ERASING, "delta_rule", {}, _matrix),
    "delta product": Contender(ERASING, "delta_product", {"steps": 2}, _matrix),
    "Comba": Contender(ERASING, "comba", {"output_gate": None}, _matrix),
    "Gated DeltaNet-2": Contender(ERASING, "gdn2", {"output_gate": None}, _matrix),
    "RWKV-7": Contender(ERASING, "rwkv7", {"output_gate": None}, _matrix),
    "softmax attention": Contender(CACHES, "softmax_attention", {"rotary": False}, _cache),
    "Forgetting Transformer": Contender(CACHES, "fox", {}, _decaying_cache),
    "DeltaFormer": Contender(CACHES, "deltaformer", _DELTAFORMER, _cache),
    "gated DeltaFormer": Contender(CACHES, "gated_deltaformer", _DELTAFORMER, _decaying_cache),
}


def head_width(name: str, size: int, tokens: int) -> int:
    """The greatest K = V of one head whose state has at most `size` bytes; 0 where there is none.

    Args:
      name: in `MEMORIES`.
      size: in bytes.
      tokens: that a cache holds.

    Example:
      >>> [head_width(name, 4096, 64) for name in ("delta rule", "Based", "softmax attention", "gated DeltaFormer")]
      [32, 9, 8, 7]
    """
    numbers, width = MEMORIES[name].numbers, 0
    while numbers(width + 1, tokens) * NUMBER <= size:
        width += 1
    return width


def _rows(names: Sequence[str], sizes: Sequence[int], tokens: int) -> dict[str, Row]:
    pairs = [(name, size, head_width(name, size, tokens)) for name in names for size in sizes]
    return {f"{name} {size}": _changes(MEMORIES[name], width) for name, size, width in pairs if width}


def _changes(contender: Contender, width: int) -> Row:
    return {
        "model.memory": contender.memory,
        "model.memory_options": {contender.memory: {"conv_width": 4, **contender.options}},
        "model.key_width": width,
        "model.value_width": width,
    }


# What starts otherwise, and the changes of the config; after half the steps. With a slow start alone Comba recalls 0.7.
SLOW: Mapping[str, tuple[str, Row]] = {
    "HGRN2 1024": ("gates above 0.98", {"model.memory_options.hgrn2.lower_bound": 0.98}),
    "Comba 1024": ("seed 2, correction 0.02", {"seed": 2, "model.memory_options.comba.correction": 0.02}),
    "Forgetting Transformer 4096": ("decay_time 100", {"model.memory_options.fox.decay_time": (100, 100)}),
    "gated DeltaFormer 4096": ("decay_time 100", {"model.memory_options.gated_deltaformer.decay_time": (100, 100)}),
}
SLOW_STEPS, SLOWLY = 500, ", slow start"


def _slow_rows() -> dict[str, Row]:
    rows = _rows(tuple(MEMORIES), SIZES, TOKENS)
    return {
        f"{label}{SLOWLY}": {**rows[label], **changes, "train.steps": SLOW_STEPS}
        for label, (_, changes) in SLOW.items()
    }


def _measure(runs: Runs, settings: Settings) -> Result:
    one = next(iter(runs.values()))
    tokens, pairs = one.task.length, one.config["task"]["pairs"]
    recalled = {label: accuracy_by_length(run)[tokens] * pairs for label, run in runs.items()}
    alike = [label for label in runs if not label.endswith(SLOWLY)]
    names = dict.fromkeys(label.rpartition(" ")[0] for label in alike)
    sizes = sorted({int(label.rpartition(" ")[2]) for label in alike})
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"kind": MEMORIES[name].kind, "memory": name}
        for size in sizes:
            value, width = recalled.get(f"{name} {size}"), head_width(name, size, tokens)
            row[f"{size} bytes"] = "no room" if value is None else f"{value:.1f} (K = {width})"
        rows.append(row)
    tables = [Table(f"Pairs recalled, of {pairs} in {tokens} tokens (K = V; test split)", rows)]
    slow = [_slow_row(label, recalled) for label in SLOW if f"{label}{SLOWLY}" in runs]
    if slow:
        tables.append(Table(f"Pairs recalled with a slow start, after {SLOW_STEPS} steps", slow))
    return Result(tables, {label: round(value, 3) for label, value in recalled.items()})


def _slow_row(label: str, recalled: Mapping[str, float]) -> Row:
    name, _, size = label.rpartition(" ")
    now, before = (f"{recalled[key]:.1f}" for key in (f"{label}{SLOWLY}", label))
    return {"memory": name, "bytes": size, "change": SLOW[label][0], "pairs": now, "without the change": before}


# Comba, Gated DeltaNet-2 and RWKV-7 recall as much as the delta rule if they miss at most so many pairs, in the mean.
TOLERANCE = 0.5


def _judge(result: Result) -> Verdict:
    found = result.values
    caches = [name for name, contender in MEMORIES.items() if contender.kind == CACHES]
    narrow = max(found[f"{name} 1024"] for name in caches) < 2
    better = all(found[f"delta rule {size}"] > found[f"linear attention {size}"] for size in SIZES)
    mean = {name: fmean(found[f"{name} {size}"] for size in SIZES) for name in MEMORIES if name not in caches}
    gated = min(mean["Comba"], mean["Gated DeltaNet-2"], mean["RWKV-7"]) >= mean["delta rule"] - TOLERANCE
    forgetting, features = mean["HGRN2"] < mean["delta rule"], mean["Based"] > mean["linear attention"]
    means = ", ".join(f"{name} {value:.1f}" for name, value in mean.items())
    narrowest = ", ".join(f"{name} {found[f'{name} 1024']:.1f}" for name in caches)
    small = f"{found['delta rule 512']:.1f} by the delta rule and {found['linear attention 512']:.1f} by sums"
    slow = ", ".join(
        f"{label.rpartition(' ')[0]} {found[f'{label}{SLOWLY}']:.1f} ({found[label]:.1f})" for label in SLOW
    )
    return Verdict(
        grade(narrow, better, gated, forgetting, features),
        f"Pairs recalled of 16, mean over the sizes: {means}; at 512 bytes {small}; caches at 1024 bytes: {narrowest}. "
        "Where a memory forgets half with every token at the start of training (HGRN2, the caches with a forget gate, "
        "the one head of Comba, most channels of Gated DeltaNet-2), 1000 steps seldom teach it to recall, though it "
        "has room. After 500 steps from a slow start (after 1000 without; Comba also with a smaller correction): "
        f"{slow}.",
    )


STYLES = {name: line_style(index) for index, name in enumerate(MEMORIES)}
CAPACITY_TRAINED = Study(
    name="capacity_trained",
    title="Capacity after training",
    claim="At equal bytes of state a memory of fixed size recalls as many pairs as its matrix has room for, by the "
    "delta rule more than by sums, and no less where erasing has gates of its own (Comba, Gated DeltaNet-2, RWKV-7); a "
    "forget gate (HGRN2) does not replace erasing; sums of features (Based) recall more than plain ones. A cache that "
    "must hold every token in so few bytes has keys too narrow to tell pairs apart.",
    source="arXiv 2312.04927; 2505.19488, section 2; 2402.18668",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="memory",
        points="{} bytes",
        x="bytes of state",
        y="pairs recalled",
        panel="kind",
        limits=(-0.5, 16.5),
        options={"styles": STYLES, "x_base": 2},
    ),
    caption="Pairs recalled of 16 after training, by bytes of state.",
    base={
        "task": {"name": "mqar", "vocab_size": 128, "length": TOKENS, "pairs": PAIRS},
        "model": {"width": 64, "heads": 1, "depth": 1, "feedforward": None},
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 1000, "batch_size": 64, "stop_accuracy": 0.999, "final_batches": 4, "log_every": 50},
    },
    rows={**_rows(tuple(MEMORIES), SIZES, TOKENS), **_slow_rows()},
    quick=Quick(
        _rows(("delta rule",), SIZES[-1:], 16),
        {"task.vocab_size": 16, "task.length": 16, "task.pairs": 2, "train.steps": 100},
    ),
)
