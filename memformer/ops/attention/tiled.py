"""The chunked form of the attention ops: tiles of scores, memory linear in time, backward too."""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.autodiff import in_forward_mode, reverse_once
from memformer.core.calls import AttentionCall
from memformer.core.sharding import vary_like
from memformer.core.symbolic import is_symbolic, round_up
from memformer.core.types import Array, Float
from memformer.ops.attention import row_sums, tiles
from memformer.ops.attention.arguments import write_operands
from memformer.ops.attention.backward import key_gradient
from memformer.ops.attention.layout import chunk_keys, chunk_queries, in_rows, join_keys, unchunk_keys, unchunk_queries
from memformer.ops.attention.parts import head_parts, stack_parts, unstack_parts
from memformer.ops.attention.tiles import Decay, TileMask, Tiling
from memformer.ops.attention.write import write
from memformer.pallas.platform import chip

__all__ = ["deltaformer", "softmax_attention"]

# Sides of a tile where the caller names none: of the read, and of DeltaFormer's write, which solves a system per chunk.
# On a CPU the read has LARGE ones where tiles are full, SMALL ones where some of them are skipped.
READ_CHUNK, WRITE_CHUNK = 256, 128
LARGE, SMALL = 512, 128


def softmax_attention(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Reads the cache and the tokens by tiles; the output is in the accumulation dtype."""
    k, v, cache = call.k, call.v, call.cache
    if cache is None:
        return _read(call, (None, None), k, v)
    return _read(call, (cache.k, cache.values), k.astype(cache.k.dtype), v.astype(cache.values.dtype))


def deltaformer(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Writes u chunk by chunk, then reads it by tiles.

    Returns:
      The output and u, in the accumulation dtype.
    """
    cache, (tokens, groups) = call.cache, call.k.shape[1:3]
    w, target, beta = write_operands(call)
    tiling, mask = tiles.make_tiling(call, call.write_kernel, WRITE_CHUNK)
    mask, decay = tiles.chunk_decay(call, tiling, mask)
    k, cached, size = call.k, (None, None), tiling.size
    if cache is not None:
        k, cached = k.astype(cache.k.dtype), (cache.k, cache.values.astype(target.dtype))
    target, beta = chunk_keys(target, size), chunk_keys(beta, size)
    cached_u = target[:0] if cached[1] is None else chunk_keys(cached[1], size)
    arrays = chunk_queries(w, groups, size), join_keys(cached[0], k, size), target, beta, cached_u
    w, keys, target, beta, cached_u, *fractions = tiles.unify(mask, *arrays, *(decay or ()))
    u = write(tiling, mask, Decay(*fractions) if fractions else None, w, keys, target, beta, cached_u)
    u = unchunk_keys(u[tiling.cached :], tokens)
    return _read(call, cached, k, u), u


def _read_side(call: AttentionCall) -> int:
    """Side of a tile of the read where the caller names none.

    On a CPU the operations on a large tile are long enough to be divided between cores; tiles are equal, so that the
    last is not mostly padding. Documents, caches and short windows leave tiles empty, and small ones more of them.
    """
    tokens = call.k.shape[1]
    if chip() != "cpu":
        return READ_CHUNK
    if call.mask.key_segment is not None or (call.window or LARGE) < LARGE:
        return SMALL
    if is_symbolic(tokens):
        return LARGE
    return round_up(-(-tokens // max(1, -(-tokens // LARGE))), 16)


def _read(
    call: AttentionCall, cached: tuple[Array | None, Array | None], k: Array, x: Array
) -> Float[Array, "B T H V"]:
    """Reads the values x of the tokens and of the cache at the queries, in the accumulation dtype.

    Args:
      call: its queries, mask and read kernel.
      cached: keys and values of the cache, or None.
      k, x: keys and values of the tokens.
    """
    tokens, groups = k.shape[1:3]
    tiling, mask = tiles.make_tiling(call, call.read_kernel, _read_side(call))
    mask, decay = tiles.chunk_decay(call, tiling, mask)
    q = chunk_queries(call.q, groups, tiling.size)
    k, x = (join_keys(old, new, tiling.size) for old, new in zip(cached, (k, x), strict=True))
    q, k, x, *fractions = tiles.unify(mask, q, k, x, *(decay or ()))
    # Where a group has one decay, each of its query heads has that.
    decay = Decay(*(jnp.broadcast_to(f, (*f.shape[:3], *q.shape[3:5])) for f in fractions)) if fractions else None
    return unchunk_queries(_read_parts(tiling, mask, decay, call.sinks, q, k, x), tokens)


def _read_parts(
    tiling: Tiling, mask: TileMask, decay: Decay | None, sinks: Array | None, q: Array, k: Array, x: Array
) -> Float[Array, "N B G R C V"]:
    """Reads parts of the heads one after another, in the accumulation dtype."""
    read, (batch, groups) = _read_plain if in_forward_mode(decay, q, k, x) else _read_reverse, q.shape[1:3]
    parts, examples = head_parts(mask, batch, groups)
    arrays = (stack_parts(a, parts, examples) for a in (q, k, x))
    output, lse = read(tiling._replace(parts=parts), mask, decay, *arrays)
    output, lse = (a if a is None else unstack_parts(a, parts, batch) for a in (output, lse))
    if sinks is None:
        return output
    sinks = sinks.astype(output.dtype).reshape(1, -1, *q.shape[2:4], 1)
    return output * jax.nn.sigmoid(lse - sinks)[..., None]


def _read_plain(tiling, mask, decay, q, k, x):
    return _read_rows(tiling, mask, decay, q, k, x)


_read_reverse = jax.custom_vjp(_read_plain, nondiff_argnums=(0,))


def _read_rows(tiling, mask, decay, q, k, x):
    """The output, and the log-sum-exp of its rows."""

    rows, columns = q.shape[0] // tiling.parts, k.shape[0] // tiling.parts

    def row(_, inputs):
        place, q = inputs
        part, i = (0, place) if tiling.parts == 1 else (place // rows, place % rows)
        steps = mask.used + (i + 1 if tiling.causal else columns - tiling.cached)
        sums = row_sums.sum_row(tiling, mask, decay, i, q, k, x, steps, own=tiling.causal, part=part)
        if sums.total is None:
            return None, (in_rows(sums.value), None)
        total = jnp.where(sums.total > 0, sums.total, jnp.ones_like(sums.total))
        return None, (in_rows(sums.value / total[:, :, None]), row_sums.row_lse(sums))

    index = jnp.arange(q.shape[0], dtype=jnp.int32)
    return lax.scan(row, None, (index, q))[1]


def _read_forward(tiling, mask, decay, q, k, x):
    output, lse = reverse_once(tiles.REVERSE_ONCE, *_read_rows(tiling, mask, decay, q, k, x))
    return (output, lse), (mask, decay, q, k, x, output if tiling.kernel.normalized else None, lse)


def _read_backward(tiling, saved, cotangents):
    mask, decay, q, k, x, output, lse = saved
    do, dlse = cotangents
    delta = None if output is None else jnp.sum(output * do, axis=-1) - dlse
    last, columns = q.shape[0] // tiling.parts, k.shape[0] // tiling.parts

    def column(queries, place):
        part, j = (0, place) if tiling.parts == 1 else (place // columns, place % columns)
        first = jnp.maximum(j - tiling.cached, 0) if tiling.causal else 0
        first = jnp.where((j >= mask.used) & (j < tiling.cached), last, first)
        queries, (dk, dx, key_decay) = key_gradient(
            tiling, mask, decay, j, (first, last), k, x, q, (lse, do, delta), queries, part
        )
        return queries, (dk.astype(k.dtype), dx.astype(x.dtype), key_decay)

    def zeros(a):
        return None if a is None else vary_like(jnp.zeros(a.shape, do.dtype), q, k, x, do, *mask.arrays, *(decay or ()))

    start = zeros(q), None if decay is None else zeros(decay.query)
    (dq, query_decay), (dk, dx, key_decay) = lax.scan(column, start, jnp.arange(k.shape[0], dtype=jnp.int32))
    gradients = reverse_once(tiles.REVERSE_ONCE, dq.astype(q.dtype), dk, dx, query_decay, key_decay)
    return None, None if decay is None else Decay(*gradients[3:]), *gradients[:3]


_read_reverse.defvjp(_read_forward, _read_backward)
