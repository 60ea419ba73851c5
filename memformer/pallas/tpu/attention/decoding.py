"""Few tokens of attention over a cache of fixed capacity on TPU: one kernel that reads the slots in use once.

A program reads blocks of slots with all of their key heads, as they lie in the cache, and takes the heads apart in
VMEM: the rows of one head lie G rows apart, and a load can step over rows of 32 bits. In bfloat16 such a row holds two
heads, so that the block is stored as integers first, and each half becomes a head. The rows of a tile of scores are the
queries of one key head, its columns the slots. Blocks behind the last slot in use, and before the first one in the
window of any query, are neither read nor computed.

Rows are ordered by (similarity, head, token), where the tokens of a head fill whole registers; a call of one token has
one row per head. So what the tokens see is one tile per block of slots for all heads, and a decay is read as it lies in
the cache: XLA prepares nothing per slot and key head.
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
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.checks import check_tpu
from memformer.pallas.tpu.interleave import Steps, interleave
from memformer.pallas.tpu.products import product

__all__ = ["block_slots", "run"]

# Slots times key heads of one block where that is at least `LANES` slots.
KEYS = 2048

# Pairs of key heads that are interleaved.
TOGETHER = 4

# Stands for the score of a masked pair; half of it is less than any other score.
MASKED = -1e30

# Integers of the tokens.
TOKENS = ("segment", "first", "stop")

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
      kinds: the similarity of each head of a key head.
      groups: G, on one device.
      block: slots per block.
    """

    length: int = dataclasses.field(kw_only=True)
    slots: int = dataclasses.field(kw_only=True)
    kinds: tuple[int, ...] = dataclasses.field(kw_only=True)
    groups: int = 0
    block: int = 0

    @property
    def mask_block(self) -> int:
        """Slots of a block of segments and decays: whole registers."""
        return round_up(self.block, LANES)

    @property
    def tokens(self) -> int:
        """Rows of a head."""
        return 1 if self.length == 1 else round_up(self.length, SUBLANES)

    def sections(self) -> list[tuple[list[int], int, int]]:
        """The heads of a key head that read with each similarity, and where their rows start and stop."""
        found, start = [], 0
        for kind in range(len(self.similarities)):
            heads = [head for head, of_head in enumerate(self.kinds) if of_head == kind]
            stop = start + round_up(len(heads) * self.tokens, SUBLANES)
            if kind == len(self.similarities) - 1:
                stop = round_up(stop, PACKED)
            found.append((heads, start, stop))
            start = stop
        return found


def _product(a: Array, b: Array, contract: tuple[int, int], precision: lax.Precision) -> Array:
    """A product of operands as they are, at the precision of the call."""
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _weighted_sum(config: BlockConfig, weights: Array, v: Array, bfloat16: bool) -> Array:
    """Weights times values. Values in float32 of a cache whose keys are in bfloat16 are the writes of DeltaFormer."""
    if v.dtype == jnp.bfloat16 or not bfloat16:
        return _product(weights.astype(v.dtype), v, (1, 0), config.precision)
    return product(weights, v, "nn", 1 if config.parts == 1 else 3)


def _seen(config: BlockConfig, refs: dict[str, Any], b: Array, first: Array) -> Array:
    """0 where a token sees a slot, else MASKED, [tokens, block].

    Args:
      config: settings.
      refs: the references of the kernel.
      b: row of the batch.
      first: slot of the block.
    """
    segment = refs["segments"][pl.ds(lax.rem(b, jnp.int32(refs["segments"].shape[0])), 1), : config.block]
    slots = first + lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    of_token = {name: refs["tokens"][:, at : at + 1] for at, name in enumerate(TOKENS)}
    seen = (of_token["segment"] == segment) & (slots < of_token["stop"])
    if config.windowed:
        seen &= slots >= of_token["first"]
    return jnp.where(seen, 0.0, MASKED)


def _bias(config: BlockConfig, refs: dict[str, Any], seen: Array, group: int, heads: list[int], rows: int) -> Array:
    """The summand of the logits of a key head's rows of one similarity, [rows, block]: decay, or MASKED."""
    if not config.decays:
        tile = seen
    elif config.decays == 1:
        tile = _gap(config, refs, seen, group, 1)
    elif config.length > 1:
        tile = jnp.concatenate([_gap(config, refs, seen, group * config.decays + head, 1) for head in heads], axis=0)
    else:
        tile = _gap(config, refs, seen, group * config.decays + heads[0], len(heads))
    if tile.shape[0] == 1:
        return jnp.broadcast_to(tile, (rows, config.block))
    if config.decays < 2 and config.length > 1:
        tile = jnp.concatenate([tile] * len(heads), axis=0)
    # Nobody reads rows of padding.
    missing = rows - tile.shape[0]
    return jnp.concatenate([tile, jnp.zeros((missing, config.block), jnp.float32)], axis=0) if missing else tile


def _gap(config: BlockConfig, refs: dict[str, Any], seen: Array, decay: int, count: int) -> Array:
    """The log decay of each slot for the tokens of `count` decays from one on, one row each; MASKED where not seen."""
    slots = [refs[name][decay : decay + count, : config.block] for name in ("slot_wholes", "slot_fractions")]
    at = slice(decay * config.tokens, (decay + count) * config.tokens)
    whole, fraction = (refs[name][at, :] for name in ("token_wholes", "token_fractions"))
    gap = (whole - slots[0]).astype(jnp.float32) + (fraction - slots[1])
    return jnp.where((seen > MASKED / 2) & (gap > FORGOTTEN_PAIR + 1), gap, MASKED)


def _copied(x: Array, groups: int) -> bool:
    """Whether the heads of blocks of k or v are taken from a copy: loads step over rows of 32 bits and one register."""
    return groups > 1 and (x.dtype == jnp.bfloat16 or x.shape[-1] > LANES)


def _copy(ref: Any, copy_ref: Any) -> None:
    """Copies a block to rows of 32 bits, [columns of registers, rows, lanes]."""
    x = pltpu.bitcast(ref[...], jnp.int32) if ref.dtype == jnp.bfloat16 else ref[...]
    for i in range(copy_ref.shape[0]):
        copy_ref[i] = x[:, i * LANES : i * LANES + copy_ref.shape[2]]


def _take_heads(ref: Any, copy_ref: Any, config: BlockConfig, first: int) -> list[Array]:
    """The rows [block, channels] of two key heads, or of the only one, of a block whose rows are (slot, head)."""
    block, groups = config.block, config.groups
    if groups == 1:
        return [ref[...]]

    def every(stride, first):
        rows = pl.ds(first, block, stride=stride) if stride > 1 else slice(None)
        if copy_ref is None:
            return ref[rows, :]
        return jnp.concatenate([copy_ref[i, rows, :] for i in range(copy_ref.shape[0])], axis=1)

    if ref.dtype != jnp.bfloat16:
        return [every(groups, first), every(groups, first + 1)]
    pair = every(groups // 2, first // 2)
    # A bfloat16 is the upper half of a float32.
    shifted = pair << 16, pair & jnp.int32(-(1 << 16))
    return [lax.bitcast_convert_type(x, jnp.float32).astype(jnp.bfloat16) for x in shifted]


def _lanes(x: Array, count: int) -> Array:
    """[rows, LANES] of equal columns to [rows, count]."""
    return jnp.concatenate([x] * pl.cdiv(count, LANES), axis=1)[:, :count]


def _sum_registers(x: Array) -> Array:
    """[rows, columns] to sums [rows, LANES] whose sum over lanes is that over columns."""
    rows, columns = x.shape
    if columns % LANES:
        x = jnp.concatenate([x, jnp.zeros((rows, -columns % LANES), x.dtype)], axis=1)
    return sum(x[:, at : at + LANES] for at in range(0, columns, LANES))


def _weights(config: BlockConfig, refs: dict[str, Any], group: int, scores: Array, bias: Array, kind: int, start: int):
    """Weights of the rows of one similarity from `start` on, and the factor on their output, which a softmax has.

    A softmax updates its maximum, and its sum, of which every lane holds a part.
    """
    kernel = config.similarities[kind]
    scaled = kernel.scale * scores
    if not kernel.normalized:
        mine = bias > MASKED / 2
        weights = similarity(kernel, jnp.where(mine, scaled, 0.0))
        return jnp.where(mine, weights * jnp.exp(bias) if config.decays else weights, 0.0), None
    top_ref, total_ref = (refs[name].at[group, start : start + scores.shape[0]] for name in ("top", "total"))
    logits, before = scaled + bias, top_ref[...]
    top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - _lanes(top, config.block))
    rescale = jnp.exp(before - top)
    top_ref[...] = top
    total_ref[...] = rescale * total_ref[...] + _sum_registers(weights)
    return weights, rescale


def _read_pair(config: BlockConfig, refs: dict[str, Any], seen: Array, pair: int, first: Array) -> Steps:
    """Adds what the queries of two key heads read from a block of slots."""

    def take(name):
        heads = _take_heads(refs[name], refs.get(f"{name}_copy"), config, pair)
        if config.slots % config.block == 0:
            return heads
        # Behind the end of the cache a block holds anything.
        inside = lax.broadcasted_iota(jnp.int32, (config.block, 1), 0) < config.slots - first
        return [jnp.where(inside, x, jnp.zeros_like(x)) for x in heads]

    scores = [_product(refs["q"][group], k, (1, 1), config.precision) for group, k in enumerate(take("k"), pair)]
    yield
    weights = []
    for group, of_head in enumerate(scores, pair):
        parts = []
        for kind, (members, start, stop) in enumerate(config.sections()):
            bias = _bias(config, refs, seen, group, members, stop - start)
            parts.append(_weights(config, refs, group, of_head[start:stop], bias, kind, start))
        weights.append(parts)
        yield
    bfloat16 = refs["q"].dtype == jnp.bfloat16
    for group, (parts, v) in enumerate(zip(weights, take("v"), strict=True), pair):
        found = [x for x, _ in parts]
        read = _weighted_sum(config, jnp.concatenate(found, axis=0) if len(found) > 1 else found[0], v, bfloat16)
        yield
        for (_, start, stop), (_, rescale) in zip(config.sections(), parts, strict=True):
            o_ref = refs["o"].at[group, start:stop]
            before = o_ref[...] if rescale is None else _lanes(rescale, read.shape[1]) * o_ref[...]
            o_ref[...] = before + read[start:stop]


def _kernel(bounds_ref, *flat, config: BlockConfig, names: tuple[str, ...]):
    refs = dict(zip(names, flat, strict=True))
    b, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        # A softmax that has seen nothing gives masked pairs exp(MASKED / 2) = 0.
        refs["top"][...] = jnp.full_like(refs["top"], MASKED / 2)
        refs["total"][...] = jnp.zeros_like(refs["total"])
        refs["o"][...] = jnp.zeros_like(refs["o"])

    @pl.when((j >= bounds_ref[b, 0]) & (j <= bounds_ref[b, 1]))
    def _():
        first = j * config.block
        seen = _seen(config, refs, b, first)
        for name in ("k", "v"):
            if f"{name}_copy" in refs:
                _copy(refs[name], refs[f"{name}_copy"])
        pairs = range(0, config.groups, 2)
        for start in range(0, len(pairs), TOGETHER):
            interleave([_read_pair(config, refs, seen, pair, first) for pair in pairs[start : start + TOGETHER]])


def _to_rows(config: BlockConfig, x: Array) -> Array:
    """[B, T, H, K] to [B, G, R, K]."""
    batch, length, heads, width = x.shape
    x = x.reshape(batch, length, config.groups, heads // config.groups, width)
    x = jnp.pad(jnp.moveaxis(x, 1, 3), ((0, 0),) * 3 + ((0, config.tokens - length), (0, 0)))
    parts = []
    for members, start, stop in config.sections():
        part = x[:, :, np.asarray(members)].reshape(batch, config.groups, -1, width)
        parts.append(jnp.pad(part, ((0, 0), (0, 0), (0, stop - start - part.shape[2]), (0, 0))))
    return jnp.concatenate(parts, axis=2)


def _from_rows(config: BlockConfig, x: Array) -> Array:
    """[B, G, R, V] to [B, T, H, V]."""
    batch, groups, _, width = x.shape
    parts, order = [], []
    for members, start, _ in config.sections():
        part = x[:, :, start : start + len(members) * config.tokens]
        parts.append(part.reshape(batch, groups, len(members), config.tokens, width)[:, :, :, : config.length])
        order += members
    x = jnp.concatenate(parts, axis=2)[:, :, np.argsort(order)]
    return jnp.moveaxis(x, 3, 1).reshape(batch, config.length, -1, width)


def _column(config: BlockConfig, x: Array) -> Array:
    """[B, T, heads] to a column [B, heads tokens, 1]."""
    x = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, config.tokens - config.length)))
    return x.reshape(x.shape[0], -1, 1)


def _read(op: str, config: BlockConfig, *arrays: Array) -> tuple[Array, Array, Array]:
    """One device's shard: k, q, v, segments [B, S], bounds [B, 2], integers of tokens [B, T, names], and the decays.

    These are of tokens [B, T, heads], then of slots [B, S, heads]: whole numbers and fractions.
    """
    k, q, v, segments, bounds, tokens, *decay = arrays
    (batch, slots, groups, value), key = v.shape, q.shape[3]
    config = dataclasses.replace(config, groups=groups, block=block_slots(slots, groups))
    _check_layout(op, groups, key, value)
    block, width = config.block, config.block * groups
    missing = max(config.mask_block - slots, 0)
    # A token of padding sees nothing: no slot has its segment.
    padding = ((0, 0), (0, config.tokens - config.length), (0, 0))
    inputs = {
        "q": _to_rows(config, q),
        "k": k.reshape(batch, slots * groups, key),
        "v": v.reshape(batch, slots * groups, value),
        "segments": jnp.pad(segments, ((0, 0), (0, missing)), constant_values=UNSEEN),
        "tokens": jnp.pad(tokens, padding, constant_values=BLIND),
    }
    if decay:
        inputs |= {
            name: _column(config, x) for name, x in zip(("token_wholes", "token_fractions"), decay, strict=False)
        }
        for name, x in zip(("slot_wholes", "slot_fractions"), decay[2:], strict=True):
            inputs[name] = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, missing)))

    def at(j, b, bounds_ref):
        return jnp.clip(j, bounds_ref[b, 0], bounds_ref[b, 1])

    def of_batch(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, j, bounds_ref: (b, *(0,) * (x.ndim - 1)))

    def of_slots(size):
        return pl.BlockSpec((None, width, size), lambda b, j, bounds_ref: (b, at(j, b, bounds_ref), 0))

    def of_decay(x):
        index = lambda b, j, bounds_ref: (b, 0, at(j, b, bounds_ref))  # noqa: E731
        return pl.BlockSpec((None, x.shape[1], config.mask_block), index)

    together = min(batch, SUBLANES)
    specs = {name: of_batch(x) for name, x in inputs.items()}
    specs |= {"k": of_slots(key), "v": of_slots(value)}
    specs |= {name: of_decay(x) for name, x in inputs.items() if name.startswith("slot_")}
    specs["segments"] = pl.BlockSpec(
        (together, config.mask_block), lambda b, j, bounds_ref: (b // together, at(j, b, bounds_ref))
    )
    rows = inputs["q"].shape[2]
    outputs = {
        name: varying_result((batch, groups, rows, n), jnp.float32, *arrays)
        for name, n in {"o": value, "top": LANES, "total": LANES}.items()
    }
    copies = {}
    for name in ("k", "v"):
        x = inputs[name]
        if _copied(x, groups):
            lanes, bfloat16 = min(x.shape[2], LANES), x.dtype == jnp.bfloat16
            shape = (x.shape[2] // lanes, width // 2 if bfloat16 else width, lanes)
            copies[f"{name}_copy"] = pltpu.VMEM(shape, jnp.int32 if bfloat16 else jnp.float32)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, pl.cdiv(slots, block)),
        in_specs=[specs[name] for name in inputs],
        out_specs=[of_batch(x) for x in outputs.values()],
        scratch_shapes=list(copies.values()),
    )
    o, *stats = pl.pallas_call(
        functools.partial(_kernel, config=config, names=(*inputs, *outputs, *copies)),
        grid_spec=grid,
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.VMEM_LIMIT
        ),
        name="memformer_attention_decode",
    )(bounds // block, *inputs.values())
    top, total = (stats[0][..., :1], jnp.sum(stats[1], axis=-1, keepdims=True))
    top, total = (_from_rows(config, x)[..., 0] for x in (top, total))
    return top, total, _from_rows(config, o)


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


def block_slots(slots: int, groups: int) -> int:
    """Slots per block."""
    return min(slots, max(KEYS // groups // LANES, 1) * LANES)


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
    length, slots = read.q.shape[1], read.k.shape[1]
    if slots > MOST_SLOTS:
        raise unsupported(op, f"takes at most {MOST_SLOTS} slots, got {slots}")
    config = BlockConfig.of(read, length=length, slots=slots, kinds=read.kinds)
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
    return CacheSums(*kernel(*arrays))
