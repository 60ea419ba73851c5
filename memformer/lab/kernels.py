"""Kernels under stress (DeltaFormer, NeurIPS 2025): more objects than the key is wide.

Swaps by hand: n objects lie at n places with unit keys k_i of width 128, nearly orthogonal, and values v_i of the same
kind. A swap of a and b is one token with key k_a - k_b and value 0, whose u is read(b) - read(a) (theorem 1); after
each swap place 0 is read at k_0 and named by the nearest value. Nothing is trained: the paper learns that read-out
alone, which for such values is the nearest one. An inner product that should be 0, 1 or 2 is off by what two keys
share; the linear kernel adds these errors up, the round kernel makes each the integer it should be.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.similarity import Kernel
from memformer.lab.study import Study, legend_below, new_figure
from memformer.ops.deltaformer import deltaformer
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["KERNELS", "measure", "nearly_orthogonal", "swap_by_hand"]

WIDTH = 128
# objects to swaps
SIZES = {128: 256, 256: 512, 512: 1024}
KERNELS: dict[str, Kernel] = {
    "linear": Kernel("linear"),
    "round, 2 decimals": Kernel("round", decimals=2),
    # four products of 1/8 make 1/2 exactly, which must not become 1
    "round to integers": Kernel("round", scale=0.999),
}
CLAIM = (
    "At width 128 the linear kernel loses track once there are as many objects as that, the round kernel does not "
    "(DeltaFormer, theorem 1 and its figure of 128, 256 and 512 objects)."
)


def measure(study: Study, *, quick: bool = False) -> None:
    """Follows swaps by hand through each kernel, for fewer and for more objects than keys are wide.

    Args:
      study: takes what comes out.
      quick: 192 objects alone.
    """
    sizes, curves = {192: 128} if quick else SIZES, {}
    for objects, swaps in sizes.items():
        keys, values = (nearly_orthogonal(objects, seed) for seed in (0, 1))
        for name, kernel in KERNELS.items():
            curves[objects, name] = swap_by_hand(keys, values, kernel, swaps=swaps, batch=2 if quick else 8)
            say(f"{objects} objects, {name}: {curves[objects, name].mean():.1%}")
    study.claim = CLAIM
    study.add_table(
        f"Swaps by hand, keys of width {WIDTH}: place 0 named rightly",
        [_row(objects, name, curve) for (objects, name), curve in curves.items()],
    )
    study.values = {f"{objects} {name}": round(float(curve.mean()), 4) for (objects, name), curve in curves.items()}
    told = [
        f"{objects} objects: " + ", ".join(f"{name} {curves[objects, name].mean():.1%}" for name in KERNELS)
        for objects in sizes
    ]
    study.outcome = f"Reads that name the right object, of keys of width {WIDTH}: {'; '.join(told)}."
    fine, none = (np.mean([curves[n, name].mean() for n in sizes]) for name in ("round, 2 decimals", "linear"))
    if fine < none + 0.1:
        study.outcome += " Two decimals (as in the paper's figures) are no remedy here: only whole numbers are."
    _draw(curves, study)


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
    """Share of sequences in which place 0 is named rightly after each swap, [swaps].

    Args:
      keys: of the places, [n, K].
      values: of the objects, [n, V].
      kernel: for writing and reading.
      swaps: in a sequence.
      batch: sequences.
      seed: of the swaps.
    """
    objects, rng = len(keys), np.random.default_rng(seed)
    first = rng.integers(objects, size=(batch, swaps))
    second = (first + 1 + rng.integers(objects - 1, size=(batch, swaps))) % objects
    # every other swap moves what lies at place 0: with many objects a uniform one hardly ever would
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


def _row(objects: int, name: str, curve: np.ndarray) -> dict[str, Any]:
    quarter = len(curve) // 4
    wrong = np.flatnonzero(curve < 1)
    return {
        "objects": objects,
        "swaps": len(curve),
        "kernel": name,
        "all reads": f"{curve.mean():.1%}",
        "last quarter": f"{curve[-quarter:].mean():.1%}",
        "first mistake": f"swap {wrong[0] + 1}" if len(wrong) else "none",
    }


def _draw(curves: Mapping[tuple[int, str], np.ndarray], study: Study) -> None:
    sizes = sorted({objects for objects, _ in curves})
    figure, axes = new_figure(1, len(sizes), width=8.4, height=3.2)
    for axis, objects in zip(axes[0], sizes, strict=True):
        for colour, line, name in zip(COLOURS, ("-", "--", "-."), KERNELS, strict=False):
            curve = curves[objects, name]
            window = max(1, len(curve) // 32)
            smooth = np.convolve(curve, np.ones(window) / window, "valid")
            axis.plot(np.arange(len(smooth)) + window, smooth, line, color=colour, label=name, linewidth=1.6)
        axis.set_ylim(0, 1.04)
        axis.set_title(f"{objects} objects", fontsize=10)
        axis.set_xlabel("swaps")
    axes[0, 0].set_ylabel("place 0 named rightly")
    legend_below(figure, axes[0, 0])
    caption = f"Swaps by hand through keys of width {WIDTH} (running mean over a 32nd of the sequence). Claim: {CLAIM}"
    study.save_figure(figure, "objects", caption)
