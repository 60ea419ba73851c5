"""Similarity kernels under stress (DeltaFormer, NeurIPS 2025): more objects than the key is wide.

Constructed swaps: n objects lie at n places with unit keys k_i of width 128, nearly orthogonal, and values v_i of the
same kind. A swap of a and b is one token with key k_a - k_b and value 0, whose u is read(b) - read(a) (theorem 1);
after each swap place 0 is read at k_0 and named by the nearest value. Nothing is trained: the paper learns that
read-out alone, which for such values is the nearest one. An inner product that should be 0, 1 or 2 is off by the
overlap of two keys; the linear kernel adds these errors up, the round kernel makes each the integer it should be.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.similarity import Kernel
from memformer.lab.plots import Lines
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent
from memformer.ops.deltaformer import deltaformer
from memformer.training.metrics import log

__all__ = ["FUNCTIONS", "KERNELS", "nearly_orthogonal", "swap_by_hand"]

WIDTH = 128
FUNCTIONS: Mapping[str, Kernel] = {
    "linear": Kernel("linear"),
    "round, 2 decimals": Kernel("round", decimals=2),
    # four products of 1/8 make 1/2 exactly, which must not become 1
    "round to integers": Kernel("round", scale=0.999),
}


def _measure(runs: Runs, settings: Settings) -> Result:
    rows, values = [], {}
    for objects, swaps in settings["sizes"].items():
        keys, codes = (nearly_orthogonal(objects, seed) for seed in (0, 1))
        for name, kernel in FUNCTIONS.items():
            curve = swap_by_hand(keys, codes, kernel, swaps=swaps, batch=settings["batch"])
            rows.append(_row(objects, name, curve))
            values[f"{objects} {name}"] = round(float(curve.mean()), 4)
            log(f"{objects} objects, {name}: {percent(curve.mean())}")
    return Result([Table(f"Accuracy at place 0 of constructed swaps, keys of width {WIDTH}", rows)], values)


def nearly_orthogonal(vectors: int, seed: int) -> np.ndarray:
    """Unit vectors [vectors, 128] whose inner products are 0, 1/8 or -1/8, drawn from the 16384 Gold sequences.

    x -> (-1)^f(a x^3 + b x) / sqrt(128) over the field of 128 elements, f a linear form on its bits: the difference of
    two has the Walsh spectrum {0, 16, -16} (Gold 1968).

    Example:
      >>> x = nearly_orthogonal(200, 0)
      >>> sorted(set(np.round(8 * (x @ x.T)).astype(int).ravel().tolist()))
      [-1, 0, 1, 8]
    """
    powers = [1]
    for _ in range(WIDTH - 2):
        doubled = 2 * powers[-1]
        # x^7 = x + 1
        powers.append(doubled ^ 0b10000011 if doubled >= WIDTH else doubled)
    power, logarithm = np.array(powers), np.zeros(WIDTH, np.int64)
    logarithm[power] = np.arange(WIDTH - 1)

    def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where((a == 0) | (b == 0), 0, power[(logarithm[a] + logarithm[b]) % (WIDTH - 1)])

    x = np.arange(WIDTH)[None, :]
    chosen = np.random.default_rng(seed).choice(WIDTH * WIDTH, vectors, replace=False)[:, None]
    values = multiply(chosen // WIDTH, multiply(x, multiply(x, x))) ^ multiply(chosen % WIDTH, x)
    return ((1 - 2 * (values & 1)) / np.sqrt(WIDTH)).astype(np.float32)


def swap_by_hand(
    keys: np.ndarray, values: np.ndarray, kernel: Kernel, *, swaps: int, batch: int, seed: int = 0
) -> np.ndarray:
    """Accuracy of the object read at place 0 after each swap, [swaps].

    Args:
      keys: of the places, [n, K].
      values: of the objects, [n, V].
      kernel: of write and read.
      swaps: per sequence.
      batch: number of sequences.
      seed: of the swaps.
    """
    objects, rng = len(keys), np.random.default_rng(seed)
    first = rng.integers(objects, size=(batch, swaps))
    second = (first + 1 + rng.integers(objects - 1, size=(batch, swaps))) % objects
    # every other swap moves the object at place 0: with many objects a uniform one hardly ever would
    first[:, ::2], second[:, ::2] = 0, 1 + rng.integers(objects - 1, size=second[:, ::2].shape)
    same = first == second
    second[same] = (second[same] + 1) % objects
    start = (batch, objects, keys.shape[1])
    k = np.concatenate([np.broadcast_to(keys, start), keys[first] - keys[second]], axis=1)
    v = np.zeros((batch, objects + swaps, values.shape[1]), np.float32)
    v[:, :objects] = values
    q = np.broadcast_to(keys[0], k.shape)
    inputs = (jnp.asarray(x, jnp.float32)[:, :, None] for x in (q, k, v))
    o, _ = jax.jit(deltaformer, static_argnames=("write_kernel", "read_kernel"))(
        *inputs, write_kernel=kernel, read_kernel=kernel
    )
    named = np.argmax(np.asarray(o)[:, objects:, 0] @ values.T, axis=-1)
    return np.mean(named == _followed(objects, first, second), axis=0)


def _followed(objects: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The object at place 0 after each swap, [batch, swaps]."""
    rows = np.arange(len(first))
    places, answers = np.tile(np.arange(objects), (len(first), 1)), np.zeros_like(first)
    for step in range(first.shape[1]):
        a, b = first[:, step], second[:, step]
        places[rows, a], places[rows, b] = places[rows, b], places[rows, a]
        answers[:, step] = places[:, 0]
    return answers


def _row(objects: int, name: str, curve: np.ndarray) -> Row:
    wrong = np.flatnonzero(curve < 1)
    return {
        "objects": objects,
        "swaps": len(curve),
        "kernel": name,
        "accuracy": percent(curve.mean()),
        "last quarter": percent(curve[-(len(curve) // 4) :].mean()),
        "first error": f"swap {wrong[0] + 1}" if len(wrong) else "none",
    }


def _judge(result: Result) -> Verdict:
    def found(kernel: str) -> list[float]:
        return [value for label, value in result.values.items() if label.partition(" ")[2] == kernel]

    linear, decimals, integers = (found(name) for name in FUNCTIONS)
    return Verdict(
        grade(max(linear) < 0.9 and min(integers) == 1, min(decimals) > 0.9),
        f"Accuracy from 512 to 128 objects: linear {percent(min(linear))} to {percent(max(linear))}, rounding to two "
        f"decimals, as in the paper's figures, {percent(min(decimals))} to {percent(max(decimals))}, rounding to "
        f"integers {percent(min(integers))} to {percent(max(integers))}.",
    )


KERNELS = Study(
    name="kernels",
    title="Similarity kernels under stress",
    claim="At width 128 the linear kernel loses track once there are as many objects as that; the round kernel does "
    "not.",
    source="DeltaFormer, NeurIPS 2025, theorem 1 and its figure of 128, 256 and 512 objects",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="kernel",
        points="objects",
        value="accuracy",
        x="objects",
        y="accuracy",
        limits=(0, 1.04),
        options={"x_base": 2},
    ),
    caption="Accuracy at place 0 of constructed swaps, keys of width 128, mean over all swaps of a sequence.",
    # objects to swaps
    settings={"sizes": {128: 256, 256: 512, 512: 1024}, "batch": 8},
    quick=Quick(settings={"sizes": {192: 128}, "batch": 2}),
)
