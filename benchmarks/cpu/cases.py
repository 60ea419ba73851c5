"""The cases that benchmarks.cpu times.

Numpy only: the process of the peers imports this module too.
"""

import dataclasses

from benchmarks.cases import RECURRENT, Case

__all__ = [
    "CASES",
    "DENSE",
    "NAIVE",
    "PER_CHANNEL",
    "QUICK",
    "QUICK_PER_CHANNEL",
    "QUICK_SCALING",
    "SCALING",
    "SDPA",
    "TORCH",
    "variant",
]

# The T x T form in plain JAX (benchmarks/cpu/dense.py), and the peers (benchmarks/cpu/peers.py).
DENSE = "T x T (plain JAX)"
TORCH, SDPA, NAIVE = "torch chunked (transformers)", "torch sdpa", "FLA naive"


def _case(
    op: str,
    length: int,
    heads: int,
    width: int,
    implementations: tuple[str, ...] = ("default",),
    peers: tuple[str, ...] = (),
    decay: str = "head",
) -> Case:
    decay = "" if op in ("softmax_attention", "deltaformer") else decay
    steps = 2 if op == "delta_product" else 1
    return Case(
        op, 1, length, heads, heads, width, width, "float32", decay, steps=steps, implementations=implementations,
        peers=peers,
    )  # fmt: skip


CASES = (
    _case("delta_rule", 2048, 4, 64, ("default", RECURRENT), (TORCH,)),
    _case("delta_rule", 2048, 16, 128, ("default", RECURRENT), (TORCH,)),
    _case("linear_attention", 2048, 4, 64, ("default", RECURRENT, DENSE)),
    _case("linear_attention", 2048, 16, 128, ("default", RECURRENT, DENSE)),
    _case("softmax_attention", 2048, 4, 64, ("default", DENSE), (SDPA,)),
    _case("softmax_attention", 2048, 16, 128, ("default", DENSE), (SDPA,)),
    # FLA's naive form keeps T copies of the values for its backward pass, which limits it to T = 1024.
    _case("deltaformer", 1024, 4, 64, ("default", DENSE), (NAIVE,)),
    _case("deltaformer", 2048, 4, 64, ("default", DENSE)),
    _case("deltaformer", 2048, 16, 128, ("default", DENSE)),
)

# Matrix memories, whose time must be linear in T.
LENGTHS = (8192, 16384, 32768, 65536)
SCALING = tuple(
    tuple(_case(op, length, 4, 64, decay=decay) for length in LENGTHS)
    for op, decay in (
        ("linear_attention", "head"),
        ("delta_rule", "head"),
        ("delta_rule", "channel"),
        ("delta_product", "head"),
    )
)

# A decay per head and one per key channel, whose times are compared in one run.
PER_CHANNEL = tuple(
    tuple(_case(op, LENGTHS[0], 4, 64, decay=decay) for decay in ("head", "channel"))
    for op in ("delta_rule", "linear_attention")
)

# The same tables at toy sizes, for the tests.
QUICK = tuple(
    dataclasses.replace(case, length=48, heads=2, groups=2, key=8, value=8)
    for case in (CASES[0], CASES[2], CASES[4], CASES[6])
)
QUICK_SCALING = (tuple(_case("delta_rule", length, 2, 8) for length in (32, 64)),)
QUICK_PER_CHANNEL = (tuple(_case("delta_rule", 32, 2, 8, decay=decay) for decay in ("head", "channel")),)


def variant(case: Case) -> str:
    """The decay as the tables name it: "plain", "gated" (per head) or "channel" (per key channel)."""
    return {"": "plain", "head": "gated", "channel": "channel"}[case.decay]
