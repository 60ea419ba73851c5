"""DeltaFormer's write by tiles: u of all tokens, with its backward pass; memory is linear in time.

For the rows R of one chunk and the earlier rows E, with the write kernel A:

    U_R = (I + beta A[R, R])^-1 (target_R - beta A[R, E] U_E),  target = alpha V
"""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.autodiff import in_forward_mode, reverse_once
from memformer.core.sharding import vary_like
from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array, Float
from memformer.ops.attention import row_sums, tiles
from memformer.ops.attention.backward import add_row, key_gradient, tile_gradient
from memformer.ops.attention.layout import in_columns, in_rows
from memformer.ops.attention.tiles import Decay, TileMask, Tiling

__all__ = ["write"]


def write(
    tiling: Tiling, mask: TileMask, decay: Decay | None, w, k, target, beta, cached_u
) -> Float[Array, "M B G C V"]:
    """u of the cache's slots and of all tokens.

    Args:
      tiling: static settings.
      mask, decay: of the call.
      w: [N, B, G, 1, C, K].
      k: [M, B, G, C, K].
      target: alpha v, [N, B, G, C, V].
      beta: [N, B, G, C].
      cached_u: u of the cache, [cached, B, G, C, V].
    """
    run = _write_plain if in_forward_mode(decay, w, k, target, beta, cached_u) else _write_reverse
    return run(tiling, mask, decay, w, k, target, beta, cached_u)


def _write_plain(tiling, mask, decay, w, k, target, beta, cached_u):
    return _write_rows(tiling, mask, decay, w, k, target, beta, cached_u)[0]


_write_reverse = jax.custom_vjp(_write_plain, nondiff_argnums=(0,))


def _write_rows(tiling, mask, decay, w, k, target, beta, cached_u):
    """u, and for each row its read of earlier writes (erased) and the log-sum-exp of that read."""
    others = (w, k, target, beta, *mask.arrays, *(decay or ()))
    start = vary_like(jnp.concatenate([cached_u, jnp.zeros_like(target)]), *others)

    def row(u, inputs):
        i, w, target, beta = inputs
        sums = row_sums.sum_row(tiling, mask, decay, i, w, k, u, mask.used + i, own=False)
        seen, gap, scores = _own_scores(tiling, mask, decay, i, w, k)
        lse, erased = None, in_rows(sums.value)
        if tiling.kernel.normalized:
            top, shrink, weights = row_sums.rescale(sums, tiles.mask_scores(scores, seen))
            total = sums.total * shrink + jnp.sum(weights, axis=2)
            lse = row_sums.row_lse(row_sums.RowSums(top, total, sums.value))
            erased = erased * jnp.exp(sums.top - lse)[..., None]
        own = jnp.swapaxes(tiles.attention_weights(tiling, seen, scores, lse, gap)[:, :, :, 0], 2, 3)
        inverse = unit_lower_inverse(beta[..., None] * own)
        new = _exact(inverse, target - beta[..., None] * erased[:, :, 0])
        erased = erased + _exact(own, new)[:, :, None]
        return lax.dynamic_update_index_in_dim(u, new, i + tiling.cached, 0), (erased, lse)

    index = jnp.arange(w.shape[0], dtype=jnp.int32)
    u, (erased, lse) = lax.scan(row, start, (index, w, target, beta))
    return u, erased, lse


def _own_scores(tiling, mask, decay, i, w, k):
    """Mask, decay and scores of a chunk against itself."""
    own = i + tiling.cached
    seen = tiles.tile_mask(tiling, mask, i, own, strict=True)
    gap = tiles.tile_gap(tiling, mask, decay, i, own, seen)
    return seen, gap, tiles.tile_scores(tiling, in_columns(w), tiles.take(k, own), gap)


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _write_forward(tiling, mask, decay, w, k, target, beta, cached_u):
    rows = _write_rows(tiling, mask, decay, w, k, target, beta, cached_u)
    u, erased, lse = reverse_once(tiles.REVERSE_ONCE, *rows)
    return u, (mask, decay, w, k, beta, u, erased, lse)


def _write_backward(tiling, saved, du):
    """Chunks in reverse: a chunk's gradient needs those of all chunks that read it."""
    mask, decay, w, k, beta, u, erased, lse = saved
    cached, rows = tiling.cached, w.shape[0]

    def zeros(shape):
        return vary_like(jnp.zeros(shape, u.dtype), w, k, beta, u, du, *mask.arrays, *(decay or ()))

    def column(carry, inputs):
        queries, derased, delta = carry
        i, w_i, beta_i, erased_i, lse_i, du_i = inputs
        j = i + cached
        queries, (dk, later, key_decay) = key_gradient(
            tiling, mask, decay, j, (i + 1, rows), k, u, w, (lse, derased, delta), queries
        )
        seen, gap, scores = _own_scores(tiling, mask, decay, i, w_i, k)
        own = jnp.swapaxes(tiles.attention_weights(tiling, seen, scores, lse_i, gap)[:, :, :, 0], 2, 3)
        inverse = unit_lower_inverse(beta_i[..., None] * own)
        dtarget = _exact(jnp.swapaxes(inverse, -1, -2), du_i + later)
        dbeta = -jnp.sum(dtarget * erased_i[:, :, 0], axis=-1)
        derased_i = -(beta_i[..., None] * dtarget)[:, :, None]
        delta_i = jnp.sum(derased_i * erased_i, axis=-1)
        own_queries, (dk_i, _, own_decay) = tile_gradient(
            tiling, seen, gap, w_i, tiles.take(k, j), tiles.take(u, j), lse_i, derased_i, delta_i
        )
        pairs = zip((derased, delta), (derased_i, delta_i), strict=True)
        carry = (
            add_row(queries, own_queries, i),
            *(lax.dynamic_update_index_in_dim(x, part, i, 0) for x, part in pairs),
        )
        key_decay = None if gap is None else key_decay + own_decay
        return carry, ((dk + dk_i).astype(k.dtype), key_decay, dtarget, dbeta)

    def cache_column(queries, j):
        last = jnp.where(j < mask.used, rows, 0)
        rest = (lse, derased, delta)
        queries, (dk, dx, key_decay) = key_gradient(tiling, mask, decay, j, (0, last), k, u, w, rest, queries)
        return queries, (dk.astype(k.dtype), key_decay, dx)

    index = jnp.arange(rows, dtype=jnp.int32)
    inputs = (index, w, beta, erased, lse, du[cached:])
    start = zeros(w.shape), None if decay is None else zeros(decay.query.shape)
    carry, (*of_keys, dtarget, dbeta) = lax.scan(
        column, (start, zeros(erased.shape), zeros(erased.shape[:-1])), inputs, reverse=True
    )
    queries, derased, delta = carry
    (dw, query_decay), (*of_cache, du_cached) = lax.scan(cache_column, queries, jnp.arange(cached, dtype=jnp.int32))
    dk, key_decay = jax.tree.map(lambda *parts: jnp.concatenate(parts), of_cache, of_keys)
    found = dw.astype(w.dtype), dk, dtarget, dbeta, du[:cached] + du_cached, query_decay, key_decay
    gradients = reverse_once(tiles.REVERSE_ONCE, *found)
    return None, None if decay is None else Decay(*gradients[5:]), *gradients[:5]


_write_reverse.defvjp(_write_forward, _write_backward)
