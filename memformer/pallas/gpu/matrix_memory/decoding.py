"""Few tokens of a matrix memory on Hopper: one kernel that reads the state once and writes it once, in place.

    S' = e^g S    S = S' + k (a v - b S'^T w)^T for each write of a token    o = s S^T q

A warpgroup has the state of one head, or a block of its value columns, in registers: 128 numbers per thread at most, in
float32, without tensor cores. A warp has every fourth row of the state, a lane has columns; what the warps sum meets in
shared memory. Keys and values of all tokens are copied to shared memory while the state is loaded.

With K = V = 128 a head moves 128 KiB of state, 6,200 cycles of an SM's share of 4.8 TB/s at 1.7 GHz. A token takes 512
cycles of multiply-adds (decay, read at w, write, read at q), so that also eight tokens are bound by these bytes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.calls import MatrixCall
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.checks import check_chip, check_dtypes, unsupported
from memformer.pallas.decoding import MatrixStep, find_starts
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.checks import launch_grid
from memformer.pallas.platform import interpreting_for, is_hopper
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]

AXES = ("batch_row", "head", "block")

# Lanes of a warp and warps of a warpgroup.
LANES, WARPS = 32, 4

# Numbers of the state in one program: 128 registers of each thread.
STATE = 128 * LANES * WARPS

# Programs that keep every SM of an H200 busy.
PROGRAMS = 132

# Writes of one call, over all of its tokens: they are unrolled.
MOST_WRITES = 32


def _layout(columns: int) -> plgpu.Layout:
    """The layout of a state [K, V]: rows over warps, columns over lanes, in vectors of at most 16 bytes."""
    vector = math.gcd(columns // LANES, 4)
    tiling = plgpu.Tiling(((WARPS, LANES * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


class _Operands:
    """The operands of a program: vectors of each token or write in shared memory, and numbers.

    Args:
      step: settings.
      columns: value columns of the program.
      vectors: references [T or T N, width], by name.
      numbers: of each token or write, by name.
    """

    def __init__(self, step: MatrixStep, columns: int, vectors: dict[str, Any], numbers: dict[str, list[Array]]):
        self.step, self.columns, self.layout = step, columns, _layout(columns)
        self._vectors, self.numbers = vectors, numbers

    def rows(self, name: str, at: int) -> Array:
        """[K, V] from a vector with K channels: one number per row."""
        ref = self._vectors[name].at[at]
        x = compat.load(ref, self.layout.reduce(1), optimized=False).astype(jnp.float32)
        x = jnp.exp(x) if name == "decay" else x
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (ref.shape[0], self.columns), (0,)), self.layout)

    def values(self, at: int) -> Array:
        """[V]: the value of a write."""
        return compat.load(self._vectors["v"].at[at], self.layout.reduce(0), optimized=False).astype(jnp.float32)

    def columns_of(self, x: Array, height: int) -> Array:
        """[V] to [K, V]."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (height, self.columns), (1,)), self.layout)


def _advance(operands: _Operands, t: int, state: Array) -> tuple[Array, Array]:
    """The state after token t, and what the token reads."""
    step, numbers = operands.step, operands.numbers
    if "decay" in numbers:
        state = state * jnp.exp(numbers["decay"][t])
    elif step.decay == "channel":
        state = state * operands.rows("decay", t)
    if step.packed:
        state = jnp.where(numbers["starts"][t] > 0.0, 0.0, state)
    for at in range(t * step.writes, (t + 1) * step.writes):
        written = operands.values(at)
        if "alpha" in numbers:
            written = written * numbers["alpha"][at]
        if step.beta:
            stored = jnp.sum(state * operands.rows("w" if step.erase else "k", at), axis=0)
            beta = numbers["beta"][at]
            written = written - stored * beta if "alpha" in numbers else (written - stored) * beta
        state = state + operands.rows("k", at) * operands.columns_of(written, state.shape[0])
    return state, step.scale * jnp.sum(state * operands.rows("q", t), axis=0)


def _kernel(*refs, step: MatrixStep, names: tuple[tuple[str, ...], tuple[str, ...]], columns: int):
    wide, narrow = names
    inputs = dict(zip((*wide, *narrow), refs, strict=False))
    state_g, o_g, end_g, *blocks, barrier = refs[len(inputs) :]
    b, h, n = (lax.axis_index(name) for name in AXES)
    part, heads = pl.ds(n * columns, columns), state_g.shape[1]
    for name, block in zip(wide, blocks, strict=True):
        source = inputs[name]
        at = lax.div(h, jnp.int32(heads // source.shape[2]))
        place = (b, slice(None), at, part) if name == "v" else (b, slice(None), at)
        plgpu.copy_gmem_to_smem(source.at[place], block, barrier)
    # All of them at once, before the first of the barriers that sums over warps need.
    numbers = {
        name: [inputs[name][b, i, h].astype(jnp.float32) for i in range(inputs[name].shape[1])] for name in narrow
    }
    operands = _Operands(step, columns, dict(zip(wide, blocks, strict=True)), numbers)
    # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
    state = compat.load(state_g.at[b, h, :, part], operands.layout, optimized=False) * 1.0
    plgpu.barrier_wait(barrier)
    for t in range(step.tokens):
        state, o_g[b, t, h, part] = _advance(operands, t, state)
    end_g[b, h, :, part] = state


def _block_columns(programs: int, key: int, value: int) -> int:
    """Value columns per program: as many as fit the registers, fewer where there would be few programs."""
    widths = [LANES * vector for vector in (4, 3, 2, 1) if value % (LANES * vector) == 0]
    fitting = [width for width in widths if key * width <= STATE]
    return next((width for width in fitting if programs * value // width >= PROGRAMS), fitting[-1])


def _decode(step: MatrixStep, names: tuple[tuple[str, ...], tuple[str, ...]], *arrays: Array) -> tuple[Array, Array]:
    """One device's shard: q, k, w and decay [B, T, G, K], v [B, T, H, V], numbers [B, T, H], state [B, H, K, V]."""
    *operands, state = arrays
    batch, heads, key, value = state.shape
    columns = _block_columns(batch * heads, key, value)
    wide = dict(zip(names[0], operands, strict=False))
    scratch = [plgpu.SMEM((x.shape[1], columns if name == "v" else key), x.dtype) for name, x in wide.items()]
    scratch.append(plgpu.Barrier(num_arrivals=len(wide)))
    body = functools.partial(_kernel, step=step, names=names, columns=columns)
    out = jax.ShapeDtypeStruct((batch, step.tokens, heads, value), jnp.float32)
    settings = {
        "kernel_name": f"memformer_{step.name}_decode",
        **launch_grid((batch, heads, value // columns), AXES),
    }
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    if jax.typeof(state).manual_axis_type.varying:
        # Inside the caller's shard_map: there references have no type, and the state is written to a new array.
        out_type = [out, jax.ShapeDtypeStruct(state.shape, jnp.float32)]
        kernel = plgpu.kernel(body, out_type=out_type, scratch_types=scratch, compiler_params=params, **settings)
        return tuple(vary_like(x, *arrays) for x in kernel(*arrays))

    def in_place(*refs):
        *inputs, state_g, o_g = refs
        pl.run_scoped(functools.partial(body, *inputs, state_g, o_g, state_g), *scratch)

    mesh, name = plgpu.Mesh(**settings), settings["kernel_name"]
    # `plgpu.kernel` takes no references before jax 0.11.
    kernel = pl.kernel(in_place, out_type=[out], mesh=mesh, compiler_params=params, name=name)

    def run(refs):
        state_ref, o_ref = refs
        (o_ref[...],) = kernel(*operands, state_ref)

    end, o = pl.run_state(run)((state, lax.empty(out.shape, out.dtype)))
    return o, end


def _check(call: MatrixCall) -> None:
    check_chip(call.op, interpreting_for("gpu") or is_hopper(), "an sm_90 GPU")
    arrays = tuple(x for x in (call.q, call.k, call.v, call.w, call.decay) if x is not None)
    check_dtypes(call.op, (*arrays, call.state), ("bfloat16", "float16", "float32"), "for decoding has no float64")
    key, value = call.state.shape[2:]
    if key % 8 or value % LANES or key * LANES > STATE:
        raise unsupported(
            call.op,
            f"for decoding takes key channels in multiples of 8 up to {STATE // LANES} and value channels in multiples"
            f" of {LANES}, got {key} and {value}",
            "implementation='recurrent' or 'chunked' serves it",
        )
    if call.q.shape[1] * call.writes > MOST_WRITES:
        raise unsupported(call.op, f"for decoding takes at most {MOST_WRITES} writes")


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a few tokens of a matrix memory.

    Returns:
      The output and the state, in float32.

    Raises:
      NotImplementedError: not an sm_90 GPU; float64; widths that do not divide over a warpgroup; too many writes.
    """
    _check(call)
    step = MatrixStep.of(call)
    wide = {"q": call.q, "k": call.k, "v": call.v, "w": call.w}
    narrow = {"alpha": call.alpha, "beta": call.beta}
    (wide if call.decay_per_channel else narrow)["decay"] = call.decay
    if call.segments is not None:
        starts = find_starts(call).astype(jnp.float32)[..., None]
        narrow["starts"] = jnp.broadcast_to(starts, call.q.shape[:2] + call.v.shape[2:3])
    arrays = {name: x for name, x in (wide | narrow).items() if x is not None}
    names = tuple(tuple(name for name in group if name in arrays) for group in (wide, narrow))
    operands = [vary_like(arrays[name], *arrays.values(), call.state) for group in names for name in group]
    state = vary_like(call.state.astype(jnp.float32), *operands)
    axes = (2,) * len(operands) + (1,)
    kernel = split_batch_and_heads(_decode, (step, names), step.axes, operands=axes, results=(2, 1), check_vma=False)
    o, end = kernel(*operands, state)
    return o, end
