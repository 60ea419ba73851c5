"""Gradients of attention by tiles on Hopper: one kernel for queries (dq) and one for keys and values (dk and dx).

With p the weights of a tile and g the gradient of the weighted sum (dO for the read; dP for the write, see
deltaformer.py):

    G = g x^T      e = p, or -beta p for the write      dx = e^T g
    ds = e G - p delta (softmax), else slope e / p G      dk = scale ds^T q      dq = scale ds k

The gradient of a pair's decay is ds (softmax), else e G. Its sums over keys are the gradients of the queries'
cumulative decay, its negated sums over queries those of the keys'. The gradient of one token's decay is the sum of both
over all later tokens, in which most pairs cancel. So with a softmax both kernels compute a pair from operands that are
rounded alike, and leave out a token and itself, which have no decay. The write without a softmax keeps 16 bits: its
sums are beta dbeta and u dx. Those of the read without one are o do and x dx; its dk and dx are kernels of their own,
because together they spill registers.

Both kernels recompute the scores of a tile, and its weights from the log-sum-exp. In the second one tiles are
transposed, keys in rows, and a program takes all query heads of its key head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.mask import Mask
from memformer.core.types import Array
from memformer.pallas.gpu import tuning
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.config import TILE, AttentionConfig, fit
from memformer.pallas.gpu.attention.scalars import (
    column_names,
    column_values,
    key_mask,
    pack_scalars,
    pair_gap,
    query_mask,
    row_names,
    row_values,
)
from memformer.pallas.gpu.attention.tiles import Refs, Ring
from memformer.pallas.gpu.wgmma import (
    load_column,
    load_row,
    partial_products,
    products,
    shared_block,
    transposed,
)
from memformer.pallas.pair_decay import QueryKeyDecay
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["key_gradients", "query_gradients", "sums_scores"]


def _op_names(config: AttentionConfig, write: bool) -> tuple[str, ...]:
    """Names of the scalars per query beside segment and decay."""
    return ("lse", "delta") * config.similarity.normalized + ("beta",) * write


def _signed(weights: Array, scalar: Callable[[str], Array], write: bool) -> Array:
    """e of a tile of weights; `scalar` loads a scalar of the queries, broadcast over the tile, by its name."""
    return weights * -scalar("beta") if write else weights


def _mask_weight_gradient(config: AttentionConfig, weights: Array, dweights: Array, mask) -> Array:
    """G of a tile, 0 where its scores have no gradient; with softmax and exp the weights are 0 there themselves.

    Args:
      config: sizes.
      weights: of the tile.
      dweights: G.
      mask: function to the mask of the tile; computed again because no registers are left to keep it.
    """
    if config.similarity.normalized or config.similarity.name == "exp":
        return dweights
    nonzero = weights > 0 if config.similarity.name == "relu" else mask()
    return dweights if nonzero is None else jnp.where(nonzero, dweights, 0.0)


def _score_gradient(config: AttentionConfig, weights: Array, dweights: Array, scalar, write: bool) -> Array:
    """ds of a tile.

    Args:
      config: sizes.
      weights: of the tile.
      dweights: G, masked; decayed where the weights are not.
      scalar: see `_signed`.
      write: whether this is the write.
    """
    if config.similarity.normalized:
        return _signed(weights, scalar, write) * dweights - weights * scalar("delta")
    return _signed(weights * dweights if config.similarity.name == "exp" else dweights, scalar, write)


def sums_scores(config: AttentionConfig) -> bool:
    """Whether the gradients of decays are sums of ds, which the kernels of queries and of keys compute."""
    return config.decay and config.similarity.normalized


def _sum_pairs(config: AttentionConfig, ds: Array, indices) -> Array:
    """Sums of ds over columns without the pairs of a token and itself; `indices` of a tile on the diagonal, or None."""
    # A strict mask leaves no such pairs.
    others = ds if indices is None or config.strict else jnp.where(indices[0] == indices[1], 0.0, ds)
    return jnp.sum(others, axis=1)


def _copy_own(refs: Refs, g, copies) -> None:
    """Copies (source, target) pairs of warpgroup g's own rows, and waits for them."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[g], refs.own_ready.at[g])
    plgpu.barrier_wait(refs.own_ready.at[g])
    tiles.copy_indices(refs, g)


def _own_tiles(config: AttentionConfig, sizes: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """Scratch for tiles of the warpgroups' own rows, from widths and dtypes by name."""
    return {name: shared_block(config.warpgroups, TILE, width, dtype=dtype) for name, (width, dtype) in sizes.items()}


def _compute_queries(refs: Refs, config: AttentionConfig, write: bool) -> None:
    b, h, g = (lax.axis_index(name) for name in ("batch_row", "head", "warpgroup"))
    i, first, own, stop = tiles.row_extent(config, refs)
    ring = tiles.column_ring(config, refs, config.parts)
    rows, names = pl.ds(i * config.rows + g * TILE, TILE), _op_names(config, write) + row_names(config)
    parts = range(_gradient_parts(config, write))
    copies = [(refs.q.at[b, h, rows], refs.q_tile)]
    copies += [(refs[f"g{n}"].at[b, h, rows], refs[f"g_tile{n}"]) for n in parts]
    if names:
        copies.append((refs.q_scalars.at[b, h, i * config.warpgroups + g], refs.own_scalars))
    _copy_own(refs, g, copies)

    def row(name):
        return refs.own_scalars.at[g, names.index(name)]

    def scalar(name):
        return load_column(row(name), TILE)

    def tile(t, carry, diagonal=None):
        dq, dbeta, ddecay = carry
        slot = ring.wait_key(t - first)
        ring.wait_value(t - first)
        k, xs = refs.key_slots.at[slot], [transposed(refs[f"value_slots{n}"].at[slot]) for n in range(config.parts)]
        at = g + tiles.read_zero(refs, g) if config.slots == 1 else g
        gs = [refs[f"g_tile{n}"].at[at] for n in parts]
        scores, dweights = products(((refs.q_tile.at[at], transposed(k)),), partial_products(gs, xs))
        column = tiles.column_scalar(config, refs, slot)
        indices = tiles.load_indices(refs, g) if diagonal else None
        mask = tiles.tile_mask(config, diagonal, row, column, indices)

        def gap():
            return pair_gap(config, row, column, diagonal=diagonal is not None) if config.decay else None

        normalized = config.similarity.normalized
        if config.decay and not normalized:
            # On G instead of weights and slope, and before them: otherwise registers spill.
            dweights = dweights * tiles.decay_factor(gap())
            dweights = dweights if mask is None else jnp.where(mask, dweights, 0.0)
        lse = scalar("lse") if normalized else None
        weights = tiles.attention_weights(config, scores * config.factor, mask, lse, gap() if normalized else None)
        if "ddecay" in refs and not write:
            # As the kernel of the keys has them.
            weights = weights.astype(config.dtype).astype(jnp.float32)
        if not config.decay or config.similarity.name == "relu":
            dweights = _mask_weight_gradient(config, weights, dweights, lambda: mask)
        if write:
            dbeta = dbeta - jnp.sum(weights * dweights, axis=1)
        ds = _score_gradient(config, weights, dweights, scalar, write)
        if "ddecay" in refs:
            ddecay = ddecay + _sum_pairs(config, ds, indices)
        part = k.at[:, pl.ds(config.key_start, config.key_block)]
        dq = tiles.accumulate(dq, partial_products(tiles.split_gradient(config, ds, config.parts), (part,)))
        ring.release(t - first)
        return dq, dbeta, ddecay

    last = own + g if config.own else stop
    zero = _zero()
    carry = lax.fori_loop(first, last, tile, (tiles.zeros(config.key_block), zero, zero if "ddecay" in refs else ()))
    if config.own:
        carry = tile(last, carry, "<" if config.strict else "<=")
        ring.skip(last + 1 - first, stop - first)
    dq, dbeta, ddecay = carry
    tiles.store_tile(refs.q_tile, g, dq * config.similarity.scale, refs.dq.at[b, h, rows])
    for name, sums in (("dbeta", dbeta), ("ddecay", ddecay)):
        if name in refs:
            refs[f"{name}_tile"].at[g][...] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs[f"{name}_tile"].at[g], refs[name].at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)


def _zero() -> Array:
    """Sums [64] over nothing."""
    return plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _gradient_parts(config: AttentionConfig, write: bool) -> int:
    """Parts of g in dq: dO of bfloat16 has one."""
    return config.parts if write or config.mixed else 1


def _value_parts(config: AttentionConfig, wanted: tuple[str, ...]) -> int:
    """Parts of x in the gradients of keys, for dk; float16 keeps more bits than one has."""
    if "dk" not in wanted:
        return 0
    return config.parts if config.mixed else 1


def _key_gradient_parts(config: AttentionConfig, wanted: tuple[str, ...]) -> int:
    """Parts of g there: dk takes as many as of x, dx all of them."""
    return config.parts if "dx" in wanted else _value_parts(config, wanted)


def _query_gradients(config: AttentionConfig, write: bool, k, q, *rest) -> tuple[Array, ...]:
    """One device's shard; rest: parts of x and g, scalars of queries and of keys, bounds of rows."""
    batch, heads, length = q.shape[:3]
    names, columns, rest = _op_names(config, write) + row_names(config), column_names(config), list(rest)
    parts = _gradient_parts(config, write)
    inputs = {"indices": tiles.index_vectors(), "k": k, "q": q}
    for name in (*(f"x{n}" for n in range(config.parts)), *(f"g{n}" for n in range(parts))):
        inputs[name] = rest.pop(0)
    if names:
        inputs["q_scalars"] = rest.pop(0)
    if columns:
        inputs["k_scalars"] = rest.pop(0)
    inputs |= dict(zip(("first", "stop"), rest, strict=False))
    # Half of the shared memory of queries is not contiguous, and no place for 16 bits.
    dtype = config.dtype if config.key_block == config.key else "float32"
    outputs = {"dq": ((batch, heads, length, config.key_block), jnp.dtype(dtype))}
    scratch = tiles.ring_scratch(config, config.value, config.parts, len(columns))
    own = {"q_tile": (config.key, config.dtype)}
    own |= {f"g_tile{n}": (config.value, config.value_dtype) for n in range(parts)}
    scratch |= _own_tiles(config, own)
    scratch["own_ready"] = plgpu.Barrier(num_arrivals=1 + parts + bool(names), num_barriers=config.warpgroups)
    if names:
        scratch["own_scalars"] = plgpu.SMEM((config.warpgroups, len(names), TILE), jnp.float32)
    for name in ("dbeta",) * write + ("ddecay",) * sums_scores(config):
        outputs[name] = ((batch, heads, length), jnp.float32)
        scratch[f"{name}_tile"] = plgpu.SMEM((config.warpgroups, TILE), jnp.float32)
    scratch |= tiles.index_scratch(config)
    return tiles.call(
        config,
        f"{'write' if write else 'attention'}_backward_queries",
        functools.partial(_compute_queries, config=config, write=write),
        functools.partial(tiles.copy_columns, config=config, values=config.parts),
        (batch, heads, length // config.rows),
        inputs,
        outputs,
        scratch,
    )


def _key_extent(config: AttentionConfig, refs: Refs):
    """A program's block of keys; the first tile of queries that sees it, and where they end."""
    j = lax.axis_index("block")
    place = (lax.axis_index("batch_row"), lax.axis_index("head"))
    if not config.causal:
        first = refs.first[(*place, j)]
        return j, first, jnp.maximum(refs.last[(*place, j)], first)
    first = jnp.maximum((j - config.before) * config.warpgroups, 0) if config.own else refs.bound[(*place, 0)]
    stop = jnp.int32(refs.q.shape[2] // TILE)
    if config.bounded:
        stop = refs.last[(*place, j)]
        # Queries of the block itself are always visited.
        least = jnp.where(j >= config.before, first + config.warpgroups, first) if config.own else first
        stop = jnp.maximum(stop, least)
    return j, first, stop


def _query_ring(config: AttentionConfig, refs: Refs, names: tuple[str, ...], tile_of) -> Ring:
    """Tiles of queries, with their scalars, and of g; `tile_of` maps a count to head and tile."""
    b, parts = lax.axis_index("batch_row"), range(_key_gradient_parts(config, _wanted(refs)))

    def keys(count):
        h, t = tile_of(count)
        copies = [(refs.q.at[b, h, pl.ds(t * TILE, TILE)], refs.key_slots)]
        return copies + ([(refs.q_scalars.at[b, h, t], refs.scalar_slots)] if names else [])

    def values(count):
        h, t = tile_of(count)
        place = (b, h, pl.ds(t * TILE, TILE))
        return [(refs[f"g{n}"].at[place], refs[f"value_slots{n}"]) for n in parts]

    return Ring(config, refs, keys, values)


def _wanted(refs: Refs) -> tuple[str, ...]:
    """The gradients of keys that a kernel computes."""
    return tuple(name for name in ("dk", "dx", "ddecay") if name in refs)


def _query_tiles(config: AttentionConfig, refs: Refs):
    """Tiles of queries per head, query heads per key head, and a function from a count to head and tile."""
    _, first, stop = _key_extent(config, refs)
    repeat, count = refs.q.shape[1] // refs.k.shape[1], stop - first

    def tile_of(c):
        if repeat == 1:
            return lax.axis_index("head"), first + c
        return lax.axis_index("head") * repeat + lax.div(c, count), first + lax.rem(c, count)

    return count, repeat, tile_of


def _copy_queries(refs: Refs, config: AttentionConfig, write: bool) -> None:
    count, repeat, tile_of = _query_tiles(config, refs)
    ring = _query_ring(config, refs, _op_names(config, write) + column_names(config), tile_of)

    @pl.loop(0, count * repeat)
    def _(c):
        ring.copy_key(c, c)
        ring.copy_value(c, c)

    ring.drain(count * repeat)


def _compute_keys(refs: Refs, config: AttentionConfig, write: bool) -> None:
    b, h, g = (lax.axis_index(name) for name in ("batch_row", "head", "warpgroup"))
    j, first, stop = _key_extent(config, refs)
    count, repeat, tile_of = _query_tiles(config, refs)
    names, own_names = _op_names(config, write) + column_names(config), row_names(config)
    ring = _query_ring(config, refs, names, tile_of)
    keys = pl.ds(j * config.rows + g * TILE, TILE)
    xs = range(_value_parts(config, _wanted(refs)))
    copies = [(refs.k.at[b, h, keys], refs.k_tile)] + [(refs[f"x{n}"].at[b, h, keys], refs[f"x_tile{n}"]) for n in xs]
    gradient_parts = range(_key_gradient_parts(config, _wanted(refs)))
    if own_names and not config.decay:
        copies.append((refs.k_scalars.at[b, h, j * config.warpgroups + g], refs.own_scalars))
    _copy_own(refs, g, copies)

    def row(name):
        return refs.own_scalars.at[g, own_names.index(name)]

    def tile(c, carry, diagonal=None):
        dk, dx, ddecay = carry
        slot = ring.wait_key(c)
        ring.wait_value(c)
        q, gs = refs.key_slots.at[slot], tuple(refs[f"value_slots{n}"].at[slot] for n in gradient_parts)
        at = g + tiles.read_zero(refs, g) if config.slots == 1 else g
        scores = tiles.compute_scores(config, refs.k_tile.at[at], q)

        def column(name):
            return refs.scalar_slots.at[slot, names.index(name)]

        def scalar(name):
            return load_row(column(name), TILE)

        def gap():
            return (
                pair_gap(config, row, column, diagonal=diagonal is not None, transposed=True) if config.decay else None
            )

        def indices():
            return tiles.load_indices(refs, g) if diagonal else None

        def mask():
            return tiles.tile_mask(config, diagonal, row, column, indices(), transposed=True)

        normalized = config.similarity.normalized
        decay = gap() if normalized or "dx" in refs else None
        if normalized and decay is not None:
            # Before the other operands of the weights are loaded: otherwise registers spill.
            scores, decay = tiles.mask_scores(scores, None, decay), None
        lse = scalar("lse") if normalized else None
        weights = tiles.attention_weights(config, scores, mask(), lse, decay)
        if "dx" in refs:
            # Before G, with the weights kept in 16 bits meanwhile: the registers hold no more.
            signed = tiles.split(config, _signed(weights, scalar, write), config.parts)
            kept = weights.astype(config.value_dtype)
            dx = tiles.accumulate(dx, partial_products(signed, gs))
            weights = kept.astype(jnp.float32)
        if "dk" in refs:
            parts = [refs[f"x_tile{n}"].at[at] for n in xs]
            of_values = partial_products(parts, [transposed(part) for part in gs[: len(parts)]])
            (dweights,) = products(of_values)
            dweights = _mask_weight_gradient(config, weights, dweights, mask)
            if config.decay and not normalized:
                dweights = dweights * tiles.decay_factor(gap())
            ds = _score_gradient(config, weights, dweights, scalar, write)
            if "ddecay" in refs:
                ddecay = ddecay - _sum_pairs(config, ds, indices())
            part = q.at[:, pl.ds(config.key_start, config.key_block)]
            dk = tiles.accumulate(dk, partial_products(tiles.split_gradient(config, ds, 1), (part,)))
        ring.release(c)
        return dk, dx, ddecay

    widths = (("dk", config.key_block), ("dx", config.value))
    carry = tuple(tiles.zeros(width) if name in refs else () for name, width in widths)
    # Counted in tiles from `first`; -1 where no tile of queries lies on the diagonal.
    own = (j - config.before) * config.warpgroups + g - first if config.own else jnp.int32(-1)
    here, after = jnp.maximum(own, 0), jnp.maximum(own + 1, 0)

    def head(n, carry):
        start = n * count
        if config.decay:
            source = refs.k_scalars.at[b, h * repeat + n, j * config.warpgroups + g]
            plgpu.copy_gmem_to_smem(source, refs.own_scalars.at[g], refs.scalars_ready.at[g])
            plgpu.barrier_wait(refs.scalars_ready.at[g])
        carry = (*carry, _zero() if "ddecay" in refs else ())
        ring.skip(start, start + here)
        diagonal = functools.partial(tile, diagonal=">" if config.strict else ">=")
        carry = lax.fori_loop(start + here, start + after, diagonal, carry)
        *carry, ddecay = lax.fori_loop(start + after, start + count, tile, carry)
        if "ddecay" in refs:
            refs.ddecay_tile.at[g][...] = ddecay
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.ddecay_tile.at[g], refs.ddecay.at[b, h * repeat + n, keys])
            plgpu.wait_smem_to_gmem(0)
        return tuple(carry)

    dk, dx = head(0, carry) if repeat == 1 else lax.fori_loop(0, repeat, head, carry)
    if "dk" in refs:
        refs.dk[b, h, keys] = dk * config.similarity.scale
    if "dx" in refs:
        refs.dx[b, h, keys] = dx


def _key_gradients(config: AttentionConfig, write: bool, wanted: tuple[str, ...], k, q, *rest) -> tuple[Array, ...]:
    """One device's shard; rest: parts of x and of g, scalars of queries, bound, scalars of keys, bounds of columns."""
    batch, heads, slots = k.shape[:3]
    names, own_names, rest = _op_names(config, write) + column_names(config), row_names(config), list(rest)
    parts = _value_parts(config, wanted)
    inputs = {"indices": tiles.index_vectors(), "k": k, "q": q} | {f"x{n}": rest.pop(0) for n in range(parts)}
    gradient_parts = _key_gradient_parts(config, wanted)
    inputs |= {f"g{n}": rest.pop(0) for n in range(gradient_parts)}
    if names:
        inputs["q_scalars"] = rest.pop(0)
    if config.causal and not config.own:
        inputs["bound"] = rest.pop(0)
    if own_names:
        inputs["k_scalars"] = rest.pop(0)
    inputs |= dict(zip(("last",) if config.causal else ("first", "last"), rest, strict=False))
    shapes = {
        "dk": (*k.shape[:3], config.key_block),
        "dx": (*k.shape[:3], config.value),
        "ddecay": (*q.shape[:2], slots),
    }
    outputs = {name: (shapes[name], jnp.float32) for name in wanted}
    scratch = tiles.ring_scratch(config, config.value, gradient_parts, len(names))
    own = {"k_tile": (config.key, config.dtype)}
    own |= {f"x_tile{n}": (config.value, config.value_dtype) for n in range(parts)}
    scratch |= _own_tiles(config, own)
    arrivals = 1 + parts + (bool(own_names) and not config.decay)
    scratch["own_ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.warpgroups)
    if own_names:
        scratch["own_scalars"] = plgpu.SMEM((config.warpgroups, len(own_names), TILE), jnp.float32)
    if config.decay:
        scratch["scalars_ready"] = plgpu.Barrier(num_barriers=config.warpgroups)
    if "ddecay" in wanted:
        scratch["ddecay_tile"] = plgpu.SMEM((config.warpgroups, TILE), jnp.float32)
    scratch |= tiles.index_scratch(config)
    return tiles.call(
        config,
        f"{'write' if write else 'attention'}_backward_keys",
        functools.partial(_compute_keys, config=config, write=write),
        functools.partial(_copy_queries, config=config, write=write),
        (batch, heads, slots // config.rows),
        inputs,
        outputs,
        scratch,
    )


def query_gradients(
    config: AttentionConfig,
    k: Array,
    q: Array,
    x: tuple[Array, ...],
    g: tuple[Array, ...],
    mask: Mask,
    decay: QueryKeyDecay | None,
    scalars: dict[str, Array | None],
) -> tuple[Array, ...]:
    """dq [B, H, T, K]; dbeta for the write, and ddecay where `sums_scores`, of the queries' sums [B, H, T].

    Args:
      config: sizes; queries see slots of the call.
      k: [B, G, S, K].
      q: [B, H, T, K].
      x: parts of the values, [B, G, S, V].
      g: parts of dO or dP, [B, H, T, V].
      mask: over whole tiles.
      decay: of query heads, or None.
      scalars: lse and delta of the queries [B, H, T], None without a normaliser; beta for the write.
    """
    write, group, heads = scalars.get("beta") is not None, k.shape[1], q.shape[1]
    own = config.key + _gradient_parts(config, write) * config.value
    config = fit(config, config.key + config.parts * config.value, own)
    query, key = (None, None) if decay is None else decay
    names, columns = _op_names(config, write) + row_names(config), column_names(config)
    rest: tuple[Array, ...] = ()
    if names:
        rest += (pack_scalars(names, heads, scalars | row_values(query_mask(mask), query)),)
    if columns:
        values = column_values(key_mask(mask), key)
        rest += (pack_scalars(columns, heads if config.decay else group, values),)
    rest += tuple(tiles.row_bounds(config, k, q.shape[2], mask).values())
    operands = (k, q, *x[: config.parts], *g[: _gradient_parts(config, write)], *rest)
    count = 1 + write + sums_scores(config)
    results = []
    for part in config.key_blocks(sums_scores(config)):
        kernel = split_batch_and_heads(_query_gradients, (part, write), config.axes, results=count)
        results.append(kernel(*operands))
    return _join_channels(results)


def _join_channels(results: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """The results of a kernel for all channels: parts of the first one are joined, the others are the same in each."""
    if len(results) == 1:
        return results[0]
    return jnp.concatenate([part[0] for part in results], axis=-1), *results[0][1:]


def key_gradients(
    config: AttentionConfig,
    k: Array,
    q: Array,
    x: tuple[Array, ...],
    g: tuple[Array, ...],
    mask: Mask,
    decay: QueryKeyDecay | None,
    scalars: dict[str, Array | None],
    wanted: tuple[str, ...],
    bound=0,
) -> tuple[Array, ...]:
    """Those `wanted` of dk [B, G, S, K], dx [B, G, S, V] and ddecay, of the keys' sums [B, H, S], in float32.

    Args:
      config, k, q, x, g, mask, decay, scalars: see `query_gradients`.
      wanted: "dk", "dx", and with dk "ddecay", see `sums_scores`.
      bound: where `config.causal` but not `config.own`, the first query that counts.
    """
    write, group, heads = scalars.get("beta") is not None, k.shape[1], q.shape[1]
    others = tuple(name for name in wanted if name != "dx")
    if max(config.key, config.value) > tuning.SUMMED and 0 < len(others) < len(wanted):
        # Registers hold the sums of one.
        found: dict[str, Array] = {}
        for names in (others, ("dx",)):
            rest = key_gradients(config, k, q, x, g, mask, decay, scalars, names, bound)
            found |= dict(zip(names, rest, strict=True))
        return tuple(found[name] for name in wanted)
    own_parts, parts = _value_parts(config, wanted), _key_gradient_parts(config, wanted)
    config = fit(config, config.key + parts * config.value, config.key + own_parts * config.value)
    query, key = (None, None) if decay is None else decay
    names, own_names = _op_names(config, write) + column_names(config), row_names(config)
    rest: tuple[Array, ...] = ()
    if names:
        values = scalars | column_values(query_mask(mask), query, transposed=True)
        rest += (pack_scalars(names, heads, values),)
    if config.causal and not config.own:
        rest += (tiles.bounds(k, bound),)
    if own_names:
        rest += (pack_scalars(own_names, heads if config.decay else group, row_values(key_mask(mask), key)),)
    rest += tuple(tiles.column_bounds(config, k, q, mask).values())
    results = []
    for part in config.key_blocks(config.mixed) if "dk" in wanted else [config]:
        kernel = split_batch_and_heads(_key_gradients, (part, write, wanted), config.axes, results=len(wanted))
        results.append(kernel(k, q, *x[:own_parts], *g[:parts], *rest))
    return _join_channels(results)
