"""Scalars per token in the attention kernels on Hopper: segments, decays, and those of the op.

Rows are the tokens that a program holds, columns come in tiles: queries are rows and keys columns, the other way round
where tiles are transposed. The decays are those of pallas/pair_decay.py.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.decay import CumulativeDecay
from memformer.core.mask import Mask
from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.attention.config import TILE, AttentionConfig
from memformer.pallas.gpu.wgmma import broadcast_rows, load_row
from memformer.pallas.pair_decay import LOG2E, RADIX, block_scalars, row_scalars

__all__ = [
    "column_names",
    "column_values",
    "key_mask",
    "pack_scalars",
    "pair_gap",
    "query_mask",
    "row_names",
    "row_values",
]

ROW_DECAY = ("decay_high", "decay_low", "decay_fraction")
COLUMN_DECAY = ("anchor_high", "anchor_low", "decay_whole", "decay_fraction", "decay_total")


def row_names(config: AttentionConfig) -> tuple[str, ...]:
    """Names of the scalars of rows in every kernel."""
    return _mask_names(config) + ROW_DECAY * config.decay


def column_names(config: AttentionConfig) -> tuple[str, ...]:
    """Names of the scalars of columns in every kernel."""
    return _mask_names(config) + COLUMN_DECAY * config.decay


def _mask_names(config: AttentionConfig) -> tuple[str, ...]:
    return ("segment",) * config.segments + ("rank",) * (config.window is not None)


def row_values(masked: dict[str, Array | None], decay: CumulativeDecay | None) -> dict[str, Array | None]:
    """The scalars by `row_names`, from `query_mask` or `key_mask` and decays [B, heads, T]."""
    return masked | ({} if decay is None else row_scalars(decay))


def column_values(
    masked: dict[str, Array | None], decay: CumulativeDecay | None, *, transposed: bool = False
) -> dict[str, Array | None]:
    """The scalars by `column_names`; in transposed tiles columns come after the rows."""
    anchor = jnp.max if transposed else jnp.min
    return masked | ({} if decay is None else block_scalars(decay, TILE, anchor))


def query_mask(mask: Mask) -> dict[str, Array | None]:
    """Segments and ranks of the queries, [B, T], by name."""
    return {"segment": mask.query_segment, "rank": mask.query_rank}


def key_mask(mask: Mask) -> dict[str, Array | None]:
    """Segments and ranks of the slots, [B, S], by name."""
    return {"segment": mask.key_segment, "rank": mask.key_rank}


def pack_scalars(names: tuple[str, ...], heads: int, values: dict[str, Any]) -> Array:
    """[B, heads, T / 64, names, 64] float32 from [B, T] or [B, heads, T] arrays by name."""
    first = values[names[0]]
    batch, length = first.shape[0], first.shape[-1]

    def by_tile(x):
        x = x.astype(jnp.float32)
        x = jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, (batch, heads, length))
        return x.reshape(batch, heads, length // TILE, TILE)

    return jnp.stack([by_tile(values[name]) for name in names], axis=3)


def pair_gap(
    config: AttentionConfig,
    row: Callable[[str], Any],
    column: Callable[[str], Any],
    *,
    diagonal: bool,
    transposed: bool = False,
) -> Array:
    """The log decay of each pair of a tile to base 2, [64, 64]; positive for pairs against time.

    Args:
      config: sizes.
      row, column: references to a scalar of the rows or columns, [64], by its name.
      diagonal: whether rows and columns are the same tokens.
      transposed: whether columns come after the rows.
    """

    def load(ref):
        return compat.load(ref, plgpu.Layout.WGMMA.reduce(1))

    whole = (load(row("decay_high")) - load(column("anchor_high"))) * RADIX
    whole = whole + (load(row("decay_low")) - load(column("anchor_low")))
    fraction = load(row("decay_fraction"))
    if diagonal or config.restarts:
        gap = broadcast_rows(whole, TILE) - load_row(column("decay_whole"), TILE)
        gap = (gap + (broadcast_rows(fraction, TILE) - load_row(column("decay_fraction"), TILE))) * LOG2E
    else:
        gap = broadcast_rows((whole + fraction) * LOG2E, TILE) - load_row(column("decay_total"), TILE)
    return -gap if transposed else gap
