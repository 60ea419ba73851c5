"""The delta rule on TPU.

Per chunk and head, with S the state that enters the chunk, D the decay between tokens (0 where masked), c and b the
token scalars decay_in and write, beta on columns, s the scale:

    M = D (K K^T), i < r           X = (I + M beta)^-1  W = X (V - c K S)
    P = s D (Q K^T), i <= r        O = s c Q S + P beta W    S' = c_C S + K^T (b W)

The writes of the equations are U = beta W. M, P and X do not depend on the state: two stages prepare them, two chunks
ahead.
Backward, with all of this recomputed:

    dW = (P beta)^T dO + b K dS'   dV = X^T dW          E = c dV
    dP = dO W^T                    dM = -dV W^T         F = s D beta dP       N = D beta dM, i < r
    dQ = F K + s c dO S^T          dK = F^T Q + (N + N^T) K - E S^T + b W dS'^T
    dS = c_C dS' + Q^T (s c dO) - K^T E
    J = P dP + M dM                dbeta = sum of J over rows
    dlog D: sum of J beta over columns, minus its sum over rows

Source: arXiv 2406.06484 (chunkwise delta rule), 2412.06464 (per-head decay).
"""

import functools
from typing import Any

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.tpu.interleave import Steps
from memformer.pallas.tpu.matrix_memory.chunk_scan import ChunkStep, run_scan
from memformer.pallas.tpu.matrix_memory.config import ScanConfig, plan_call
from memformer.pallas.tpu.matrix_memory.staged_inverse import (
    SCRATCH,
    first_stage,
    inverse_scratch,
    inverse_summands,
    second_stage,
)
from memformer.pallas.tpu.matrix_memory.token_scalars import ScalarGradients, TokenScalars
from memformer.pallas.tpu.products import exact_passes, iotas, product, split_bf16
from memformer.pallas.tpu.tuning import Tuning

__all__ = ["run"]


def _strictly_lower(x: Array) -> Array:
    row, column = iotas(x.shape)
    return jnp.where(row > column, x, 0.0)


def _prepared(config: ScanConfig, backward: bool) -> list[tuple[tuple[int, ...], Any]]:
    """The inverse (staged_inverse.py); forward P beta in summands, backward M, P and D."""
    inverse, whole = inverse_scratch(config), ((config.chunk, config.chunk), jnp.float32)
    return inverse + ([whole] * 3 if backward else inverse[SCRATCH:])


def _prepare(config: ScanConfig, scalars: TokenScalars, heads, keys, refs) -> Steps:
    first = SCRATCH + inverse_summands(config)
    a = []
    for h, (head_q, head_k), head_refs in zip(heads, keys, refs, strict=True):
        decay, beta = scalars.decay_mask(h), scalars.row("beta", h)
        kk = _strictly_lower(decay * product(head_k, head_k, "nt", config.passes))
        a.append(beta * kk)
        yield
        qk = config.scale * decay * product(head_q, head_k, "nt", config.passes)
        to = head_refs[first:]
        rest = (kk, qk, decay) if len(to) == 3 else split_bf16(beta * qk, exact_passes(config.passes))
        for ref, x in zip(to, rest, strict=True):
            ref[...] = x
        yield
    yield from first_stage(config, a, refs)


def _forward(config: ScanConfig, scalars: TokenScalars, h: int, prepared, keys, v, state):
    q, k = keys
    mm = functools.partial(product, passes=config.passes)
    count = inverse_summands(config)
    summands = [ref[...] for ref in prepared[SCRATCH:]]
    inverse, qk = tuple(summands[:count]), tuple(summands[count:])
    missing = v.astype(jnp.float32) - scalars.decay_in(h, mm(k, state[...], "nn"))
    yield
    w = config.exact(inverse, missing, "nn")
    yield
    o = config.scale * scalars.decay_in(h, mm(q, state[...], "nn"))
    yield
    o += config.exact(qk, w, "nn")
    yield
    return o, scalars.decay_state(h, state[...]) + config.exact(k, scalars.write(h, w), "tn")


def _backward(
    config: ScanConfig, scalars: TokenScalars, gradients: ScalarGradients, h: int, prepared, keys, v, state, do, ds
):
    q, k = keys
    mm = functools.partial(product, passes=config.passes)
    *inverse, kk, qk, decay = prepared[SCRATCH:]
    inverse = tuple(ref[...] for ref in inverse)
    beta = scalars.row("beta", h)
    stored = mm(k, state[...], "nn")
    missing = v.astype(jnp.float32) - scalars.decay_in(h, stored)
    yield
    w = config.exact(inverse, missing, "nn")
    yield
    dwrites = mm(k, ds[...], "nn")
    gradients.add_column("write", h, jnp.sum(w * dwrites, axis=1, keepdims=True))
    yield
    dw = config.exact(beta * qk[...], do, "tn") + scalars.write(h, dwrites)
    yield
    dv = config.exact(inverse, dw, "tn")
    yield
    # One summand of W is enough here: dV keeps what cancels in the sum over the columns of M dM.
    dkk = -config.exact(dv, w if config.passes > 1 else w.astype(jnp.bfloat16), "nt")
    yield
    dqk = config.exact(do, w, "nt")
    f = config.scale * beta * decay[...] * dqk
    m = _strictly_lower(beta * decay[...] * dkk)
    e = scalars.decay_in(h, dv)
    dcarried = scalars.decay_in(h, config.scale * do.astype(jnp.float32))
    yield
    dq = config.exact(f, k, "nn") + mm(dcarried, state[...], "nt")
    yield
    dk = mm(f, q, "tn") + mm(m, k, "nn") + mm(m, k, "tn") - mm(e, state[...], "nt")
    yield
    dk += mm(scalars.write(h, w), ds[...], "nt")
    yield
    change = dqk * qk[...] + dkk * kk[...]
    gradients.add_row("beta", h, jnp.sum(change, axis=0, keepdims=True))
    if config.decay:
        change = beta * change
        gradients.add_column("fraction", h, jnp.sum(change, axis=1, keepdims=True))
        gradients.add_row("fraction", h, -jnp.sum(change, axis=0, keepdims=True))
    yield
    if config.carries:
        carried = config.scale * mm(q, state[...], "nn")
        gradients.add_decay(h, do.astype(jnp.float32) * carried - dv * stored, state[...].astype(jnp.float32) * ds[...])
    yield
    return (dq, dk), dv, scalars.decay_state(h, ds[...]) + mm(q, dcarried, "tn") - config.exact(k, e, "tn")


STEP = ChunkStep("delta_rule", _forward, _backward, (_prepare, second_stage), _prepared)


def run(call: MatrixCall, sizes: Tuning | None = None) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the delta rule; products of the inverse have at least three passes whatever the precision.

    Args:
      call: with beta.
      sizes: in place of those of the table in tuning.py.

    Returns:
      The output (bfloat16 where q, k and v are, else float32), and the state.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    return run_scan(STEP, plan_call(call, sizes), call)
