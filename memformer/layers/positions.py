"""Token positions in packed sequences, and their rotary, sinusoidal and learned encodings."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check, check_choice, check_number, check_options
from memformer.core.segments import Segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import Dtypes, named
from memformer.layers.sharding import auto_axes

__all__ = [
    "LearnedPositions",
    "SinusoidalPositions",
    "check_rotary",
    "count_positions",
    "next_position",
    "rotate",
    "sinusoid",
]


def count_positions(
    segments: Segments | None, shape: tuple[int, int], start: Int[Array, "B"] | None = None
) -> Int[Array, "B T"]:
    """Counts tokens from 0 within each segment, without padding.

    Args:
      segments: from `memformer.core.segments.find_segments`, or None where nothing is packed.
      shape: (B, T).
      start: position of the next token of the first segment (decoding); None is 0.

    Returns:
      [B, T] int32. A padding token has the position of the token after it.

    Example:
      >>> from memformer.core.segments import find_segments
      >>> segments = find_segments(jnp.array([[0, 7, 7, 9, 9, 9]]), {})
      >>> count_positions(segments, (1, 6))
      Array([[0, 0, 1, 0, 1, 2]], dtype=int32)
    """
    start = jnp.zeros(shape[0], jnp.int32) if start is None else start
    if segments is None:
        return start[:, None] + jnp.arange(shape[1], dtype=jnp.int32)[None, :]
    valid = segments.valid.astype(jnp.int32)
    before = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
    # Number of tokens before the segment: the count where the index last changed.
    changed = jnp.pad(segments.index[:, 1:] != segments.index[:, :-1], ((0, 0), (1, 0)))
    base = lax.cummax(jnp.where(changed, before, jnp.zeros_like(before)), axis=1)
    first = jnp.where(segments.index == 0, start[:, None], jnp.zeros_like(before))
    return before - base + first


def next_position(positions: Int[Array, "B T"], segments: Segments | None) -> Int[Array, "B"]:
    """The position of the token after the call: one more than that of the last valid token."""
    if segments is None:
        return positions[:, -1] + 1
    order = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(segments.valid, order, jnp.full_like(order, -1)), axis=1, keepdims=True)
    at_last = jnp.take_along_axis(positions, jnp.maximum(last, 0), axis=1)
    # In a row of padding alone nothing was counted, and padding already has the position of the next token.
    return (at_last + (last >= 0).astype(jnp.int32))[:, 0]


# Fields of `rope_scaling` besides rope_type.
SCALINGS = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def check_rotary(width: int, theta: Any, partial: Any, scaling: Mapping[str, Any] | None) -> int:
    """Checks the options of rotary positions; returns how many of the K channels are rotated.

    Args:
      width: K.
      theta: option rope_theta.
      partial: option partial_rotary_factor.
      scaling: option rope_scaling.

    Raises:
      ValueError: a value out of range, an unknown scaling or a field that it lacks, or an odd number of channels.

    Example:
      >>> check_rotary(64, 1e4, 0.25, None)
      16
    """
    check_number("rope_theta", theta, above=0)
    partial = check_number("partial_rotary_factor", partial, above=0)
    check(partial <= 1, "partial_rotary_factor", "in (0, 1]", partial)
    if scaling is not None:
        check(isinstance(scaling, Mapping), "rope_scaling", "None or a mapping", scaling)
        kind: Any = scaling.get("rope_type")
        check_choice("rope_scaling's rope_type", kind, tuple(SCALINGS))
        check_options(f"rope_scaling of {kind!r}", scaling, ("rope_type", *SCALINGS[kind]))
        for name in SCALINGS[kind]:
            check_number(f"rope_scaling's {name}", scaling.get(name), above=0)
    rotated = int(width * partial)
    if rotated % 2 or not rotated:
        part = "" if partial == 1 else f", of which partial_rotary_factor = {partial} leaves {rotated} channels"
        raise ValueError(f"rotary positions require an even key_width, got {width}{part}")
    return rotated


def _scale_rates(rate: Array, scaling: Mapping[str, Any]) -> Array:
    """Llama 3: rates of wavelengths beyond the original context are divided by factor, with a linear transition."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # how often a pair turns within the original context
    turns = rate * (scaling["original_max_position_embeddings"] / (2 * math.pi))
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return rate * kept + rate / scaling["factor"] * (1 - kept)


def rotate(
    x: Float[Array, "B T ... K"],
    positions: Int[Array, "B T"],
    base: float = 1e4,
    *,
    rotated: int | None = None,
    scaling: Mapping[str, Any] | None = None,
) -> Float[Array, "B T ... K"]:
    """Rotary positions: rotates the pairs (x_i, x_{i + K/2}) by the angle positions * base^(-2i / K).

    Source: arXiv 2104.09864, equation 34 (pairs the two halves instead of neighbouring channels).

    Args:
      x: queries or keys, K even.
      positions: [B, T].
      base: the slowest pair completes a turn in about 2 pi base tokens.
      rotated: number of channels that are rotated, the first ones, in place of K; the others pass unchanged.
      scaling: of the rates, for contexts longer than those trained on; see `SCALINGS`.

    Raises:
      ValueError: K is odd.

    Example:
      >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32))
      Array([[[[1., 1.]]]], dtype=float32)
    """
    width = x.shape[-1] if rotated is None else rotated
    if width % 2:
        raise ValueError(f"rotary positions require an even key width, got {width}")
    wide = jnp.promote_types(x.dtype, jnp.float32) if x.dtype != jnp.bfloat16 else jnp.dtype("float32")
    rate = jnp.asarray(base, wide) ** (-jnp.arange(0, width, 2, dtype=wide) / width)
    rate = rate if scaling is None else _scale_rates(rate, scaling)
    places = positions.astype(wide).reshape(*positions.shape, *(1,) * (x.ndim - 2))
    angle = places * rate.reshape(*(1,) * (x.ndim - 1), -1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b, rest = jnp.split(x.astype(wide), (width // 2, width), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def sinusoid(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Sinusoidal encoding in float32: sin in the first half and cos in the second, of positions * 10000^(-2i / D).

    Source: arXiv 1706.03762 section 3.5.
    """
    half = width // 2
    rate = 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None] * rate[None, None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class SinusoidalPositions(nnx.Module):
    """Adds `sinusoid(positions)` to the embeddings; no parameters, any length."""

    def __init__(self, width: int, length: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        del length, rngs
        if width % 2:
            raise ValueError(f"sinusoidal positions require an even width, got {width}")
        self.width = width

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns x plus the encoding of each position."""
        return x + sinusoid(positions, self.width).astype(x.dtype)


class LearnedPositions(nnx.Module):
    """Adds a learned vector per position; a position outside the table of `length` rows gives NaN."""

    def __init__(self, width: int, length: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        init = named(nnx.initializers.normal(0.02), None, "embed")
        self.table = nnx.Param(init(rngs.params(), (length, width), dtypes.param))

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns x plus the encoding of each position."""
        return x + jnp.take(self.table[...].astype(x.dtype), positions, axis=0)
