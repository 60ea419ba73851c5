"""Linear attention and the delta rule with a log decay per key channel on Hopper: the order of all kernels.

They also serve an erase vector w, a write strength alpha, and float16, each number as the sum of two in bfloat16, so
that scores and states may exceed its range; a decay per head is repeated for every channel. With S the state that
enters the chunk, G the cumulative decay [C, K], a = alpha, b = beta, s the scale:

    M_ri = sum_c W_rc K_ic exp(G_rc - G_ic), i < r      X = (I + b M)^-1    U = X (a V - (b e^G W) S)
    P_ri = s sum_c Q_rc K_ic exp(G_rc - G_ic), i <= r   O = (s e^G Q) S + P U
    S' = e^G_C S + (e^(G_C - G) K)^T U

Without beta, in linear attention, U = V. Across the start of a segment reads of S, M, P and writes are masked. The
gradients, with dS and dS' those of S and S':

    dU = P^T dO + (e^(G_C - G) K) dS'   dR = X^T dU    dS = e^G_C dS' + (s e^G Q)^T dO - (b e^G W)^T dR
    dV = a dR    da = sum of V dR       d(scaled operands) and d(scores): channel_decay_backward.py

XLA scales the operands of the state's products, elementwise, and takes the gradients of the scaled ones back. Kernels
compute P and X of all chunks in parallel (channel_decay_scores.py), scan the chunks forward and backward
(channel_decay_scan.py), then take the gradients within chunks. Saved: the inputs, P, X, U and the state that enters
each chunk.

Source: arXiv 2312.06635 (linear attention), 2510.26692 (delta rule); the ladder: ops/matrix_memory/scores.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.decay import cumulative_decay, decay_to_end
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas import token_scalars
from memformer.pallas.documents import restore
from memformer.pallas.gpu.matrix_memory.channel_decay_backward import operand_gradients, score_gradients
from memformer.pallas.gpu.matrix_memory.channel_decay_scan import scan_backward, scan_forward
from memformer.pallas.gpu.matrix_memory.channel_decay_scores import ChannelConfig, intra_chunk
from memformer.pallas.gpu.matrix_memory.config import align_documents, plan_call, take
from memformer.pallas.gpu.wgmma import split_outside
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]

# exp of this is 0: stands for all stronger decays.
FORGOTTEN = -1024.0

# Where the heads are: in arrays over time, and in all others.
TIME, OTHER = 2, 1


class _Arrays(NamedTuple):
    """Arguments of a call, padded.

    Attributes:
      q, k, w: [B, T, G, K] bfloat16 or float16; w is None without beta.
      v: [B, T, H, V], like them.
      decay: [B, T, H, K] float32.
      scalars: [B, N, C, H], see pallas/token_scalars.py; alpha wherever there is beta.
    """

    q: Array
    k: Array
    v: Array
    w: Array | None
    decay: Array
    scalars: dict[str, Array]

    def keys(self) -> list[Array]:
        """q, k and, with beta, w."""
        return [x for x in (self.q, self.k, self.w) if x is not None]


def _scale(config: ChannelConfig, keys: list[Array], decay: Array, scalars: dict[str, Array]) -> list[Array]:
    """Scaled q and k, the chunk decay, and with beta scaled w, its sign turned; keys in float32."""
    shape = (config.batch, config.chunks, config.chunk, config.heads, config.key)
    by_chunk = decay.reshape(shape)
    sums = cumulative_decay(by_chunk, axis=2).total()
    growth = jnp.exp(sums) * scalars["decay_in"][..., None]
    rest = jnp.exp(jnp.moveaxis(decay_to_end(jnp.moveaxis(by_chunk, 2, 3)), 3, 2)) * scalars["decay_out"][..., None]

    def scale(x, factor):
        x = x.reshape(*shape[:3], config.groups, 1, config.key)
        return (x * factor.reshape(*shape[:3], config.groups, config.repeat, config.key)).reshape(decay.shape)

    scaled = [config.scale * scale(keys[0], growth), scale(keys[1], rest), growth[:, :, -1].swapaxes(1, 2)]
    return scaled + [scale(w, -growth * scalars["beta"][..., None]) for w in keys[2:]]


def _split_scaled(
    config: ChannelConfig, q: Array, k: Array, chunk_decay: Array, *w: Array
) -> tuple[list[Array], Array]:
    """The scaled operands of the scans, parts of q, k and w; and the chunk decay."""
    return [*_split(config, q), *(part for x in (k, *w) for part in split_outside(x))], chunk_decay


def _split(config: ChannelConfig, x: Array) -> tuple[Array, ...]:
    """x in as many bfloat16 parts as its dtype needs."""
    return (x.astype(jnp.bfloat16),) if config.input_parts == 1 else split_outside(x.astype(jnp.float32))


def _scaled(config: ChannelConfig, arrays: _Arrays):
    """The scaled operands, and their pullback to q, k, w, the decay and the scalars."""
    keys = [x.astype(jnp.float32) for x in arrays.keys()]
    return jax.vjp(functools.partial(_scale, config), keys, arrays.decay, arrays.scalars)


def _stack(config: ChannelConfig, scalars: dict[str, Array]) -> tuple[Array, ...]:
    """The token scalars as the kernels have them, [B, H, N, names, C]; () where there are none."""
    if not config.scalars:
        return ()
    scalars = scalars | {f"-{name}": -scalars[name] for name in ("segment",) if name in scalars}
    return (jnp.stack([scalars[name] for name in config.scalars], axis=-1).transpose(0, 3, 1, 4, 2),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(config: ChannelConfig, arrays: _Arrays, start: Array, spans: tuple[Array, ...]) -> tuple[Array, Array]:
    return _forward(config, False, arrays, start, spans)[:2]


def _forward(
    config: ChannelConfig, save: bool, arrays: _Arrays, start: Array, spans: tuple[Array, ...]
) -> tuple[Array, ...]:
    """O, the last state and, to be saved, P, X, the states that enter chunks, and U."""
    operands, chunk_decay = _split_scaled(config, *_scaled(config, arrays)[0])
    named = _stack(config, arrays.scalars)
    inputs = (*arrays.keys(), arrays.decay, *operands, *_split(config, arrays.v), chunk_decay, *named)
    beta = config.beta
    kernels = split_batch_and_heads(
        _forward_kernels,
        (config, save),
        config.axes,
        operands=(TIME,) * (len(inputs) - 1 - len(named)) + (OTHER,) * (2 + len(named)) + (None,) * len(spans),
        results=(TIME, OTHER) + ((OTHER,) * (3 + 2 * beta) + (TIME,) * (2 * beta)) * save,
    )
    return tuple(kernels(*inputs, start, *spans))


def _forward_kernels(config: ChannelConfig, save: bool, *inputs: Array) -> tuple[Array, ...]:
    """One device's shard of `_forward`.

    Args:
      config: sizes.
      save: whether the backward pass follows.
      *inputs: q, k, w, decay, scaled operands, v, chunk decay, scalars, the first state and the chunks of documents.
    """
    beta, parts = config.beta, config.input_parts
    keys, (decay,), operands, v, rest = take(inputs, 2 + beta, 1, parts + 2 + 2 * beta, parts)
    (chunk_decay,), scalars, (start, *spans) = take(rest, 1, bool(config.scalars))
    config = config.local(keys[0], v[0])
    squares = intra_chunk(config, keys[0], keys[1], decay, scalars, erase=False)
    if beta:
        squares += intra_chunk(config, keys[2], keys[1], decay, scalars, erase=True)
    o, end, *saved = scan_forward(config, save, (*operands, *v, chunk_decay, *squares, *scalars[:beta]), start, spans)
    return (o, end, *squares, *saved) if save else (o, end)


def _chunkwise_forward(config, arrays, start, spans):
    o, end, *saved = _forward(config, True, arrays, start, spans)
    return (o, end), (arrays, saved, spans)


def _chunkwise_backward(config: ChannelConfig, inputs: tuple[_Arrays, list[Array], tuple[Array, ...]], cotangents):
    (arrays, saved, spans), (do, dend), beta, parts = inputs, cotangents, config.beta, config.input_parts
    scaled, pull = _scaled(config, arrays)
    operands, chunk_decay = _split_scaled(config, *scaled)
    named = _stack(config, arrays.scalars)
    inputs = (*arrays.keys(), *_split(config, arrays.v), arrays.decay, *operands, *_split(config, do))
    inputs = (*inputs, *saved[3 + 2 * beta :], chunk_decay, dend, *saved[: 3 + 2 * beta], *named, *spans)
    many = 2 + beta
    kernels = split_batch_and_heads(
        _backward_kernels,
        (config,),
        config.axes,
        operands=(TIME,) * (5 + 5 * beta + 3 * parts) + (OTHER,) * (5 + 2 * beta + len(named)) + (None,) * len(spans),
        results=(TIME,) * (config.gradient_parts + many) + (OTHER,) * 2 + (TIME,) * (3 * (1 + beta)),
    )
    dr, dscaled, (dchunk, dstart), by_scores = take(kernels(*inputs), config.gradient_parts, many, 2)
    dr = sum(x.astype(jnp.float32) for x in dr)
    # Of the operands as `_scale` orders them: the chunk decay is its third result.
    dkeys, ddecay, dscalars = pull([*dscaled[:2], dchunk, *dscaled[2:]])
    rows = by_scores[::3]
    gradients = [rows[0], sum(by_scores[1::3])]
    ddecay, dv = ddecay + sum(by_scores[2::3]), dr
    if beta:
        beta_by_row = arrays.scalars["beta"].reshape(*dr.shape[:3], 1)
        gradients.append(beta_by_row * rows[1])
        w = jnp.repeat(arrays.w, config.repeat, axis=2)
        scalar = arrays.scalars["beta"].shape
        dscalars["beta"] += jnp.sum(w.astype(jnp.float32) * rows[1], axis=3).reshape(scalar)
        dscalars["alpha"] += jnp.sum(arrays.v.astype(jnp.float32) * dr, axis=3).reshape(scalar)
        dv = dr * arrays.scalars["alpha"].reshape(*dr.shape[:3], 1)
    shared = (x.reshape(*x.shape[:2], config.groups, config.repeat, config.key).sum(3) for x in gradients)
    dq, dk, *dw = ((x + y).astype(like.dtype) for x, y, like in zip(dkeys, shared, arrays.keys(), strict=True))
    return _Arrays(dq, dk, dv.astype(arrays.v.dtype), dw[0] if beta else None, ddecay, dscalars), dstart, None


def _backward_kernels(config: ChannelConfig, *inputs: Array) -> tuple[Array, ...]:
    """One device's shard of the gradients.

    Args:
      config: sizes.
      *inputs: q, k, w, v, decay, scaled operands, dO, U, chunk decay, gradient of the last state, P, X, the states that
        enter chunks, scalars and the chunks of documents; w, U and X with beta.

    Returns:
      dR, gradients of scaled q, k, w and of the chunk decay, of the first state, then of q, k and decay by P, and of w,
      k and decay by X.
    """
    beta, count, parts = config.beta, 2 + 2 * config.beta, config.input_parts
    keys, v, (decay,), operands, do, u, inputs = take(inputs, 2 + beta, parts, 1, parts + 2 + 2 * beta, parts, 2 * beta)
    (chunk_decay, dend), squares, (states,), scalars, spans = take(inputs, 2, count, 1, bool(config.scalars))
    config = config.local(keys[0], v[0])
    *dr, dstates, dstart = scan_backward(config, (*operands, *do, chunk_decay, *squares), dend, spans)
    masks = scalars if config.segments else ()
    values = (u, dr) if beta else (v, ())
    dq, dk, dchunk, *rest = operand_gradients(config, do, *values, states, dstates, masks)
    dw, dscores = rest[:beta], rest[beta:]
    by_scores = score_gradients(config, keys[0], keys[1], decay, dscores[:2], ())
    if beta:
        by_scores += score_gradients(config, keys[2], keys[1], decay, dscores[2:], scalars)
    return (*dr, dq, dk, *dw, dchunk, dstart, *by_scores)


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a matrix memory with a decay per channel, an erase vector or a write strength.

    Returns:
      The output in the dtype of q, k and v, and the state in float32.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    plan, width = plan_call(call), call.q.shape[3]
    fields: dict[str, Any] = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    config = ChannelConfig(**fields | {"decay": False})
    call, documents, spans = align_documents(config, call)
    length, value = call.q.shape[1], call.v.shape[-1]

    def pad(x, width):
        return pad_time(pad_time(x, config.chunk), width, axis=3)

    decay = jnp.zeros(call.v.shape[:3], jnp.float32) if call.decay is None else call.decay.astype(jnp.float32)
    decay = decay if decay.ndim == 4 else jnp.broadcast_to(decay[..., None], (*decay.shape, width))
    decay = jnp.maximum(pad(decay, config.key), FORGOTTEN)
    w = pad(call.k if call.w is None else call.w, config.key) if config.beta else None
    # [B, H, N, C] to [B, N, C, H], as the scaled operands lie.
    scalars = {name: x.transpose(0, 2, 3, 1) for name, x in token_scalars.token_scalars(config, call).items()}
    scalars = {"alpha": scalars["beta"]} | scalars if config.beta else scalars
    arrays = _Arrays(pad(call.q, config.key), pad(call.k, config.key), pad(call.v, config.value), w, decay, scalars)
    state = pad_time(pad_time(call.state.astype(jnp.float32), config.key, axis=-2), config.value, axis=-1)
    # All or none must vary over an axis of a surrounding shard_map, gradients too.
    arrays, state = jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves((arrays, state))), (arrays, state))
    o, end = _chunkwise(config, arrays, state, spans)
    o, end = o[:, :length, :, :value], end[..., :width, :value]
    return (o, end) if documents is None else restore(documents, o, end)
