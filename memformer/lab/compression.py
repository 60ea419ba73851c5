"""DeltaFormer with a bounded cache: what it tracks is read out now and then, and written back as fresh pairs.

n objects lie at n places. Place i has a unit key k_i, its object a code v_i. A swap of a and b is one token with key
k_a - k_b and value 0: its u is read(b) - read(a), so that a later read at k_a gives what was at b. With inner products
|k_i . k_j| <= 1/8 every product of such keys is within 1/2 of the integer it should be, and the round kernel makes it
that integer: any number of swaps is tracked exactly (DeltaFormer, NeurIPS 2025, theorem 1).

The cache grows by a slot a swap. After every 2 n swaps the n values are read out and n fresh pairs written in place of
the cache (its appendix C): 3 n slots of width O(log n) serve a sequence of any length.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.lab.study import Study, new_figure
from memformer.ops.deltaformer import deltaformer
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["COHERENCE", "codes", "measure", "place_keys", "track"]

# The largest inner product of two keys that the theorem allows.
COHERENCE = 1 / 8
KERNELS = ("round", "linear")


def place_keys(places: int, width: int, seed: int = 0, rounds: int = 200) -> np.ndarray | None:
    """Unit keys [places, width] with |k_i . k_j| <= 1/8 for i != j, or None where the search does not find them.

    Their Gram matrix is moved in turns to the nearest one with small entries off the diagonal and to the nearest one of
    rank `width` (Tropp et al. 2005, "Designing structured tight frames via an alternating projection method").
    """
    keys = np.random.default_rng((seed, places, width)).standard_normal((places, width))
    for _ in range(rounds):
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        gram = keys @ keys.T
        apart = gram - np.diag(np.diag(gram))
        if np.abs(apart).max() <= COHERENCE:
            return keys.astype(np.float32)
        # a little below the bound, so that the bound itself is reached
        wanted = np.clip(apart, -0.96 * COHERENCE, 0.96 * COHERENCE) + np.eye(places)
        values, vectors = np.linalg.eigh(wanted)
        keys = vectors[:, -width:] * np.sqrt(np.maximum(values[-width:], 0))
    return None


def _smallest_keys(places: int) -> np.ndarray:
    """Keys of the smallest width that the search finds, in steps of a quarter octave up from Welch's bound."""
    width = places / (1 + COHERENCE**2 * (places - 1))
    while width < places:
        keys = place_keys(places, math.ceil(width))
        if keys is not None:
            return keys
        width *= 2**0.25
    return np.eye(places, dtype=np.float32)


def codes(places: int) -> np.ndarray:
    """One code of -1 and 1 an object, [places, ceil(log2 places)]."""
    bits = max(1, math.ceil(math.log2(places)))
    return (2.0 * ((np.arange(places)[:, None] >> np.arange(bits)) & 1) - 1).astype(np.float32)


def track(keys: np.ndarray, swaps: np.ndarray, *, kernel: str, between: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Follows swaps, compressing the cache after every `between` of them.

    Args:
      keys: of the places, [n, K].
      swaps: pairs of places, [steps, 2]; steps a multiple of `between`.
      kernel: for writing and reading.
      between: swaps from one compression to the next.

    Returns:
      (largest error of any place's code after each block [blocks], places whose code is wrong then [blocks],
      slots of the cache).

    Example:
      >>> keys, swaps = np.eye(4, dtype=np.float32), np.array([[0, 1], [1, 2], [0, 3], [2, 3]])
      >>> errors, wrong, slots = track(keys, swaps, kernel="round", between=2)
      >>> errors.tolist(), wrong.tolist(), slots
      ([0.0, 0.0], [0, 0], 6)
    """
    places = len(keys)
    value = codes(places)
    truth, stored = np.arange(places), jnp.asarray(value)
    errors, wrong = [], []
    for block in swaps.reshape(-1, between, 2):
        stored = _run_block(jnp.asarray(keys), stored, jnp.asarray(block), kernel)
        for a, b in block:
            truth[[a, b]] = truth[[b, a]]
        read = np.asarray(stored)
        errors.append(float(np.abs(read - value[truth]).max()))
        wrong.append(int(np.sum(np.any((read > 0) != (value[truth] > 0), axis=1))))
    return np.array(errors), np.array(wrong), places + between


@jax.jit(static_argnums=3)
def _run_block(keys: jax.Array, stored: jax.Array, block: jax.Array, kernel: str) -> jax.Array:
    """Writes n pairs, then swaps; returns what the n places then hold."""
    moved = jnp.take(keys, block[:, 0], axis=0) - jnp.take(keys, block[:, 1], axis=0)
    k = jnp.concatenate([keys, moved])
    v = jnp.concatenate([stored, jnp.zeros((len(block), stored.shape[1]), stored.dtype)])
    _, state = deltaformer(
        k[None, :, None], k[None, :, None], v[None, :, None], write_kernel=kernel, read_kernel=kernel
    )
    # one more token, which writes nothing and reads every place, a head each
    nothing = jnp.zeros((1, 1, 1, keys.shape[1]), keys.dtype)
    blank: Any = jnp.zeros((1, 1, 1, stored.shape[1]), stored.dtype)
    read, _ = deltaformer(
        keys[None, None], nothing, blank, write_kernel=kernel, read_kernel=kernel, initial_state=state
    )
    return read[0, 0]


def measure(study: Study, *, quick: bool) -> None:
    """Tracks swaps of n objects with a cache of 3 n slots, exactly (round) or not (linear)."""
    sizes = (8, 24) if quick else (8, 16, 32, 64, 128)
    steps = 500 if quick else 10_000
    study.claim = (
        "With |k_i . k_j| <= 1/8 and round kernels DeltaFormer tracks any number of swaps of n objects in O(n log n) "
        "space if its cache is compressed every O(n) steps (DeltaFormer, NeurIPS 2025, theorem 1 and appendix C); the "
        "linear kernel at the same key width drifts."
    )
    rows, drift = [], {}
    for places in sizes:
        keys = _smallest_keys(places)
        between = 2 * places
        count = -(-steps // between) * between
        rng = np.random.default_rng(places)
        swaps = np.stack([rng.choice(places, 2, replace=False) for _ in range(count)])
        row: dict[str, Any] = {"n": places, "K": keys.shape[1], "V": codes(places).shape[1], "swaps": count}
        for kernel in KERNELS:
            errors, wrong, slots = track(keys, swaps, kernel=kernel, between=between)
            drift[places, kernel] = errors
            row[f"{kernel}: largest error"] = float(f"{np.fmax.reduce(errors):.3g}")
            row[f"{kernel}: wrong places at the end"] = int(wrong[-1])
        row["cache, floats"] = slots * (row["K"] + row["V"])
        row["cache / (n log2 n)"] = round(row["cache, floats"] / (places * math.log2(places)), 1)
        row["floats without compression"] = (places + count) * (row["K"] + row["V"])
        rows.append(row)
        say(f"{places} objects: done")
    study.add_table("Swaps followed with a compressed cache", rows)
    exact = [row["n"] for row in rows if row["round: largest error"] == 0]
    lost = [row["n"] for row in rows if row["linear: wrong places at the end"]]
    ratios = [row["cache / (n log2 n)"] for row in rows]
    study.outcome = (
        f"round is exact after {rows[-1]['swaps']} swaps for n = {', '.join(map(str, exact)) or 'none'}; linear has "
        f"wrong places at the end for n = {', '.join(map(str, lost)) or 'none'}. The cache holds {ratios[0]:.0f} "
        f"n log2 n floats at n = {sizes[0]} and {ratios[-1]:.0f} at n = {sizes[-1]}: at these sizes the width of the "
        f"keys that the search finds still grows faster than log n (from {rows[0]['K']} to {rows[-1]['K']})."
    )
    study.values = {"between": "2 n", "coherence": COHERENCE}
    _draw(study, drift, sizes, rows)


def _draw(study: Study, drift: dict, sizes: tuple[int, ...], rows: list[dict]) -> None:
    figure, axes = new_figure(1, 2, width=9.0, height=3.6)
    left, right = axes[0]
    for colour, places in zip(COLOURS, sizes, strict=False):
        for kernel, style in (("linear", "-"), ("round", ":")):
            errors = drift[places, kernel]
            at = 2 * places * (1 + np.arange(len(errors)))
            left.plot(
                at, np.clip(errors, 1e-8, 1e8), style, color=colour, label=f"n = {places}" if style == "-" else None
            )
    left.set_yscale("log")
    left.set_xlabel("swaps")
    left.set_ylabel("largest error of a code (clipped)")
    left.set_title("linear (lines), round (dotted)")
    left.legend(frameon=False, fontsize="small")
    n = np.array([row["n"] for row in rows])
    right.plot(n, [row["cache, floats"] for row in rows], "o-", color=COLOURS[0], label="compressed cache")
    right.plot(
        n, [row["floats without compression"] for row in rows], "s--", color=COLOURS[1], label="cache kept whole"
    )
    right.plot(n, 30 * n * np.log2(n), ":", color="0.4", label="30 n log2 n")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("objects, n")
    right.set_ylabel("floats kept")
    right.legend(frameon=False, fontsize="small")
    study.save_figure(
        figure,
        "drift",
        "Left: error of what the places hold against swaps; right: floats kept. Claim: round stays exact in O(n log n) "
        "space, linear drifts where keys are not orthogonal.",
    )
