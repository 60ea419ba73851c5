"""Few tokens of attention over a cache of fixed capacity on TPU: one kernel that reads the slots in use once.

A program reads blocks of slots with all of their key heads, as they lie in the cache: S G keys are the columns of a
tile, T H queries its rows, and pairs of other heads are masked. So no head is gathered from the cache, and the matrix
unit does G times the work, which it has time for: a block of 128 keys and values of 128 channels in bfloat16 takes
83 cycles of a v5p's core to read, its two products 32 with up to 32 queries. Blocks behind the last slot in use, and
before the first one in the window of any query, are neither read nor computed.

What a token sees and the decays are computed per slot, one row per token and head that has a decay of its own, and
only then repeated for the G columns of each slot, by a gather of lanes. So XLA prepares nothing per key head: segments
are [B, S], a decay is read as it lies in the cache. Rows are ordered by (token, head), or by (token, head of its key
head, key head) where the decay is one per key head: in tiles of all heads that have a decay.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.decay import FORGOTTEN_PAIR
from memformer.core.mask import BLIND, UNSEEN
from memformer.core.sharding import vary_like
from memformer.core.similarity import similarity
from memformer.core.symbolic import round_up
from memformer.core.types import Array
from memformer.pallas.cache_decoding import MOST_SLOTS, CacheConfig, CacheRead, CacheSums, token_values
from memformer.pallas.checks import unsupported
from memformer.pallas.platform import interpreting_for
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.checks import check_tpu
from memformer.pallas.tpu.products import product

__all__ = ["block_sizes", "run"]

# Keys of all heads in one block, at most; and numbers of its tile of scores.
KEYS, SCORES = 2048, 2**18

# Stands for the score of a masked pair.
MASKED = -1e30

# Integers of the tokens, and of each of their decays.
TOKENS = ("segment", "first", "stop", "whole")

# Rows and lanes of a register, rows of one in bfloat16.
SUBLANES, LANES, PACKED = 8, 128, 16

# Where the heads are in every array.
HEADS = 2


@dataclasses.dataclass(frozen=True)
class BlockConfig(CacheConfig):
    """Static settings: those of a cache, and sizes.

    Attributes:
      length: T.
      slots: S.
      heads: H, on one device.
      groups: G, likewise.
      shared: heads of one decay.
      kinds: the similarity of each head of a key head.
      block: slots per block.
      columns: keys that are computed together.
    """

    length: int = dataclasses.field(kw_only=True)
    slots: int = dataclasses.field(kw_only=True)
    heads: int = 0
    groups: int = 0
    shared: int = 1
    kinds: tuple[int, ...] = dataclasses.field(kw_only=True)
    block: int = dataclasses.field(kw_only=True)
    columns: int = dataclasses.field(kw_only=True)

    @property
    def mask_block(self) -> int:
        """Slots of a block of segments and decays: whole registers."""
        return round_up(self.block, LANES)


def _product(a: Array, b: Array, contract: tuple[int, int], precision: lax.Precision) -> Array:
    """A product of operands as they are, at the precision of the call."""
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _weighted_sum(config: BlockConfig, weights: Array, v: Array, bfloat16: bool) -> Array:
    """Weights times values. Values in float32 of a cache whose keys are in bfloat16 are the writes of DeltaFormer."""
    if v.dtype == jnp.bfloat16 or not bfloat16:
        return _product(weights.astype(v.dtype), v, (1, 0), config.precision)
    return product(weights, v, "nn", 1 if config.parts == 1 else 3)


def _bias(config: BlockConfig, refs: dict[str, Any], b: Array, base: Array) -> Array:
    """The log decay of each slot for each token and decay, [T D, slots]; MASKED where the token does not see the slot.

    Args:
      config: settings.
      refs: the references of the kernel.
      b: row of the batch.
      base: the first of these slots.
    """
    at = lax.rem(b, jnp.int32(refs["segments"].shape[0]))
    segment = refs["segments"][pl.ds(at, 1), :]
    slots = base + lax.broadcasted_iota(jnp.int32, segment.shape, 1)

    def token(name):
        at = TOKENS.index(name)
        return refs["tokens"][0, :, at : at + 1]

    seen = (token("segment") == segment) & (slots < token("stop"))
    if config.windowed:
        seen &= slots >= token("first")
    if not config.decays:
        return jnp.where(seen, 0.0, MASKED)
    wholes, fractions = refs["slot_wholes"][0], refs["slot_fractions"][0]
    repeats = refs["tokens"].shape[1] // wholes.shape[0]
    wholes, fractions = (jnp.concatenate([x] * repeats, axis=0) for x in (wholes, fractions))
    gap = (token("whole") - wholes).astype(jnp.float32) + (refs["fractions"][0] - fractions)
    return jnp.where(seen & (gap > FORGOTTEN_PAIR + 1), gap, MASKED)


def _repeat_slots(bias: Array, places: Array, first: int, count: int, groups: int) -> Array:
    """Columns `first` to `first + count` of an array whose columns are the heads of each slot; places: their slots."""
    pieces = []
    for start in range(first, first + count, LANES):
        place = places[:, start : start + LANES]
        index = jnp.broadcast_to(place & (LANES - 1), (bias.shape[0], LANES))
        # The registers that hold the slots of this one.
        near, far = (0, 0) if bias.shape[1] == LANES else (start // groups // LANES, (start + 127) // groups // LANES)
        piece = None
        for n in range(near, far + 1):
            source = bias[:, n * LANES : (n + 1) * LANES]
            found = jnp.take_along_axis(source, index, axis=1, mode="promise_in_bounds")
            piece = found if piece is None else jnp.where(place >= n * LANES, found, piece)
        pieces.append(piece)
    return jnp.concatenate(pieces, axis=1)[:, :count]


def _of_rows(config: BlockConfig, bias_ref: Any, columns: slice, height: int) -> Array:
    """The biases of all rows, [R, columns], from those of the tokens and decays."""
    size = round_up(config.heads, SUBLANES)
    if config.decays:
        tile = round_up(config.heads // config.shared, SUBLANES)
        tiles = [bias_ref[t * tile : (t + 1) * tile, columns] for t in range(config.length)]
        tiles = [x for x in tiles for _ in range(config.shared)]
    else:
        width = columns.stop - columns.start
        tiles = [jnp.broadcast_to(bias_ref[t : t + 1, columns], (size, width)) for t in range(config.length)]
    found = sum(x.shape[0] for x in tiles)
    tiles += [jnp.full((height - found, tiles[0].shape[1]), MASKED, jnp.float32)] * (height > found)
    return jnp.concatenate(tiles, axis=0)


def _kernel(bounds_ref, *flat, config: BlockConfig, names: tuple[str, ...]):
    refs = dict(zip(names, flat, strict=True))
    q_ref, o_ref, top_ref, total_ref = (refs[name] for name in ("q", "o", "top", "total"))
    b, j = pl.program_id(0), pl.program_id(1)
    bfloat16 = q_ref.dtype == jnp.bfloat16
    group, kind = (refs["rows"][:, at : at + 1] for at in (0, 1))

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when((j >= bounds_ref[b, 0]) & (j <= bounds_ref[b, 1]))
    def _():
        first = j * config.block
        base = first // config.mask_block * config.mask_block
        bias, places = _bias(config, refs, b, base), refs["places"][0:1] + (first - base)
        for start in range(0, config.block * config.groups, config.columns):
            columns = slice(start, start + config.columns)
            scores = _product(q_ref[0], refs["k"][0, columns], (1, 1), config.precision)
            refs["bias"][:, columns] = _repeat_slots(bias, places, start, config.columns, config.groups)
            gap = _of_rows(config, refs["bias"], columns, scores.shape[0])
            seen = (gap > MASKED / 2) & (group == refs["places"][1:2, columns])
            found = None
            for i, kernel in enumerate(config.similarities):
                mine = seen & (kind == i) if len(config.similarities) > 1 else seen
                scaled = kernel.scale * scores
                if kernel.normalized:
                    logits = jnp.where(mine, scaled + gap if config.decays else scaled, MASKED)
                    # Rows of another similarity see nothing here: their maximum stays.
                    top = jnp.maximum(top_ref[0], jnp.max(logits, axis=1, keepdims=True))
                    weights = jnp.where(mine, jnp.exp(logits - top[:, :1]), 0.0)
                    rescale = jnp.exp(top_ref[0] - top)
                    top_ref[0] = top
                    total_ref[0] = rescale * total_ref[0] + jnp.sum(weights, axis=1, keepdims=True)
                    o_ref[0] = rescale[:, :1] * o_ref[0]
                else:
                    weights = jnp.where(mine, similarity(kernel, jnp.where(mine, scaled, 0.0)), 0.0)
                    weights = jnp.where(mine, weights * jnp.exp(gap), 0.0) if config.decays else weights
                found = weights if found is None else found + weights
            v = refs["v"][0, columns]
            if config.slots % config.block:
                # Behind the end of the cache a block holds anything.
                rest = (config.slots - first) * config.groups - start
                v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 0) < rest, v, jnp.zeros_like(v))
            o_ref[0] += _weighted_sum(config, found, v, bfloat16)


def _units(x: Array, heads: int, fill: int) -> Array:
    """[B, T, H, ...] to rows [B, R, ...] in tiles of `heads`, padded to whole registers by rows of `fill`."""
    batch, length, count = x.shape[:3]
    x = jnp.moveaxis(x.reshape(batch, length, heads, count // heads, *x.shape[3:]), 3, 2)
    x = x.reshape(batch, length * count // heads, heads, *x.shape[4:])
    padding = [(0, 0), (0, 0), (0, -heads % SUBLANES), *((0, 0),) * (x.ndim - 3)]
    x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(batch, -1, *x.shape[3:])
    # Whole registers in bfloat16 too.
    padding = [(0, 0), (0, -x.shape[1] % PACKED), *((0, 0),) * (x.ndim - 2)]
    return jnp.pad(x, padding, constant_values=fill)


def _tokens(x: Array, like: Array, heads: int) -> Array:
    """The inverse of `_units`, for queries `like` [B, T, H, K]."""
    batch, length, count = like.shape[:3]
    size = round_up(heads, SUBLANES)
    x = x[:, : length * count // heads * size].reshape(batch, -1, size, *x.shape[2:])[:, :, :heads]
    x = x.reshape(batch, length, count // heads, heads, *x.shape[3:])
    return jnp.moveaxis(x, 3, 2).reshape(batch, length, count, *x.shape[4:])


def _rows(config: BlockConfig, heads: int) -> Array:
    """The key head of each row, and the kind of its similarity, [R, 2]; -1 for rows of padding."""
    each = np.arange(config.heads, dtype=np.int32)
    per_group = config.heads // config.groups
    pair = np.stack([each // per_group, np.asarray(config.kinds, np.int32)[each % per_group]], axis=-1)
    return _units(jnp.broadcast_to(jnp.asarray(pair), (1, config.length, *pair.shape)), heads, -1)[0]


def _read(op: str, config: BlockConfig, *arrays: Array) -> tuple[Array, Array, Array]:
    """One device's shard: k, q, v, segments [B, S], bounds [B, 2], integers of tokens [B, T, names], and the decays.

    These are of tokens [B, T, heads], then of slots [B, S, heads]: whole numbers and fractions.
    """
    k, q, v, segments, bounds, tokens, *decay = arrays
    (batch, slots, groups, value), key = v.shape, q.shape[3]
    heads = decay[0].shape[2] if decay else q.shape[2]
    config = dataclasses.replace(config, heads=q.shape[2], groups=groups, shared=q.shape[2] // heads)
    _check_layout(op, groups, key, value)
    block, width = config.block, config.block * groups
    places = np.zeros((2, round_up(width, LANES)), np.int32)
    places[:, :width] = [np.repeat(np.arange(block), groups), np.tile(np.arange(groups), block)]
    missing = max(config.mask_block - slots, 0)
    inputs = {
        "q": _units(q, heads, 0),
        "k": k.reshape(batch, slots * groups, key),
        "v": v.reshape(batch, slots * groups, value),
        "rows": vary_like(_rows(config, heads), q),
        "segments": jnp.pad(segments, ((0, 0), (0, missing)), constant_values=UNSEEN),
        "places": vary_like(jnp.asarray(places), q),
    }
    if decay:
        inputs["fractions"] = _pad_heads(decay[1])[..., None]
        wholes = _pad_heads(decay[0])[..., None]
        tokens = jnp.broadcast_to(jnp.repeat(tokens, wholes.shape[1] // config.length, axis=1), (*wholes.shape[:2], 3))
        tokens = jnp.concatenate([tokens, wholes], axis=-1)
        for name, x in zip(("slot_wholes", "slot_fractions"), decay[2:], strict=True):
            inputs[name] = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, -heads % SUBLANES), (0, missing)))
    else:
        # A token of padding sees nothing: no slot has its segment.
        padding = ((0, 0), (0, -config.length % SUBLANES), (0, 0))
        tokens = jnp.pad(tokens, padding, constant_values=BLIND)
    inputs["tokens"] = tokens
    height = inputs["q"].shape[1]

    def at(j, b, bounds_ref):
        return jnp.clip(j, bounds_ref[b, 0], bounds_ref[b, 1])

    def of_slots(j, b, bounds_ref):
        return at(j, b, bounds_ref) * block // config.mask_block

    def of_batch(*shape):
        return pl.BlockSpec((1, *shape), lambda b, j, bounds_ref: (b, 0, 0))

    def of_all(x):
        return pl.BlockSpec(x.shape, lambda b, j, bounds_ref: (0, 0))

    def of_block(rows, size):
        return pl.BlockSpec((1, rows, size), lambda b, j, bounds_ref: (b, at(j, b, bounds_ref), 0))

    def of_decay(x):
        index = lambda b, j, bounds_ref: (b, 0, of_slots(j, b, bounds_ref))  # noqa: E731
        return pl.BlockSpec((1, x.shape[1], config.mask_block), index)

    together = min(batch, SUBLANES)
    specs = {
        "q": of_batch(height, key),
        "k": of_block(width, key),
        "v": of_block(width, value),
        "rows": of_all(inputs["rows"]),
        "segments": pl.BlockSpec(
            (together, config.mask_block), lambda b, j, bounds_ref: (b // together, of_slots(j, b, bounds_ref))
        ),
        "places": of_all(places),
        "tokens": of_batch(*tokens.shape[1:]),
    }
    if decay:
        specs["fractions"] = of_batch(*inputs["fractions"].shape[1:])
        specs |= {name: of_decay(inputs[name]) for name in ("slot_wholes", "slot_fractions")}
    outputs = {"o": value, "top": LANES, "total": LANES}
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, pl.cdiv(slots, block)),
        in_specs=[specs[name] for name in inputs],
        out_specs=[of_batch(height, n) for n in outputs.values()],
        scratch_shapes=[pltpu.VMEM((tokens.shape[1], places.shape[1]), jnp.float32)],
    )
    o, *stats = pl.pallas_call(
        functools.partial(_kernel, config=config, names=(*inputs, *outputs, "bias")),
        grid_spec=grid,
        out_shape=[varying_result((batch, height, n), jnp.float32, *arrays) for n in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="memformer_attention_decode",
    )(bounds // block, *inputs.values())
    top, total = (_tokens(x[:, :, 0], q, heads) for x in stats)
    return _tokens(o, q, heads), top, total


def _pad_heads(x: Array) -> Array:
    """[B, T, heads] to [B, T heads], heads padded to whole registers."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % SUBLANES)))
    return x.reshape(x.shape[0], -1)


def _check_layout(op: str, groups: int, key: int, value: int) -> None:
    """Refuses caches that XLA would copy to a layout in which all key heads of a slot are rows of one array."""
    if interpreting_for("tpu"):
        return
    # Tiles of 2 or 4 heads by 128 channels are those of all heads as rows where channels fill one tile.
    few = groups in (2, 4) and max(key, value) == 128
    if key % 128 or value % 128 or (groups % 8 and not few):
        raise unsupported(
            op,
            "for decoding takes channels in multiples of 128 and, per device, key heads in multiples of 8 (2 or 4 of"
            f" them with 128 channels), got {key} and {value} channels and {groups} heads",
            "implementation='recurrent' or 'chunked' serves it",
        )


def block_sizes(slots: int, groups: int, rows: int) -> tuple[int, int]:
    """Slots per block, and keys that are computed together.

    Args:
      slots: S.
      groups: G.
      rows: queries of a call, T H.
    """
    block = slots
    if slots * groups > KEYS:
        block = 1
        while 2 * block * groups <= KEYS or block * groups % LANES:
            block *= 2
    block = min(block, slots)
    width = block * groups
    parts = [n for n in range(1, width // LANES + 1) if width % (n * LANES) == 0] or [1]
    return block, width // next((n for n in parts if rows * width <= n * SCORES), parts[-1])


def _bounds(read: CacheRead) -> Array:
    """The first and the last slot that any query of a row of the batch sees, [B, 2]."""
    batch = read.k.shape[0]
    last = jnp.broadcast_to(jnp.maximum(jnp.asarray(read.used, jnp.int32) - 1, 0), (batch,))
    first = jnp.zeros_like(last) if read.first_slot is None else jnp.min(read.first_slot, axis=1)
    return jnp.stack([jnp.minimum(first, last), last], axis=1)


def run(op: str, read: CacheRead) -> CacheSums:
    """Reads a cache at a few queries.

    Args:
      op: name of the public function.
      read: queries and cache.

    Raises:
      NotImplementedError: no TPU; float64; a cache that XLA would copy.
    """
    check_tpu(op, read.q, read.k, read.v)
    (length, heads), (slots, groups) = read.q.shape[1:3], read.k.shape[1:3]
    if slots > MOST_SLOTS:
        raise unsupported(op, f"takes at most {MOST_SLOTS} slots, got {slots}")
    block, columns = block_sizes(slots, groups, length * heads)
    config = BlockConfig.of(read, length=length, slots=slots, kinds=read.kinds, block=block, columns=columns)
    keys = jnp.bfloat16 if read.q.dtype == read.k.dtype == jnp.bfloat16 else jnp.float32
    # Values in bfloat16 where all three are.
    values = jnp.bfloat16 if read.v.dtype == keys == jnp.bfloat16 else jnp.float32
    # k comes first: its heads divide fewer devices than those of q.
    arrays = [read.k.astype(keys), read.q.astype(keys), read.v.astype(values)]
    arrays += [read.key_segment, _bounds(read), jnp.stack(list(token_values(read).values()), axis=-1)]
    heads_of: list[int | None] = [HEADS] * 3 + [None] * 3
    if read.decay is not None:
        arrays += [x for decay in read.decay for x in decay]
        heads_of += [HEADS] * 4
    arrays = [vary_like(x, *arrays) for x in arrays]
    kernel = split_batch_and_heads(_read, (op, config), config.axes, operands=tuple(heads_of), results=(HEADS,) * 3)
    value, top, total = kernel(*arrays)
    return CacheSums(top, total, value)
