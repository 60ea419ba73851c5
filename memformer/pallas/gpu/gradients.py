"""What each chunk's gradients are once the scans have passed: no chunk knows of another. XLA's products, no kernel.

With S the state that enters, dS' the gradient of the one that leaves, dR from the backward scan, and the
letters of scan.py (M's and F's rows are tokens that read):

    dV = beta dR     E = c dV     dP = dO U^T     dA = -dR U^T     F = s D dP     M = beta D dA, i < r
    dQ = F K + s c dO S^T
    dK = F^T Q + (M + M^T) K - E S^T + w U dS'^T
"""

import jax.numpy as jnp

from memformer.core.types import Array
from memformer.pallas.gpu.common import Cut

__all__ = ["blocks", "chunk_gradients", "product", "unblock", "weights"]


def product(pattern: str, a: Array, b: Array) -> Array:
    """einsum of two arrays as bfloat16, in float32."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def blocks(cut: Cut, x: Array, repeat: int = 1) -> Array:
    """[B, T, heads, width] to [B, H, N, C, width]."""
    x = x.reshape(x.shape[0], cut.chunks, cut.chunk, *x.shape[2:]).transpose(0, 3, 1, 2, 4)
    return x if repeat == 1 else jnp.repeat(x, repeat, axis=1)


def unblock(x: Array, dtype, repeat: int = 1) -> Array:
    """Back from `blocks`; heads that share one are summed."""
    if repeat > 1:
        x = jnp.sum(x.reshape(x.shape[0], -1, repeat, *x.shape[2:]), axis=2)
    x = x.transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:]).astype(dtype)


def weights(cut: Cut, rows: dict[str, Array]) -> Array:
    """D [B, H, N, C, C] (or [C, C]), 0 where hidden; rows are [B, H, N, C]."""
    visible = jnp.tril(jnp.ones((cut.chunk, cut.chunk), bool))
    if cut.segments:
        visible = visible[None, None, None] & (rows["segment"][..., :, None] == rows["segment"][..., None, :])
    if not cut.decay:
        return visible.astype(jnp.float32)
    gap = rows["total"][..., :, None] - rows["total"][..., None, :]
    visible = jnp.broadcast_to(visible, gap.shape)
    return jnp.where(visible, jnp.exp(jnp.where(visible, gap, jnp.zeros_like(gap))), jnp.zeros_like(gap))


def chunk_gradients(cut: Cut, q, k, v, rows, states, u, do, dr, dstates) -> tuple:
    """Gradients of q, k, v and the rows.

    Args:
      cut: sizes.
      q, k: [B, T, G, K].
      v, u, do, dr: [B, T, H, V].
      rows: as token_rows makes them.
      states, dstates: [B, H, N, K, V], the state that enters each chunk, and the gradient of the one that leaves it.
    """
    names = {name: rows[0][:, :, :, i] for i, name in enumerate(cut.names)}
    columns = {name: x[..., None] for name, x in names.items()}
    qs, ks = blocks(cut, q, cut.repeat), blocks(cut, k, cut.repeat)
    u, do, dr = (blocks(cut, x).astype(jnp.float32) for x in (u, do, dr))

    def times(name, x):
        return x * columns[name] if name in columns else x

    d = weights(cut, names) if cut.segments or cut.decay else weights(cut, names)[None, None, None]
    dread = product("bhnrv,bhniv->bhnri", do, u)
    f = cut.scale * d * dread
    entered = times("enter", do * cut.scale)
    written = product("bhnck,bhnkv->bhncv", ks, dstates)
    dq = product("bhnri,bhnik->bhnrk", f, ks) + product("bhncv,bhnkv->bhnck", entered, states)
    dk = product("bhnri,bhnrk->bhnik", f, qs)
    dk += product("bhncv,bhnkv->bhnck", times("leave", u), dstates)
    dv = times("beta", dr)

    grads = dict.fromkeys(cut.names, jnp.zeros(u.shape[:-1], jnp.float32))
    change = jnp.zeros(())
    if cut.decay:
        read = cut.scale * d * product("bhnrk,bhnik->bhnri", qs, ks)
        change = dread * read
    if cut.carries:
        grads["enter"] = jnp.sum(do * cut.scale * product("bhnck,bhnkv->bhncv", qs, states), axis=-1)
        kept = jnp.sum(states.astype(jnp.float32) * dstates.astype(jnp.float32), axis=(-2, -1))
        grads["enter"] = grads["enter"].at[..., -1].add(kept)
        grads["leave"] = jnp.sum(u * written, axis=-1)
    if cut.beta:
        below = jnp.tril(jnp.ones((cut.chunk, cut.chunk), jnp.float32), -1)[None, None, None]
        stored = product("bhnck,bhnkv->bhncv", ks, states)
        missing = blocks(cut, v).astype(jnp.float32) - times("enter", stored)
        match = below * d * product("bhnrk,bhnik->bhnri", ks, ks)
        da = -product("bhnrv,bhniv->bhnri", dr, u)
        m = below * d * columns["beta"] * da
        dk += product("bhnri,bhnik->bhnrk", m, ks) + product("bhnri,bhnrk->bhnik", m, ks)
        dk -= product("bhncv,bhnkv->bhnck", times("enter", dv), states)
        grads["beta"] = jnp.sum(dr * missing, axis=-1) + jnp.sum(da * match, axis=-1)
        if cut.carries:
            grads["enter"] -= jnp.sum(dv * stored, axis=-1)
        change = change + columns["beta"] * da * match if cut.decay else change
    if cut.decay:
        grads["total"], grads["-total"] = jnp.sum(change, axis=-1), jnp.sum(change, axis=-2)
    drows = (jnp.stack([grads[name] for name in cut.names], axis=3),) if cut.names else ()
    return unblock(dq, q.dtype, cut.repeat), unblock(dk, k.dtype, cut.repeat), unblock(dv, v.dtype), drows
