"""DeltaFormer on TPU: the write u, block by block, and the read of u, which is softmax attention's.

Rows R of one block, earlier slots E, A the weights of the write kernel, P the right-hand side:

    P = alpha V_R - beta A[R, E] U_E        U_R = (I + beta A[R, R])^-1 P

Forward, a program computes one block of one head, or of two heads if their number is even: the keys and u of a head
stay in VMEM. It sums over earlier blocks as flash attention does, then solves within the block, by the inverses of the
sub-blocks on the diagonal (inverse.py; two heads share products) and substitution between them. Everything is
transposed, rows in lanes. Weights between sub-blocks are bfloat16, as those of earlier blocks are, where a softmax
normalises them; only the inverses then keep 16 bits. Backward is the loop of backward.py, blocks in reverse, with

    dP_R = (I + beta A[R, R])^-T (dU_R - later A[R', R]^T beta dP_R')

A call is divided into spans of as many tokens as VMEM holds keys and u of. The slots before a span, of the cache and
of earlier spans, are read as softmax attention reads, and the write continues from these sums.

Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), section 3.3.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask, first_tiles
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.layout import block_mask, heads_first, join_slots
from memformer.pallas.pair_decay import QueryKeyDecay, fraction_gradient, join_decay
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.backward import BackwardRefs, attention_backward
from memformer.pallas.tpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.tpu.attention.softmax_attention import (
    attend_with_sinks,
    read,
    score_operand,
    value_operand,
)
from memformer.pallas.tpu.attention.tiles import SCALARS, SumRefs
from memformer.pallas.tpu.interleave import Steps, interleave
from memformer.pallas.tpu.inverse import unit_lower_inverses
from memformer.pallas.tpu.products import iotas, product, split_bf16

__all__ = ["run"]

# Turns by which a sub-block starts after the one before it. Bundles on v5p for 512 rows of two heads: 6016 for 0, 6186
# for 4, 5937 for 10, 6346 for 20.
STAGGER = 10


class _Head(NamedTuple):
    """References of one head of a program; fields that a call does not have are None.

    Attributes:
      k, w, v: of this head; k of all slots.
      start: what the rows read of the slots before the span, [R, V].
      scalars: of the rows, [8, R].
      key_scalars: of all slots, [N, 8, R].
      u, lse: results, [R, V] and [1, R].
      past_u: u of all slots so far, as products take it.
      sums: over earlier blocks.
      weights: of the block's columns [R] for its rows [R], without normaliser.
      diagonal: beta A of each sub-block against itself.
    """

    k: Any
    w: Any
    v: Any
    start: Any
    scalars: Any
    key_scalars: Any
    u: Any
    lse: Any
    past_u: Any
    sums: SumRefs
    weights: Any
    diagonal: Any

    def scalar(self, name: str, rows: slice) -> Array:
        """[1, rows] of one name."""
        place = SCALARS.index(name)
        return self.scalars[place : place + 1, rows]

    def masks(self, config: AttentionConfig, i) -> tuple[tiles.TokenMask, tiles.TokenMask]:
        """Of the rows, and of the slots of block i."""
        if not config.segments and config.window is None:
            return tiles.TokenMask(), tiles.TokenMask()
        columns = tiles.to_columns(self.key_scalars[i])
        return tiles.row_mask(config, self.scalars[...], alpha=True), tiles.column_mask(config, columns)

    def decay(self, config: AttentionConfig, i, *, own: bool) -> tiles.BlockDecay:
        """Of block i."""
        keys = self.key_scalars[i]
        return tiles.block_decay(config, self.scalars[...], keys, tiles.to_columns(keys), own=own)


def _start_sums(config: AttentionConfig, head: _Head) -> None:
    """Sets the sums to those over the slots before the span."""
    sums = head.sums
    tiles.clear_sums(sums)
    if head.start is None:
        return
    sums.value[...] = head.start[...].T
    if config.similarity.normalized:
        sums.top[...] = jnp.broadcast_to(head.scalar("lse", slice(0, config.block)), sums.top.shape)
        sums.total[...] = jnp.where(iotas(sums.total.shape)[0] == 0, 1.0, 0.0)


def _own_weights(config: AttentionConfig, head: _Head, i, place: int) -> Steps:
    """Stores the weights of a sub-block's rows within its own block, tile by tile, without normaliser.

    Returns:
      The factor that makes the sums over earlier blocks -beta A U, and the factors that do it for each earlier tile of
      the block, [1, rows].
    """
    rows, sums, factors = config.sub_blocks[place], head.sums, []
    beta = head.scalar("beta", rows)
    start = top = sums.top[:, rows] if config.similarity.normalized else None
    decay = head.decay(config, i, own=True) if config.decay else None
    row, column = head.masks(config, i)
    for columns in config.sub_blocks[: place + 1]:
        k = head.k[tiles.block_slice(config, i, columns.start, config.sub_block)]
        scores = product(k, head.w[rows], "nt", config.passes) * config.factor
        yield
        mask = tiles.diagonal_mask(config, rows, columns, transposed=True) if columns == rows else None
        mask = tiles.mask_tokens(config, mask, row, column, rows, columns)
        gap = None if decay is None else decay.gap(rows, columns)
        if config.similarity.normalized:
            scores, mask = tiles.decay_scores(scores, mask, gap)
            scores = scores if mask is None else jnp.where(mask, scores, tiles.LOW)
            top, _, weights = yield from tiles.rescale(sums, rows, top, scores)
            factors.append(top[:1])
        else:
            weights = tiles.attention_weights(config, scores, mask, None, gap)
            factors.append(jnp.zeros_like(beta))
        if columns != rows:
            head.weights[columns, rows] = weights.astype(head.weights.dtype)
        yield
    lse = tiles.logsumexp(top, sums.total[:, rows]) if config.similarity.normalized else jnp.zeros_like(beta)
    head.lse[:, rows] = lse
    factors = [-beta * jnp.exp2(x - lse) if config.similarity.normalized else -beta for x in factors]
    head.diagonal[place] = (weights * -factors[-1]).T
    yield
    return factors[-1] if start is None else -beta * jnp.exp2(start[:1] - lse), factors[:-1]


def _inverse_minus_identity(a: list[Any], passes: int) -> Steps:
    """(I + a)^-1 - I for one or two sub-blocks on the diagonal: small entries are not rounded beside ones."""
    inverses = yield from unit_lower_inverses(a, passes)
    row, column = iotas(inverses[0].shape)
    return [jnp.where(row == column, 0.0, inverse) for inverse in inverses]


def _write_sub_block(config: AttentionConfig, heads: list[_Head], done: list[list], i, place: int) -> Steps:
    """Computes u of one sub-block of every head.

    Args:
      config: sizes.
      heads: of the program.
      done: for each head u of the sub-blocks before this one, [V, rows], as products take it; extended by this one.
      i: the block.
      place: the sub-block.
    """
    rows, factors = config.sub_blocks[place], []
    for head in heads:
        factors.append((yield from _own_weights(config, head, i, place)))
    inverses = yield from _inverse_minus_identity([head.diagonal.at[place] for head in heads], config.solve_passes)
    targets = []
    for head, (start, _) in zip(heads, factors, strict=True):
        target = head.scalar("alpha", rows) * head.v[rows].astype(jnp.float32).T
        targets.append(target + start * head.sums.value[:, rows])
        yield
    while min(map(len, done)) < place:
        yield
    for columns, *tile_factors in zip(config.sub_blocks[:place], *(each for _, each in factors), strict=True):
        for h, (head, factor) in enumerate(zip(heads, tile_factors, strict=True)):
            u = done[h][columns.start // config.sub_block]
            targets[h] += factor * product(u, head.weights[columns, rows], "nn", config.value_passes)
    yield
    changes = [product(x, inverse, "nt", config.solve_passes) for x, inverse in zip(targets, inverses, strict=True)]
    yield
    for head, target, change, earlier in zip(heads, targets, changes, done, strict=True):
        u = target + change
        earlier.append(split_bf16(u, config.value_passes))
        u = u.T
        head.u[rows] = u
        head.past_u[tiles.block_slice(config, i, rows.start, config.sub_block)] = u.astype(head.past_u.dtype)


def _kernel(first_ref, *flat, config: AttentionConfig, names: tuple[str, ...], count: int):
    """Computes one block of `count` heads; `names` are those of the references."""
    refs = dict(zip(names, flat, strict=True))
    heads = []
    for h in range(count):
        blocks = ("k", "w", "v", "start", "key_scalars", "u")
        fields = {name: refs[name].at[0, h] if name in refs else None for name in blocks}
        fields |= {name: refs[name].at[0, h, 0] for name in ("scalars", "lse")}
        fields |= {name: refs[name].at[h] for name in ("past_u", "weights", "diagonal")}
        heads.append(_Head(sums=SumRefs(*(refs[name].at[h] for name in SumRefs._fields)), **fields))
    i = pl.program_id(2)
    for head in heads:
        _start_sums(config, head)

    def block(j, carry):
        row, column = heads[0].masks(config, j)
        decays = [head.decay(config, j, own=False) if config.decay else None for head in heads]
        operands = [(head.sums, head.w, head.k, head.past_u, decay) for head, decay in zip(heads, decays, strict=True)]
        tiles.add_block(config, operands, j, row, column)
        return carry

    lax.fori_loop(first_ref[pl.program_id(0), i], i, block, 0)
    done: list[list] = [[] for _ in heads]
    places = range(len(config.sub_blocks))
    interleave([_write_sub_block(config, heads, done, i, place) for place in places], stagger=STAGGER)


def _write_shard(config: AttentionConfig, k, w, v, scalars, first, *rest):
    """One device's shard of `_write_span`; rest: scalars of keys, reads of the slots before the span."""
    batch, groups, length, key = k.shape
    value, size = v.shape[3], config.block
    blocks, rest = length // size, list(rest)
    # Two heads: one waits for its products while the other computes, and their inverses share products.
    dtype = jnp.bfloat16 if config.value_passes == 1 else jnp.float32
    resident = length * (2 * key * k.dtype.itemsize + value * jnp.dtype(dtype).itemsize)
    count = 2 if groups % 2 == 0 and 2 * resident <= tuning.PAIR else 1

    def block(*shape):
        return pl.BlockSpec((1, count, *shape), lambda b, h, i, *_: (b, h, i, *[0] * (len(shape) - 1)))

    def whole(*shape):
        return pl.BlockSpec((1, count, *shape), lambda b, h, i, *_: (b, h, *[0] * len(shape)))

    inputs = {
        "k": (k, whole(length, key)),
        "w": (w, block(size, key)),
        "v": (v, block(size, value)),
        "scalars": (scalars, block(1, 8, size)),
    }
    if config.scalars:
        inputs["key_scalars"] = (rest.pop(0), whole(blocks, 8, size))
    if rest:
        inputs["start"] = (rest.pop(0), block(size, value))
    arrays = [x for x, _ in inputs.values()]
    scratch = {name: pltpu.VMEM((count, *x.shape), x.dtype) for name, x in tiles.sums_scratch(config, value).items()}
    scratch |= {
        "past_u": pltpu.VMEM((count, length, value), dtype),
        "weights": pltpu.VMEM((count, size, size), dtype),
        "diagonal": pltpu.VMEM((count, len(config.sub_blocks), config.sub_block, config.sub_block), jnp.float32),
    }
    return pl.pallas_call(
        functools.partial(_kernel, config=config, names=(*inputs, "u", "lse", *scratch), count=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups // count, blocks),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[block(size, value), block(1, 1, size)],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            varying_result((batch, groups, length, value), jnp.float32, *arrays),
            varying_result((batch, groups, blocks, 1, size), jnp.float32, *arrays),
        ],
        compiler_params=tiles.compiler_params(3),
        name="memformer_write_forward",
    )(first[:, 0], *arrays)


def _write_span(
    config: AttentionConfig,
    k: Array,
    w: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
    start: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """Computes u of a span of tokens whose keys and u fit in VMEM.

    Args:
      config: sizes; no slots before the span, strict.
      k: [B, G, T, K], T a multiple of R.
      w: [B, G, T, K].
      v: [B, G, T, V].
      alpha, beta: [B, G, T].
      mask: of the span.
      decay: of the span, or None.
      start: what the rows read of the slots before the span, and their log-sum-exp there; None without such slots.

    Returns:
      u [B, G, T, V] and the log-sum-exp of the rows to base 2, [B, G, T], in float32.
    """
    groups = k.shape[1]
    value, start_lse = (None, None) if start is None else start
    query, key = (None, None) if decay is None else decay
    scalars = tiles.pack_rows(
        config, groups, query, **tiles.mask_scalars(config, mask, "query"), alpha=alpha, beta=beta, lse=start_lse
    )
    first, rest = jnp.zeros((k.shape[0], scalars.shape[2]), jnp.int32), ()
    if config.segments or config.window is not None:
        first = first_tiles(mask, config.block, config.block, config.window)
    if config.scalars:
        rest = (tiles.pack_keys(config, groups, decay=key, **tiles.mask_scalars(config, mask, "key")),)
    if value is not None:
        rest = (*rest, value)
    first = jnp.broadcast_to(first[:, None], (first.shape[0], groups, first.shape[1]))
    u, lse = split_batch_and_heads(_write_shard, (config,), config.axes, results=2, shared=True)(
        k, w, v, scalars, first, *rest
    )
    return u, lse.reshape(*lse.shape[:2], -1)


def _solve_transposed(config: AttentionConfig, refs: BackwardRefs, i) -> None:
    """Computes dP of block i from dU within the backward kernel, and delta of its rows."""
    at = tiles.block_slice(config, i)
    scalars = tiles.to_columns(refs.scalars[0, 0, i])

    def scalar(name):
        place = SCALARS.index(name)
        return scalars[:, place : place + 1]

    beta, lse = scalar("beta"), scalar("lse")
    keys = refs.key_scalars[0, 0, 0] if config.scalars else None
    gap_of = _own_gap(scalar, keys) if config.decay else lambda rows: None

    def mask_of(rows):
        columns = slice(0, rows.stop)
        mask = tiles.diagonal_mask(config, rows, columns)
        if config.segments:
            mask = tiles.mask_segments(mask, scalar("segment")[rows], keys[:1, columns])
        if config.window is None:
            return mask
        rank = tiles.KEY_SCALARS.index("rank")
        # Among the scalars of rows with an alpha the rank has the place of delta.
        return mask & (scalar("delta")[rows] - keys[rank : rank + 1, columns] < config.window)

    def weigh_and_invert(rows):
        scores = product(refs.q[0, 0, at][rows], refs.k[0, 0, : rows.stop], "nt", config.passes) * config.factor
        yield
        a = beta[rows] * tiles.attention_weights(config, scores, mask_of(rows), lse[rows], gap_of(rows))
        return a, (yield from _inverse_minus_identity([a[:, rows]], config.solve_passes))[0]

    parts = interleave([weigh_and_invert(rows) for rows in config.sub_blocks])
    solved: list[Array] = [None] * len(parts)
    for place in range(len(parts) - 1, -1, -1):
        rows = config.sub_blocks[place]
        target = refs.du[0, 0, rows] + refs.dx[rows]
        for later in range(place + 1, len(parts)):
            target = target - product(parts[later][0][:, rows], solved[later], "tn", config.solve_passes)
        solved[place] = target + product(parts[place][1], target, "tn", config.solve_passes)
    dp = jnp.concatenate(solved)
    refs.g[at] = dp.astype(refs.g.dtype)
    refs.dx[...] = dp
    erased = scalar("alpha") * refs.v[0, 0].astype(jnp.float32) - refs.x[0, 0]
    refs.delta[i] = tiles.to_row(-jnp.sum(dp * erased, axis=1, keepdims=True))


def _own_gap(scalar, keys: Array):
    """A function of some rows: their decay from the block's columns up to them, [rows, columns]."""

    def key(name):
        place = tiles.KEY_SCALARS.index(name)
        return keys[place : place + 1]

    whole, fraction = tiles.row_decay(scalar, key("anchor_high")[:, :1], key("anchor_low")[:, :1])
    key_whole, key_fraction = key("decay_whole"), key("decay_fraction")
    return lambda rows: tiles.own_gap(
        whole[rows], fraction[rows], key_whole[:, : rows.stop], key_fraction[:, : rows.stop]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(
    config: AttentionConfig,
    k: Array,
    w: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    cache_u: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
) -> Array:
    """The writes u [B, G, T, V] of a call in float32; memory is linear in time, backward too.

    Saved: the inputs, u and the log-sum-exp of the rows.

    Args:
      config: sizes; `before` counts the blocks of the cache.
      k: keys of the cache and then of the call, [B, G, S, K]; S and T are multiples of R.
      w: [B, G, T, K].
      v: [B, G, T, V].
      alpha: [B, G, T].
      beta: [B, G, T].
      cache_u: u of the cache, [B, G, S - T, V].
      mask: over whole blocks.
      decay: of key heads, or None.
    """
    return _write(config, k, w, v, alpha, beta, cache_u, mask, decay)[0]


class _Span(NamedTuple):
    """The tokens of a span, and how many slots lie before them."""

    rows: slice
    slots: int

    @property
    def own(self) -> slice:
        """The slots of the span's tokens."""
        return slice(self.slots, self.slots + self.rows.stop - self.rows.start)


def _spans(config: AttentionConfig, length: int) -> list[_Span]:
    """Spans of the call that fit in VMEM."""
    step, before = config.resident * config.block, config.before * config.block
    return [_Span(slice(s, min(s + step, length)), before + s) for s in range(0, length, step)]


def _span_configs(config: AttentionConfig, span: _Span) -> tuple[AttentionConfig, AttentionConfig]:
    """Of the write within a span, and of the read of all slots before it."""
    own = dataclasses.replace(config, before=0, own=True, strict=True)
    return own, dataclasses.replace(config, before=span.slots // config.block, own=False)


def _span_masks(span: _Span, mask: Mask) -> tuple[Mask, Mask]:
    """Of the same two."""
    return mask.part(span.rows, span.own), mask.part(span.rows, slice(span.slots))


def _span_decays(span: _Span, decay: QueryKeyDecay | None) -> tuple[QueryKeyDecay | None, QueryKeyDecay | None]:
    """Of the same two."""
    if decay is None:
        return None, None
    return decay.part(span.rows, span.own), decay.part(span.rows, slice(span.slots))


def _write(config, k, w, v, alpha, beta, cache_u, mask, decay):
    """u, and the log-sum-exp of the rows."""
    slots, lse = cache_u, []
    for span in _spans(config, w.shape[2]):
        own, before = _span_configs(config, span)
        own_mask, before_mask = _span_masks(span, mask)
        own_decay, before_decay = _span_decays(span, decay)
        rows, start = span.rows, None
        if span.slots:
            values = value_operand(config, slots)
            start = read(before, jnp.float32, k[:, :, : span.slots], w[:, :, rows], values, before_mask, before_decay)
        operands = (k[:, :, span.own], *(x[:, :, rows] for x in (w, v, alpha, beta)))
        u, span_lse = _write_span(own, *operands, own_mask, own_decay, start)
        slots = jnp.concatenate([slots, u], axis=2) if slots.shape[2] else u
        lse.append(span_lse)
    return slots[:, :, cache_u.shape[2] :], jnp.concatenate(lse, axis=2)


def _write_forward(config, k, w, v, alpha, beta, cache_u, mask, decay):
    u, lse = _write(config, k, w, v, alpha, beta, cache_u, mask, decay)
    return u, (k, w, v, alpha, beta, cache_u, mask, decay, u, lse)


def _write_backward(config, saved, du):
    k, w, v, alpha, beta, cache_u, mask, decay, u, lse = saved
    cached = cache_u.shape[2]
    dk = jnp.zeros(k.shape, jnp.float32)
    du = jnp.concatenate([jnp.zeros(cache_u.shape, jnp.float32), du], axis=2) if cached else du
    slots = jnp.concatenate([cache_u, u], axis=2) if cached else u
    key_decay = None if decay is None else jnp.zeros(decay.key.fraction.shape, jnp.float32)
    row_gradients = []
    for span in reversed(_spans(config, w.shape[2])):
        own, before = _span_configs(config, span)
        own_mask, before_mask = _span_masks(span, mask)
        own_decay, before_decay = _span_decays(span, decay)
        rows = span.rows
        scalars = {"lse": lse[:, :, rows], "alpha": alpha[:, :, rows], "beta": beta[:, :, rows]}
        keys, queries, values = k[:, :, span.own], w[:, :, rows], v[:, :, rows]
        dk_own, dw, dp, dbeta, ddecay = attention_backward(
            own,
            keys,
            queries,
            u[:, :, rows],
            values,
            own_mask,
            own_decay,
            scalars,
            solve=_solve_transposed,
            du=du[:, :, span.own],
        )
        if span.slots:
            earlier = slice(0, span.slots)
            erased = alpha[:, :, rows, None] * values.astype(jnp.float32) - u[:, :, rows]
            scalars = {"lse": scalars["lse"], "beta": scalars["beta"], "delta": -jnp.sum(dp * erased, axis=-1)}
            values, g = value_operand(config, slots[:, :, earlier]), value_operand(config, dp)
            dk_before, dw_before, du_before, dbeta_before, ddecay_before = attention_backward(
                before, k[:, :, earlier], queries, values, g, before_mask, before_decay, scalars
            )
            dw, dbeta = dw + dw_before, dbeta + dbeta_before
            dk, du = dk.at[:, :, earlier].add(dk_before), du.at[:, :, earlier].add(du_before)
            if decay is not None:
                key_decay = key_decay.at[:, :, earlier].add(ddecay_before.key.fraction)
                query = ddecay.query.fraction + ddecay_before.query.fraction
                ddecay = fraction_gradient(query, ddecay.key.fraction)
        dk = dk.at[:, :, span.own].add(dk_own)
        query_decay = None
        if decay is not None:
            query_decay, key_decay = ddecay.query.fraction, key_decay.at[:, :, span.own].add(ddecay.key.fraction)
        row_gradients.append((dw, dp, dbeta, query_decay))
    dw, dp, dbeta, query_decay = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *row_gradients[::-1])
    dv, dalpha = alpha[..., None] * dp, jnp.sum(v.astype(jnp.float32) * dp, axis=-1)
    inputs = (k, w, v, alpha, beta)
    gradients = (x.astype(y.dtype) for x, y in zip((dk, dw, dv, dalpha, dbeta), inputs, strict=True))
    ddecay = None if decay is None else fraction_gradient(query_decay, key_decay)
    return *gradients, du[:, :, :cached], None, ddecay


write.defvjp(_write_forward, _write_backward)


def run(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer; w, alpha and beta are given.

    Returns:
      The output, bfloat16 where v is and products have one pass, else float32; and u in float32.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    config = plan_call(call, call.write_kernel)
    size, length = config.block, call.k.shape[1]
    mask = block_mask(call, size)
    k = join_slots(None if call.cache is None else call.cache.k, score_operand(config, call.k), size)
    if call.cache is None:
        cache_u = jnp.zeros((*k.shape[:2], 0, call.v.shape[3]), jnp.float32)
    else:
        cache_u = heads_first(call.cache.values, size).astype(jnp.float32)
    q, w = (heads_first(score_operand(config, x), size) for x in (call.q, call.w))
    v, alpha, beta = (heads_first(x, size) for x in (call.v, call.alpha.astype("float32"), call.beta.astype("float32")))
    arrays = (k, w, v, alpha, beta, cache_u, q, join_decay(call, size))
    arrays = jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves((arrays, mask))), arrays)
    k, w, v, alpha, beta, cache_u, q, decay = arrays
    u = write(config, k, w, v, alpha, beta, cache_u, mask, decay)
    slots = u if call.cache is None else jnp.concatenate([cache_u, u], axis=2)
    reading = dataclasses.replace(config, similarity=call.read_kernel)
    # Each query head of a group has the group's decay.
    repeats = q.shape[1] // k.shape[1]
    decay = decay if repeats == 1 else jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=1), decay)
    o = attend_with_sinks(reading, call, k, q, slots, mask, decay)
    return tuple(jnp.swapaxes(x, 1, 2)[:, :length] for x in (o, u))
