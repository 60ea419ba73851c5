"""What is timed: ops, shapes, inputs, and who runs them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import memformer as mf
from benchmarks import dense

__all__ = ["CASES", "QUICK", "SCALING", "Case", "floor", "function", "inputs"]

TXT = "T x T (plain JAX)"


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
      op: name of the public function.
      length: T.
      heads: H.
      width: K and V.
      variant: what is passed beside q, k, v: "plain", "gated" (decay per head), "channel" (per key channel).
      implementations: ours, by the name passed as `implementation` ("default" is None), and `TXT`.
      peers: names in `benchmarks.peers.PEERS`.
      steps: delta steps a token, for delta_product.
      batch: B.
    """

    op: str
    length: int
    heads: int
    width: int
    variant: str = "plain"
    implementations: tuple[str, ...] = ("default",)
    peers: tuple[str, ...] = ()
    steps: int = 2
    batch: int = 1

    @property
    def shape(self) -> str:
        """Heads and width, as the tables say them."""
        return f"{self.heads} x {self.width}"


TORCH, SDPA, NAIVE = ("torch chunked (transformers)",), ("torch sdpa",), ("FLA naive",)

CASES = (
    Case("delta_rule", 2048, 4, 64, "gated", ("default", "recurrent"), TORCH),
    Case("delta_rule", 2048, 16, 128, "gated", ("default", "recurrent"), TORCH),
    Case("linear_attention", 2048, 4, 64, "gated", ("default", "recurrent", TXT)),
    Case("linear_attention", 2048, 16, 128, "gated", ("default", "recurrent", TXT)),
    Case("softmax_attention", 2048, 4, 64, "plain", ("default", TXT), SDPA),
    Case("softmax_attention", 2048, 16, 128, "plain", ("default", TXT), SDPA),
    # FLA's naive form keeps T copies of the values for its backward: 1024 is as far as it is taken.
    Case("deltaformer", 1024, 4, 64, "plain", ("default", TXT), NAIVE),
    Case("deltaformer", 2048, 4, 64, "plain", ("default", TXT)),
    Case("deltaformer", 2048, 16, 128, "plain", ("default", TXT)),
)

# Fixed-state memories, whose time must be linear in T.
LENGTHS = (8192, 16384, 32768, 65536)
SCALING = tuple(
    tuple(Case(op, length, 4, 64, variant) for length in LENGTHS)
    for op, variant in (
        ("linear_attention", "gated"),
        ("delta_rule", "gated"),
        ("delta_rule", "channel"),
        ("delta_product", "gated"),
    )
)

# The same tables at toy sizes: what the tests run.
QUICK = tuple(
    dataclasses.replace(case, length=48, heads=2, width=8) for case in (CASES[0], CASES[2], CASES[4], CASES[6])
)
QUICK_SCALING = (tuple(Case("delta_rule", length, 2, 8, "gated") for length in (32, 64)),)


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Arguments of the op by name, float32, and `cotangent`, the weight of each output in the summed loss."""
    random = np.random.default_rng(0)
    time = (case.batch, case.length)
    heads, width = case.heads, case.width
    written = (*time, case.steps) if case.op == "delta_product" else time

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    arrays = {
        "q": normal(*time, heads, width),
        "k": normal(*written, heads, width),
        "v": normal(*written, heads, width),
    }
    if case.op in ("delta_rule", "delta_product", "deltaformer"):
        arrays["beta"] = random.uniform(0.1, 0.9, (*written, heads)).astype(np.float32)
    if case.op in ("delta_rule", "delta_product"):
        arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    if case.variant != "plain":
        channel = (width,) if case.variant == "channel" else ()
        arrays["decay"] = -random.uniform(0.0, 0.1, (*time, heads, *channel)).astype(np.float32)
    arrays["cotangent"] = normal(*time, heads, width)
    return arrays


def function(case: Case, implementation: str) -> Callable[..., Any]:
    """The function of an implementation, taking the arrays of `inputs` by name; its first result is the output."""
    if implementation == TXT:
        written = getattr(dense, case.op)
    else:
        written = _ours(getattr(mf, case.op), None if implementation == "default" else implementation)
    if case.op != "deltaformer":
        return written
    # The write queries are q, as in FLA, so that all contestants do the same.
    return lambda q, k, v, beta: written(q, k, v, w=q, beta=beta)


def _ours(op: Callable[..., Any], implementation: str | None) -> Callable[..., Any]:
    return lambda *args, **kwargs: op(*args, **kwargs, implementation=implementation)


def floor(case: Case, gradient: bool) -> tuple[float, float]:
    """FLOPs and bytes that no implementation can do without.

    A fixed-state memory is counted as its recurrence (read, write and, for the delta family, the read before the
    write: 2 K V each; the decay K V), its backward as twice that. Attention is counted over visible pairs, T^2 / 2:
    one product with keys and one with values (DeltaFormer: two of each), its backward as 2.5 times that. Bytes are
    each argument and the output once; in the backward each of them, the cotangent, and each gradient once.
    """
    rows = case.batch * case.heads * case.length
    square = case.width * case.width
    if case.op == "softmax_attention":
        flops, back = 2.0 * rows * case.length * case.width, 2.5
    elif case.op == "deltaformer":
        flops, back = 4.0 * rows * case.length * case.width, 2.5
    elif case.op == "delta_product":
        flops, back = float(rows * square * (2 + 4 * case.steps + 1)), 2.0
    else:
        products = 3 if case.op == "delta_rule" else 2
        flops, back = float(rows * square * (2 * products + (case.variant != "plain"))), 2.0
    arrays = inputs(case)
    out = arrays.pop("cotangent").nbytes
    given = sum(array.nbytes for array in arrays.values())
    if not gradient:
        return flops, given + out
    return flops * (1 + back), 3 * given + 2 * out
