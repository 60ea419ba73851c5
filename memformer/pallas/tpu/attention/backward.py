"""Gradients of attention by tiles on TPU: one kernel that loops over blocks of columns, last block first.

With p the weights of a tile and g what is weighted (dO for the read, dP for the write, see deltaformer.py):

    G = g x^T      e = p, or -beta p for the write      dx = e^T g
    ds = e G - p delta (softmax), else slope e / p G     dk = scale ds^T q      dq = scale ds k

The gradient of a pair's decay is ds (softmax), else e G. Its sums over columns are the gradients of the rows'
cumulative decay, its negated sums over rows those of the columns'. A token and itself have no decay, and are left out.

Tiles are transposed, columns in sublanes: scalars of rows then broadcast over sublanes at no cost, and only dq needs a
transposed operand. All rows of one head stay in VMEM, dq among them.

For the write, `solve` gives g = dP of a block of rows: the block of columns j is first treated as the block of rows j,
when later blocks of rows have added all that they contribute to its dU.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.mask import Mask, column_bounds
from memformer.core.similarity import similarity_slope
from memformer.core.types import Array
from memformer.pallas.pair_decay import QueryKeyDecay, fraction_gradient
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.config import AttentionConfig
from memformer.pallas.tpu.attention.tiles import SCALARS, BlockDecay, TokenMask
from memformer.pallas.tpu.interleave import Steps, interleave
from memformer.pallas.tpu.products import iotas, product

__all__ = ["BackwardRefs", "Gradients", "attention_backward"]


class BackwardRefs(NamedTuple):
    """References of a program; fields that a call does not have are None.

    k, x, v, du, dk, dx, key_scalars, key_decay and decay_sums (what it is the negative of) are of its block of columns;
    q, scalars, g, dq, dbeta, query_decay and delta of all rows.
    """

    k: Any
    q: Any
    x: Any
    scalars: Any
    key_scalars: Any
    g: Any
    v: Any
    du: Any
    dk: Any
    dq: Any
    dx: Any
    dbeta: Any
    delta: Any
    query_decay: Any
    key_decay: Any
    decay_sums: Any


class Gradients(NamedTuple):
    """Results of `attention_backward`, in float32.

    Attributes:
      dk: [B, G, S, K].
      dq: [B, H, T, K].
      dx: [B, G, S, V]; dP where the kernel solves.
      dbeta: [B, H, T] for the write, or None.
      decay: of the fractions, or None.
    """

    dk: Array
    dq: Array
    dx: Array
    dbeta: Array | None
    decay: QueryKeyDecay | None


class _Rows(NamedTuple):
    """A block of rows, loaded for a tile: q [R, K], g [R, V], some scalars [1, R], and all of them [8, R]."""

    q: Array
    g: Array
    lse: Array
    delta: Array
    beta: Array
    scalars: Array


def _load_rows(config: AttentionConfig, refs: BackwardRefs, i) -> _Rows:
    at = tiles.block_slice(config, i)
    scalars = refs.scalars[0, 0, i]
    lse, delta, beta = (scalars[place : place + 1] for place in map(SCALARS.index, ("lse", "delta", "beta")))
    if refs.delta is not None:
        delta = refs.delta[i][:1]
    g = refs.g[at] if refs.delta is not None else refs.g[0, 0, at]
    return _Rows(refs.q[0, 0, at], g, lse, delta, beta, scalars)


def _tile(
    config: AttentionConfig,
    refs: BackwardRefs,
    rows: _Rows,
    columns: slice,
    mask,
    decay: BlockDecay | None,
    write: bool,
    with_dx: bool,
) -> Steps:
    """Adds one tile to dk, dx and the sums of the columns' decay.

    Returns:
      ds [columns, R], and what the tile adds to dbeta and to the decay of the rows, [1, R] or None.
    """
    scores = product(refs.k[0, 0, columns], rows.q, "nt", config.passes) * config.factor
    yield
    dweights = product(refs.x[0, 0, columns], rows.g, "nt", config.value_passes)
    yield
    gap = None if decay is None else decay.gap(slice(0, config.block), columns)
    normalized = config.similarity.normalized
    plain = tiles.attention_weights(config, scores, mask, rows.lse, gap if normalized else None)
    factor = None if gap is None or normalized else tiles.decay_factor(gap)
    weights = plain if factor is None else plain * factor
    signed = weights * -rows.beta if write else weights
    yield
    if with_dx:
        refs.dx[columns] += product(signed, rows.g, "nn", config.value_passes)
    yield
    dbeta = -jnp.sum(weights * dweights, axis=0, keepdims=True) if write else None
    if normalized:
        dgap = ds = signed * dweights - weights * rows.delta if write else weights * (dweights - rows.delta)
    else:
        ds = similarity_slope(config.similarity, scores, plain) * dweights
        ds = ds if factor is None else ds * factor
        ds = ds if mask is None else jnp.where(mask, ds, 0.0)
        ds = ds * -rows.beta if write else ds
        dgap = signed * dweights
    query_decay = None
    if decay is not None:
        if decay.own:
            row, column = iotas(dgap.shape)[::-1]
            dgap = jnp.where(row == column + columns.start, 0.0, dgap)
        query_decay = jnp.sum(dgap, axis=0, keepdims=True)
        refs.decay_sums[columns] += jnp.broadcast_to(jnp.sum(dgap, axis=1, keepdims=True), (dgap.shape[0], 128))
    if config.value_passes == 1:
        ds = ds.astype(jnp.bfloat16)
    yield
    refs.dk[columns] += product(ds, rows.q, "nn", config.value_passes)
    return ds, dbeta, query_decay


def _block(config: AttentionConfig, refs: BackwardRefs, i, diagonal: bool, write: bool, with_dx: bool) -> None:
    """Adds the tiles of the program's columns and of row block i to all gradients."""
    rows = _load_rows(config, refs, i)
    row, column, decay, everything = TokenMask(), TokenMask(), None, slice(0, config.block)
    if config.scalars:
        keys = refs.key_scalars[0, 0, 0]
        columns = tiles.to_columns(keys)
        row = tiles.row_mask(config, rows.scalars, alpha=refs.delta is not None)
        column = tiles.column_mask(config, columns)
        decay = tiles.block_decay(config, rows.scalars, keys, columns, own=diagonal) if config.decay else None
    chains = []
    for columns in config.sub_blocks:
        mask = tiles.diagonal_mask(config, everything, columns, transposed=True) if diagonal else None
        mask = tiles.mask_tokens(config, mask, row, column, everything, columns)
        chains.append(_tile(config, refs, rows, columns, mask, decay, write, with_dx))
    parts = interleave(chains)
    ds = jnp.concatenate([part[0] for part in parts], axis=0)
    refs.dq[0, 0, tiles.block_slice(config, i)] += product(ds, refs.k[0, 0], "tn", config.value_passes)
    if write:
        refs.dbeta[0, 0, i] += functools.reduce(jnp.add, (part[1] for part in parts))
    if config.decay:
        refs.query_decay[0, 0, i] += functools.reduce(jnp.add, (part[2] for part in parts))


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static options of the kernel beside its configuration.

    Attributes:
      write: whether rows have a beta.
      solve: (config, refs, i) computes g of the block of rows i from dU; None where g is given.
    """

    write: bool
    solve: Callable | None


def _kernel(bounds_ref, *flat, config: AttentionConfig, options: _Options, row_blocks: int, column_blocks: int, names):
    """Loops over the rows that see the program's columns.

    Args:
      bounds_ref: [B, M] one more than the last block of rows that sees a block of columns; without causality
        [B, 2 M], the first such blocks before them.
      *flat: references by `names`.
      config: sizes.
      options: of the kernel.
      row_blocks: N.
      column_blocks: M.
      names: of the references.
    """
    refs = BackwardRefs(**(dict.fromkeys(BackwardRefs._fields) | dict(zip(names, flat, strict=True))))
    step = pl.program_id(2)
    j = column_blocks - 1 - step

    @pl.when(step == 0)
    def _():
        refs.dq[...] = jnp.zeros(refs.dq.shape, jnp.float32)
        if options.write:
            refs.dbeta[...] = jnp.zeros(refs.dbeta.shape, jnp.float32)
        if config.decay:
            refs.query_decay[...] = jnp.zeros(refs.query_decay.shape, jnp.float32)

    outer = refs
    refs = refs._replace(dk=outer.dk.at[0, 0], dx=outer.dx.at[0, 0])
    refs.dk[...] = jnp.zeros(refs.dk.shape, jnp.float32)
    refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)
    if config.decay:
        refs.decay_sums[...] = jnp.zeros(refs.decay_sums.shape, jnp.float32)

    def row(i, carry):
        _block(config, refs, i, False, options.write, True)
        return carry

    first, last = 0, j
    if config.own:
        first = jnp.maximum(j - config.before + 1, 0)
    elif not config.causal:
        first, last = bounds_ref[pl.program_id(0), j], column_blocks + j
    lax.fori_loop(first, jnp.minimum(bounds_ref[pl.program_id(0), last], row_blocks), row, 0)

    if config.own:

        @pl.when(j >= config.before)
        def _():
            if options.solve is not None:
                options.solve(config, refs, j - config.before)
            _block(config, refs, j - config.before, True, options.write, options.solve is None)

    refs.dk[...] = refs.dk[...] * config.similarity.scale
    if config.decay:
        refs.key_decay[0, 0, 0] = -tiles.to_row(refs.decay_sums[...])[:1]


def _backward(config: AttentionConfig, options: _Options, k, q, x, g, scalars, bounds, *rest):
    """One device's shard: g is dO or dP [B, H, T, V], or v where the kernel solves; rest: key scalars, dU."""
    batch, groups, slots, key = k.shape
    heads, length = q.shape[1:3]
    value, size, repeat = x.shape[3], config.block, heads // groups
    column_blocks, row_blocks = slots // size, length // size
    rest = list(rest)

    def column(shape, repeat=1):
        zeros = [0] * (len(shape) - 1)
        return pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h // repeat, column_blocks - 1 - n, *zeros))

    def whole(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h, *[0] * len(shape)))

    inputs = {
        "k": (k, column((size, key), repeat)),
        "q": (q, whole(length, key)),
        "x": (x, column((size, value), repeat)),
        "scalars": (scalars, whole(row_blocks, 8, size)),
    }
    if config.scalars:
        # Decays are of query heads.
        inputs["key_scalars"] = (rest.pop(0), column((1, 8, size), 1 if config.decay else repeat))
    if options.solve is None:
        inputs["g"] = (g, whole(length, value))
    else:
        inputs |= {"v": (g, column((size, value))), "du": (rest.pop(0), column((size, value)))}
    arrays = [x for x, _ in inputs.values()]

    def result(*shape):
        return varying_result((batch, heads, *shape), jnp.float32, *arrays)

    outputs = {
        "dk": (result(slots, key), column((size, key))),
        "dq": (result(length, key), whole(length, key)),
        "dx": (result(slots, value), column((size, value))),
    }
    if options.write:
        outputs["dbeta"] = (result(row_blocks, 1, size), whole(row_blocks, 1, size))
    scratch = {}
    if config.decay:
        outputs["query_decay"] = (result(row_blocks, 1, size), whole(row_blocks, 1, size))
        outputs["key_decay"] = (result(column_blocks, 1, size), column((1, 1, size)))
        scratch["decay_sums"] = pltpu.VMEM((size, 128), jnp.float32)
    if options.solve is not None:
        dtype = jnp.bfloat16 if config.value_passes == 1 else jnp.float32
        scratch["g"] = pltpu.VMEM((length, value), dtype)
        scratch["delta"] = pltpu.VMEM((row_blocks, 8, size), jnp.float32)
    kernel = functools.partial(
        _kernel,
        config=config,
        options=options,
        row_blocks=row_blocks,
        column_blocks=column_blocks,
        names=(*inputs, *outputs, *scratch),
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, column_blocks),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=tiles.compiler_params(3),
        name=f"memformer_{'write' if options.solve else 'attention'}_backward",
    )(bounds[:, 0], *arrays)


def _column_bounds(config: AttentionConfig, k: Array, row_blocks: int, mask: Mask) -> Array:
    """The bounds that `_kernel` takes."""
    size, columns = config.block, (k.shape[0], k.shape[2] // config.block)
    pair = column_bounds(mask, size, size, config.window, causal=config.causal)
    pair = pair or (jnp.int32(0), jnp.int32(row_blocks))
    return jnp.concatenate([jnp.broadcast_to(x, columns) for x in (pair[1:] if config.causal else pair)], axis=1)


def attention_backward(
    config: AttentionConfig,
    k: Array,
    q: Array,
    x: Array,
    g: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
    scalars: dict[str, Array | None],
    *,
    solve: Callable | None = None,
    du: Array | None = None,
) -> Gradients:
    """Gradients through every tile of a call whose rows fit in VMEM.

    Args:
      config: of the forward pass.
      k: [B, G, S, K].
      q: [B, H, T, K].
      x: [B, G, S, V].
      g: dO or dP [B, H, T, V]; v where the kernel solves.
      mask: over whole blocks.
      decay: of query heads, or None.
      scalars: lse and delta of the rows, [B, H, T]; beta (and alpha) for the write.
      solve: computes dP from dU within the kernel.
      du: [B, G, T, V] where it solves.
    """
    config = config.backward
    heads, groups = q.shape[1], k.shape[1]
    rest: tuple[Array, ...] = ()
    query, key = (None, None) if decay is None else decay
    rows = tiles.pack_rows(config, heads, query, **tiles.mask_scalars(config, mask, "query"), **scalars)
    if config.scalars:
        names = tiles.mask_scalars(config, mask, "key")
        rest = (tiles.pack_keys(config, heads if config.decay else groups, decay=key, **names),)
    if du is not None:
        rest += (du,)
    bounds = _column_bounds(config, k, q.shape[2] // config.block, mask)
    bounds = jnp.broadcast_to(bounds[:, None], (k.shape[0], groups, bounds.shape[1]))
    write = scalars.get("beta") is not None
    results = 3 + write + 2 * config.decay
    call = split_batch_and_heads(_backward, (config, _Options(write, solve)), config.axes, results=results, shared=True)
    dk, dq, dx, *more = call(k, q, x, g, rows, bounds, *rest)
    dk, dx = (y.reshape(*k.shape[:2], -1, *y.shape[2:]).sum(2) if heads != groups else y for y in (dk, dx))
    more = [y.reshape(*y.shape[:2], -1) for y in more]
    dbeta = more.pop(0) if write else None
    return Gradients(dk, dq * config.similarity.scale, dx, dbeta, fraction_gradient(*more) if config.decay else None)
