"""DeltaFormer: attention whose values are written by the delta rule, with any similarity kernel in both places."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.checks import check_array, check_multiple, check_positive
from memformer.core.dispatch import dispatch
from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.segments import find_segments
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel, resolve_kernel
from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array, Dims, Float, Int
from memformer.ops._pallas import deltaformer_kernel, preference
from memformer.ops.attention import tiled as tiles
from memformer.ops.attention.cache import DeltaCache, Timeline, append, check_cache, empty, make_timeline, place
from memformer.ops.attention.recurrent import Reading, choose_tiling, lay_slots, read_row, row_mask

__all__ = ["DeltaCache", "deltaformer", "init_cache"]

GROUPS = "query heads must be a multiple of key/value heads"

# Side of a tile where the caller names none.
CHUNK = 128


def deltaformer(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    w: Float[Array, "B T G K"] | None = None,
    alpha: Float[Array, "B T G"] | None = None,
    beta: Float[Array, "B T G"] | None = None,
    write_kernel: str | Kernel = "softmax",
    read_kernel: str | Kernel = "softmax",
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: DeltaCache | None = None,
    chunk_size: int | None = None,
    precision: str | lax.Precision | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], DeltaCache]:
    """Writes at each key what is new about its value, and reads what was written at the query.

    u_t = alpha_t v_t - beta_t sum_{i < t} kappa1(k_i, w_t) u_i;  o_t = sum_{i <= t} kappa2(k_i, q_t) u_i

    beta = 0 with a softmax read is softmax attention; both kernels linear with alpha = beta is the delta rule
    (scale 1). Writing belongs to the keys: w, alpha, beta and u have G heads, only q has H. Memory is linear in
    T, backward too: scores live one tile at a time and are computed again for gradients.

    The write solves a triangular system. With the kernels that do not normalise (linear, relu, exp, round) keep
    keys at length 1 (`memformer.l2norm`) and beta in [0, 2]: with long keys u itself grows without bound.

    Args:
      q: queries; H is a multiple of G, and head h reads key/value head h // (H / G).
      k: keys.
      v: values.
      w: what is erased before a write; None is k.
      alpha: strength of the write; None is 1.
      beta: strength of the erasure; None is 1.
      write_kernel: kappa1, a `Kernel` or its name; a softmax runs over the tokens before t.
      read_kernel: kappa2, a `Kernel` or its name; a softmax runs over the tokens up to t.
      segment_ids: for packed sequences, 0 = padding: a token sees its own segment only; padding is not seen and
        reads zero.
      initial_state: cache of an earlier call, or from `init_cache`; it belongs to the first segment.
      chunk_size: side of a tile of scores in the chunked form; None lets the library choose.
      precision: of matrix products: None (what the inputs carry), "default", "high", "highest" or a
        `jax.lax.Precision`.
      implementation: None (the best that works here), "recurrent", "chunked" or "pallas".

    Returns:
      The output in v's dtype, and the cache of keys and writes u: one slot longer for each token, or the given
      buffer with the tokens in it. Sums and u are float32 (float64 for float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or name, or a full buffer; the message names the argument.
        Under jit a full buffer is an error of the running program.
      NotImplementedError: the named implementation cannot serve.

    Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), equations 8 and 9.

    Example:
      >>> k = jnp.array([1.0, 1.0]).reshape(1, 2, 1, 1)
      >>> v = jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
      >>> o, cache = deltaformer(k, k, v, write_kernel="linear", read_kernel="linear")
      >>> cache.u[0, :, 0, 0], o[0, :, 0, 0]
      (Array([3., 2.], dtype=float32), Array([3., 5.], dtype=float32))
    """
    dims: Dims = {}
    q = check_array("q", q, "B T H K", dims)
    k = check_array("k", k, "B T G K", dims)
    v = check_array("v", v, "B T G V", dims)
    check_multiple("H", "G", dims, GROUPS)
    w = k if w is None else check_array("w", w, "B T G K", dims)
    dtype = accumulation_dtype(q, k, v, w)
    target = v.astype(dtype)
    one = jnp.ones((dims["B"], dims["T"], dims["G"]), dtype)
    if alpha is not None:
        alpha = check_array("alpha", alpha, "B T G", dims).astype(dtype)
        target = target * alpha[..., None]
    beta = one if beta is None else check_array("beta", beta, "B T G", dims).astype(dtype)
    check_positive("chunk_size", chunk_size)
    kernels = resolve_kernel("write_kernel", write_kernel), resolve_kernel("read_kernel", read_kernel)
    segments = find_segments(segment_ids, dims)
    cache = check_cache(initial_state, DeltaCache, dims, "deltaformer")
    precision = matmul_precision(precision, q, k, v, w)
    write, read = (Reading(x, x.scale_for(dims["K"]), True, None, chunk_size, precision) for x in kernels)
    call = (write, read), make_timeline(cache, segments, dims, ranks=False), cache
    candidates = {
        "recurrent": lambda: _rows(*call, (q, k, w, target, beta)),
        "chunked": lambda: _tiled(*call, (q, k, w, target, beta)),
        "pallas": lambda: deltaformer_kernel(*call, (q, k, w, v, one if alpha is None else alpha, beta)),
    }
    output, u = dispatch("deltaformer", implementation, candidates, preference(dims["T"], few=1))
    return output.astype(v.dtype), append(DeltaCache, cache, segments, k, u)


def init_cache(
    batch: int, capacity: int, groups: int, key_width: int, value_width: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> DeltaCache:
    """A fixed buffer for `capacity` tokens: calls that take it as initial_state write in place.

    Args:
      batch: B.
      capacity: S, the tokens it holds before it is full.
      groups: G, key/value heads.
      key_width: K.
      value_width: V.
      dtype: of keys in the buffer; u is kept in float32 (float64 where this is float64).

    Raises:
      ValueError: a size below 1.

    Example:
      >>> init_cache(1, 16, 2, 8, 8, jnp.bfloat16).u.dtype
      dtype('float32')
    """
    wide = accumulation_dtype(jnp.zeros((), dtype))
    return empty(DeltaCache, (batch, capacity, groups, key_width, value_width), dtype, wide)


def _rows(readings, timeline: Timeline, cache: DeltaCache | None, inputs) -> tuple[Array, Array]:
    """The recurrent form: one token at a time, a row of each kernel."""
    write, read = readings
    q, k, w, target, beta = inputs
    tokens = k.shape[1]
    slots = lay_slots(timeline, cache, tokens)
    k_all = place(cache, None if cache is None else cache.k, k)
    u_all = place(cache, None if cache is None else cache.u, jnp.zeros_like(target))
    count = k_all.shape[1]

    def step(u_all, inputs):
        t, q, w, target, beta = inputs
        mask = row_mask(read, timeline, slots, count, t)
        own = slots.start + t
        earlier = mask & (jnp.arange(count, dtype=jnp.int32)[None] < own)
        u = target - beta[..., None] * read_row(write, earlier, w, k_all, u_all)
        u_all = lax.dynamic_update_slice_in_dim(u_all, u[:, None].astype(u_all.dtype), own, axis=1)
        return u_all, (read_row(read, mask, q, k_all, u_all), u)

    steps = (jnp.arange(tokens, dtype=jnp.int32), *(jnp.moveaxis(x, 1, 0) for x in (q, w, target, beta)))
    _, (output, u) = lax.scan(step, vary_like(u_all, q, k, w, target, beta), steps)
    return jnp.moveaxis(output, 0, 1), jnp.moveaxis(u, 0, 1)


def _tiled(readings, timeline: Timeline, cache: DeltaCache | None, inputs) -> tuple[Array, Array]:
    """The chunked form: u chunk by chunk, then the read by tiles."""
    q, k, w, target, beta = inputs
    tokens, groups = k.shape[1:3]
    write, used = choose_tiling(readings[0], cache, tokens, CHUNK)
    read = write._replace(kernel=readings[1].kernel, scale=readings[1].scale)
    size = write.size
    marks = tiles.make_marks(write, timeline, used)
    held_k, held_u = (None, None) if cache is None else (cache.k, cache.u)
    k = tiles.join_keys(held_k, k if cache is None else k.astype(held_k.dtype), size)
    target, beta = tiles.lay_keys(target, size), tiles.lay_keys(beta, size)
    held = target[:0] if held_u is None else tiles.lay_keys(held_u.astype(target.dtype), size)
    q, w = tiles.lay_queries(q, groups, size), tiles.lay_queries(w, groups, size)
    q, w, k, target, beta, held = tiles.align(marks, q, w, k, target, beta, held)
    u = solve(write, marks, w, k, target, beta, held)
    output = tiles.attend(read, marks, q, k, u)
    return tiles.unlay_queries(output, tokens), tiles.unlay_keys(u[write.before :], tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(tiling: tiles.Tiling, marks: tiles.Marks, w, k, target, beta, held) -> Float[Array, "M B G C V"]:
    """The writes u of all tokens, behind those of the state; memory is linear in time, backward too.

    Rows R of one chunk, earlier rows E, A the write kernel:
    U_R = (I + beta A[R, R])^-1 (target_R - beta A[R, E] U_E).

    Args:
      tiling, marks: as in `_tiles`.
      w: [N, B, G, 1, C, K].
      k: [M, B, G, C, K].
      target: alpha v, [N, B, G, C, V].
      beta: [N, B, G, C].
      held: u of the state, [before, B, G, C, V].
    """
    return _solve(tiling, marks, w, k, target, beta, held)[0]


def _solve(tiling, marks, w, k, target, beta, held):
    """u, and for each row what it read of earlier writes (erased) and its log-sum-exp."""
    start = vary_like(jnp.concatenate([held, jnp.zeros_like(target)]), w, k, target, beta, *marks)

    def row(u, inputs):
        i, w, target, beta = inputs
        sums = tiles.sum_tiles(tiling, marks, i, w, k, u, marks.used + i)
        mask, scores = _own_scores(tiling, marks, i, w, k)
        norm, erased = None, sums.value
        if tiling.kernel.normalized:
            top, shrink, weights = tiles.widen(sums, tiles.hide(scores, mask))
            total = sums.total * shrink + jnp.sum(weights, axis=-1)
            norm = tiles.norm_of(tiles.Sums(top, total, sums.value))
            erased = sums.value * jnp.exp(sums.top - norm)[..., None]
        own = tiles.tile_weights(tiling, mask, scores, norm)[:, :, 0]
        inverse = unit_lower_inverse(beta[..., None] * own)
        new = _exact(inverse, target - beta[..., None] * erased[:, :, 0])
        erased = erased + _exact(own, new)[:, :, None]
        return lax.dynamic_update_index_in_dim(u, new, i + tiling.before, 0), (erased, norm)

    index = jnp.arange(w.shape[0], dtype=jnp.int32)
    u, (erased, norm) = lax.scan(row, start, (index, w, target, beta))
    return u, erased, norm


def _own_scores(tiling, marks, i, w, k):
    """Mask and scores of a chunk against itself."""
    own = i + tiling.before
    mask = tiles.visible(tiling, marks, i, own, strict=True)
    return mask, tiles.tile_scores(tiling, w, tiles.take(k, own))


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _solve_forward(tiling, marks, w, k, target, beta, held):
    u, erased, norm = _solve(tiling, marks, w, k, target, beta, held)
    return u, (marks, w, k, beta, u, erased, norm)


def _solve_backward(tiling, kept, du):
    """Chunks in reverse: a chunk's gradient waits for those of all that read it."""
    marks, w, k, beta, u, erased, norm = kept
    before, rows = tiling.before, w.shape[0]
    start = tuple(
        vary_like(jnp.zeros(shape, u.dtype), w, k, beta, u, du, *marks)
        for shape in (w.shape, erased.shape, erased.shape[:-1])
    )

    def column(carry, inputs):
        dw, derased, mean = carry
        i, w_i, beta_i, erased_i, norm_i, du_i = inputs
        j = i + before
        dw, dk, later = tiles.column_gradient(tiling, marks, j, (i + 1, rows), k, u, w, (norm, derased, mean), dw)
        mask, scores = _own_scores(tiling, marks, i, w_i, k)
        own = tiles.tile_weights(tiling, mask, scores, norm_i)[:, :, 0]
        inverse = unit_lower_inverse(beta_i[..., None] * own)
        dtarget = _exact(jnp.swapaxes(inverse, -1, -2), du_i + later)
        dbeta = -jnp.sum(dtarget * erased_i[:, :, 0], axis=-1)
        derased_i = -(beta_i[..., None] * dtarget)[:, :, None]
        mean_i = jnp.sum(derased_i * erased_i, axis=-1)
        dw_i, dk_i, _ = tiles.tile_gradient(
            tiling, mask, w_i, tiles.take(k, j), tiles.take(u, j), norm_i, derased_i, mean_i
        )
        parts = (tiles.take(dw, i) + dw_i, derased_i, mean_i)
        carry = tuple(
            lax.dynamic_update_index_in_dim(x, part, i, 0) for x, part in zip((dw, derased, mean), parts, strict=True)
        )
        return carry, ((dk + dk_i).astype(k.dtype), dtarget, dbeta)

    def held(dw, j):
        last = jnp.where(j < marks.used, rows, 0)
        dw, dk, dx = tiles.column_gradient(tiling, marks, j, (0, last), k, u, w, (norm, derased, mean), dw)
        return dw, (dk.astype(k.dtype), dx)

    index = jnp.arange(rows, dtype=jnp.int32)
    inputs = (index, w, beta, erased, norm, du[before:])
    (dw, derased, mean), (dk, dtarget, dbeta) = lax.scan(column, start, inputs, reverse=True)
    dw, (dk_held, dheld) = lax.scan(held, dw, jnp.arange(before, dtype=jnp.int32))
    dk = jnp.concatenate([dk_held, dk])
    return None, dw.astype(w.dtype), dk, dtarget, dbeta, du[:before] + dheld


solve.defvjp(_solve_forward, _solve_backward)
