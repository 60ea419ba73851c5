"""Linear attention on TPU.

Per chunk and head, with S the state that enters the chunk, D the decay between tokens (0 where masked), c and w the
token scalars decay_in and write, s the scale:

    P = s D (Q K^T), i <= r        O = s c Q S + P V    S' = c_C S + K^T (w V)

Backward, with P recomputed:

    F = s D (dO V^T)               dV = P^T dO + w K dS'
    dQ = F K + s c dO S^T          dK = F^T Q + w V dS'^T
    dS = c_C dS' + Q^T (s c dO)

Source: arXiv 2312.06635 (chunkwise form), 2405.21060 (per-head decay).
"""

import functools

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.tpu.matrix_memory.chunk_scan import ChunkStep, run_scan
from memformer.pallas.tpu.matrix_memory.config import ScanConfig, plan_call
from memformer.pallas.tpu.matrix_memory.token_scalars import ScalarGradients, TokenScalars
from memformer.pallas.tpu.products import product
from memformer.pallas.tpu.tuning import Tuning

__all__ = ["run"]


def _forward(config: ScanConfig, scalars: TokenScalars, h: int, prepared, keys, v, state):
    q, k = keys
    mm = functools.partial(product, passes=config.passes)
    qk = config.scale * scalars.decay_mask(h) * mm(q, k, "nt")
    yield
    carried = config.scale * scalars.decay_in(h, mm(q, state[...], "nn"))
    yield
    o = carried + mm(qk, v, "nn")
    yield
    return o, scalars.decay_state(h, state[...]) + mm(k, scalars.write(h, v), "tn")


def _backward(
    config: ScanConfig, scalars: TokenScalars, gradients: ScalarGradients, h: int, prepared, keys, v, state, do, ds
):
    q, k = keys
    mm = functools.partial(product, passes=config.passes)
    decay = scalars.decay_mask(h)
    qk = config.scale * decay * mm(q, k, "nt")
    yield
    dqk = mm(do, v, "nt")
    f = config.scale * decay * dqk
    yield
    dwrites = mm(k, ds[...], "nn")
    dcarried = scalars.decay_in(h, config.scale * do.astype(jnp.float32))
    yield
    dv = mm(qk, do, "tn") + scalars.write(h, dwrites)
    yield
    dq = mm(f, k, "nn") + mm(dcarried, state[...], "nt")
    yield
    dk = mm(f, q, "tn") + mm(scalars.write(h, v), ds[...], "nt")
    yield
    if config.carries:
        carried = config.scale * mm(q, state[...], "nn")
        gradients.add_column("write", h, jnp.sum(v.astype(jnp.float32) * dwrites, axis=1, keepdims=True))
        gradients.add_decay(h, do.astype(jnp.float32) * carried, state[...].astype(jnp.float32) * ds[...])
    yield
    if config.decay:
        change = dqk * qk
        gradients.add_column("fraction", h, jnp.sum(change, axis=1, keepdims=True))
        gradients.add_row("fraction", h, -jnp.sum(change, axis=0, keepdims=True))
    return (dq, dk), dv, scalars.decay_state(h, ds[...]) + mm(q, dcarried, "tn")


STEP = ChunkStep("linear_attention", _forward, _backward)


def run(call: MatrixCall, sizes: Tuning | None = None) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs linear attention.

    Args:
      call: without beta.
      sizes: in place of those of the table in tuning.py.

    Returns:
      The output (bfloat16 where q, k and v are, else float32), and the state.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    return run_scan(STEP, plan_call(call, sizes), call)
