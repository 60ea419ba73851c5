"""The delta rule on TPU.

Per chunk and head, with S the state that enters the chunk, D the decay between tokens (0 where masked), c and b the
token scalars decay_in and write, beta on columns, s the scale:

    M = D (K K^T), i < r           X = (I + M beta)^-1  W = X (V - c K S)
    P = s D (Q K^T), i <= r        O = s c Q S + P beta W    S' = c_C S + K^T (b W)

The writes of the equations are U = beta W. M, P and X do not depend on the state: two stages prepare them, two chunks
ahead. States and what is computed of them are transposed, [V, K] and [V, C]: token scalars are rows, which cost no lane
broadcast, and rows of a state stream through all products past K, X, Q and P, which are known before.
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
from memformer.pallas.tpu.inverse import fold_diagonal
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
from memformer.pallas.tpu.products import exact_passes, iotas, joined_products, product, split_bf16
from memformer.pallas.tpu.tuning import Tuning

__all__ = ["run"]


# Rows of the scores that are computed at a time.
ROWS = 64


def _strictly_lower(x: Array, top: int = 0) -> Array:
    """Rows of a matrix from `top` on, 0 on its diagonal and above."""
    row, column = iotas(x.shape)
    return jnp.where(row + top > column, x, 0.0)


def _prepared(config: ScanConfig, backward: bool) -> list[tuple[tuple[int, ...], Any]]:
    """The inverse (staged_inverse.py); forward P beta in summands, backward M, P and D."""
    inverse, whole = inverse_scratch(config), ((config.chunk, config.chunk), jnp.float32)
    return inverse + ([whole] * 3 if backward else inverse[SCRATCH:])


def _prepare(config: ScanConfig, scalars: TokenScalars, heads, keys, refs) -> Steps:
    first, folds = SCRATCH + inverse_summands(config), []
    for h, (head_q, head_k), head_refs in zip(heads, keys, refs, strict=True):
        beta, to = scalars.row("beta", h), head_refs[first:]
        kk, qk = (product(x, head_k, "nt", config.passes) for x in (head_k, head_q))
        folded = None
        # Rows by rows, each stored when it is known: whole matrices would be held in registers.
        for top in range(0, config.chunk, ROWS):
            rows = slice(top, min(top + ROWS, config.chunk))
            decay = scalars.decay_mask(h, rows)
            weight = beta * decay
            a = _strictly_lower(weight * kk[rows], top)
            head_refs[0][rows, :] = a
            folded = fold_diagonal(a, top, folded)
            if len(to) == 3:
                rest = (_strictly_lower(decay * kk[rows], top), config.scale * decay * qk[rows], decay)
            else:
                rest = split_bf16(weight * qk[rows], exact_passes(config.passes))
            for ref, x in zip(to, rest, strict=True):
                ref[rows, :] = x
        folds.append(folded)
        yield
    yield from first_stage(config, folds, refs)


def _transposed(x: Array) -> Array:
    """x^T in float32."""
    return x.T.astype(jnp.float32)


def _forward(config: ScanConfig, scalars: TokenScalars, h: int, prepared, keys, v, state):
    q, k = keys
    mm = functools.partial(product, passes=config.passes)
    refs, count = prepared[SCRATCH:], inverse_summands(config)
    missing = _transposed(v) - scalars.decay_in_transposed(h, mm(state[...], k, "nt"))
    yield
    w = config.exact(missing, tuple(ref[...] for ref in refs[:count]), "nt")
    yield
    o = scalars.decay_in_transposed(h, mm(state[...], q, "nt"))
    yield
    o = config.scale * (o + config.exact(w, tuple(ref[...] for ref in refs[count:]), "nt"))
    yield
    return o.astype(v.dtype).T, scalars.decay_state(h, state[...]) + config.exact(
        scalars.write_transposed(h, w), k, "nn"
    )


def _backward(
    config: ScanConfig, scalars: TokenScalars, gradients: ScalarGradients, h: int, prepared, keys, v, state, do, ds
):
    q, k = keys
    mm = functools.partial(product, passes=config.passes)
    *inverse, kk, qk, decay = prepared[SCRATCH:]
    beta = scalars.row("beta", h)
    exact = exact_passes(config.passes)
    join = functools.partial(joined_products, stacked=config.stacked)

    def sums(x):
        return jnp.sum(x, axis=0, keepdims=True)

    # Two chains that do not wait for each other, to W and to dV.
    stored = mm(state[...], k, "nt")
    missing = _transposed(v) - scalars.decay_in_transposed(h, stored)
    dout = _transposed(do[...])
    dcarried = split_bf16(scalars.decay_in_transposed(h, config.scale * dout), config.passes)
    if config.carries:
        carried = config.scale * mm(state[...], q, "nt")
        states = state[...].astype(jnp.float32) * ds[...]
        gradients.add_decay_transposed(h, dout * carried, states)
    dwrites = mm(ds[...], k, "nt")
    dw = join([(dout.astype(v.dtype), beta * qk[...], exact)], "nn") + scalars.write_transposed(h, dwrites)
    yield
    w = config.exact(missing, tuple(ref[...] for ref in inverse), "nt")
    dv = config.exact(dw, tuple(ref[...] for ref in inverse), "nn")
    yield
    gradients.add_row("write", h, sums(w * dwrites))
    ws = split_bf16(w, exact)
    writes = split_bf16(scalars.write_transposed(h, w), config.passes)
    if config.carries:
        gradients.add_row("decay_in", h, -sums(dv * stored))
    e = scalars.decay_in_transposed(h, -dv)
    # One summand of W is enough here: dV keeps what cancels in the sum over the columns of M dM.
    dkk = -join([(dv, ws if config.passes > 1 else ws[:1], exact)], "tn")
    dqk = join([(do[...], ws, exact)], "nn")
    yield
    change = dqk * qk[...] + dkk * kk[...]
    f = config.scale * beta * decay[...] * dqk
    m = _strictly_lower(beta * decay[...] * dkk)
    gradients.add_row("beta", h, sums(change))
    if config.decay:
        change = beta * change
        gradients.add_row("fraction", h, sums(change.T) - sums(change))
    dq = join([(f, k, exact)], "nn") + mm(dcarried, state[...], "tn")
    yield
    one = config.passes
    dk = mm(m, k, "nn") + join([(m, k, one), (f, q, one), (e, state[...], one), (writes, ds[...], one)], "tn")
    return (dq, dk), dv.T, scalars.decay_state(h, ds[...]) + join([(dcarried, q, one), (e, k, exact)], "nn")


STEP = ChunkStep(
    "delta_rule", _forward, _backward, (_prepare, second_stage), _prepared, heads_first=True, transposed=True
)


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
