"""Few tokens of a matrix memory on TPU: one kernel that reads the state once and writes it once, in place.

    S' = e^g S    S = S' + k (a v - b S'^T w)^T for each write of a token    o = s S^T q

On the vector unit in float32, token by token; no matrix product is rounded. With K = V = 128 a head moves 128 KiB of
state, and for one token about 10 KiB of rows, so that the least number of bundles per head is what these take at the
bandwidth of the memory: 240 on v5e, 166 on v5p, 140 on v6e, 39 on one core of tpu7x (CLOCK and BANDWIDTH in
benchmarks/tpu/static.py).

What has K channels must multiply the rows of the state, one value per row: XLA packs these vectors as rows of one array
[N, rows, K], whose block the kernel transposes; N counts batch rows and heads. What has V channels or is one number per
head (decay, erase strength) is a row of another array [N, rows, V].
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.calls import MatrixCall
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.checks import unsupported
from memformer.pallas.decoding import MatrixStep
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.checks import check_tpu

__all__ = ["run"]

# Bytes of state in one block: two of them are read and two written while a third pair is computed.
BLOCK = 2**20

# Blocks of a call, if it has as many heads: fewer would leave nothing to read beside the computation.
BLOCKS = 8

# Value columns that are computed together: the state of 128 keys then fills 16 of 64 registers.
COLUMNS = 128

# Writes of one call, over all of its tokens: they are unrolled.
MOST_WRITES = 32


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _Places:
    """Places of the vectors of a call among the rows of the two arrays, in the order of their use."""

    def __init__(self, step: MatrixStep):
        self.step = step
        keys = ["decay"] * (step.decay == "channel")
        values = ["decay"] * (step.decay == "head")
        for n in range(step.writes):
            keys += [f"k{n}"] + [f"w{n}"] * step.erase
            values += [f"v{n}"] + [f"beta{n}"] * step.beta
        self.keys, self.values = [*keys, "q"], values

    def key(self, t: int, name: str) -> int:
        """The row of a vector with K channels of token t."""
        return t * len(self.keys) + self.keys.index(name)

    def value(self, t: int, name: str) -> slice:
        """The row of a vector with V channels of token t."""
        row = t * len(self.values) + self.values.index(name)
        return slice(row, row + 1)


def _decay(step: MatrixStep, state: Array, factor: Array) -> Array:
    """The state times a factor; a factor of 0 forgets what is not finite too, where sequences are packed."""
    decayed = state * factor
    return jnp.where(factor == 0.0, jnp.zeros_like(decayed), decayed) if step.packed else decayed


def _head(step: MatrixStep, rows: _Places, h, columns: Array, y_ref, s_ref, o_ref, end_ref) -> None:
    """All tokens of one head; columns: [K, rows]."""

    def column(t, name):
        at = rows.key(t, name)
        return columns[:, at : at + 1]

    width = s_ref.shape[2]
    for start in range(0, width, COLUMNS):
        part = slice(start, min(start + COLUMNS, width))
        state = s_ref[h, :, part]
        for t in range(step.tokens):
            if step.decay == "head":
                state = _decay(step, state, y_ref[h, rows.value(t, "decay"), part])
            if step.decay == "channel":
                state = _decay(step, state, column(t, "decay"))
            for n in range(step.writes):
                key, written = column(t, f"k{n}"), y_ref[h, rows.value(t, f"v{n}"), part]
                if step.beta:
                    erase = column(t, f"w{n}") if step.erase else key
                    stored = jnp.sum(state * erase, axis=0, keepdims=True)
                    written = written - y_ref[h, rows.value(t, f"beta{n}"), part] * stored
                state = state + key * written
            o_ref[h, t : t + 1, part] = jnp.sum(state * column(t, "q"), axis=0, keepdims=True)
        end_ref[h, :, part] = state


def _kernel(x_ref, y_ref, s_ref, o_ref, end_ref, *, step: MatrixStep):
    rows, block = _Places(step), s_ref.shape[0]
    # Two heads at a time, so that one is computed where the other waits.
    together = 2 - block % 2

    def heads(i, carry):
        for j in range(together):
            h = i * together + j
            _head(step, rows, h, x_ref[h].T, y_ref, s_ref, o_ref, end_ref)
        return carry

    lax.fori_loop(0, block // together, heads, 0)


def _block_heads(heads: int, key: int, value: int) -> int:
    """Heads per program, of all batch rows."""
    size = 4 * _round_up(key, 8) * _round_up(value, 128)
    most = max(1, min(BLOCK // size, heads // BLOCKS))
    return next(count for count in range(most, 0, -1) if heads % count == 0)


def _decode(step: MatrixStep, x: Array, y: Array, state: Array) -> tuple[Array, Array]:
    """One device's shard: x [B, H, rows, K], y [B, H, rows, V], state [B, H, K, V]."""
    like = (x, y, state)
    batch, heads, key, value = state.shape
    x, y, state = (z.reshape(-1, *z.shape[2:]) for z in like)
    block = _block_heads(batch * heads, key, value)

    def spec(z):
        return pl.BlockSpec((block, *z.shape[1:]), lambda i: (i, 0, 0))

    out = [
        varying_result((batch * heads, step.tokens, value), jnp.float32, *like),
        varying_result(state.shape, jnp.float32, *like),
    ]
    o, end = pl.pallas_call(
        functools.partial(_kernel, step=step),
        grid=(batch * heads // block,),
        in_specs=[spec(x), spec(y), spec(state)],
        out_specs=[spec(z) for z in out],
        out_shape=out,
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=f"memformer_{step.name}_decode",
    )(x, y, state)
    return o.reshape(batch, heads, step.tokens, value), end.reshape(batch, heads, key, value)


def _pack(parts: list[Array], tokens: int) -> Array:
    """Vectors [B, T, H, width] of each token, as rows [B, H, rows, width]."""
    rows = jnp.moveaxis(jnp.stack(parts, axis=2), 3, 1)
    rows = rows.reshape(*rows.shape[:2], tokens * len(parts), -1)
    # Whole registers, for the transpose.
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 8), (0, 0)))


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a few tokens of a matrix memory.

    Returns:
      The output and the state, in float32.

    Raises:
      NotImplementedError: no TPU; float64; more writes than are unrolled.
    """
    check_tpu(call.op, call.q, call.v, call.state)
    step = MatrixStep.of(call)
    if step.tokens * step.writes > MOST_WRITES:
        raise unsupported(call.op, f"for decoding takes at most {MOST_WRITES} writes, got {step.tokens * step.writes}")
    arrays, value = step.operands(call), call.v.shape[3]
    wide = {name: jnp.broadcast_to(x[..., None], (*x.shape, value)) if x.ndim == 3 else x for name, x in arrays.items()}
    rows = _Places(step)
    x, y = (_pack([wide[name] for name in names], step.tokens) for names in (rows.keys, rows.values))
    state = vary_like(call.state.astype(jnp.float32), x, y)
    x, y = (vary_like(z, state) for z in (x, y))
    kernel = split_batch_and_heads(_decode, (step,), step.axes, results=2)
    o, end = kernel(x, y, state)
    return jnp.swapaxes(o, 1, 2), end
