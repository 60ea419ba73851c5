"""What the GPU kernels share: where they serve, how a call is cut, and products on the tensor cores."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.pallas import platform
from memformer.pallas.gpu import compat, tuning
from memformer.pallas.platform import is_hopper

__all__ = ["AXES", "Cut", "call_kernel", "column", "cut_call", "halves", "interpreted", "interpreting"]
__all__ += ["iotas", "is_hopper", "pairs", "products", "put", "put_parts", "row", "shared", "turned"]

# The grid coordinates of a program: batch row, value head, and block of value columns or chunk.
AXES = ("batch_row", "head", "block")


@contextlib.contextmanager
def interpreted():
    """Runs the kernels traced inside in Pallas' GPU interpreter with race detection, on any backend (for tests).

    Raises:
      NotImplementedError: this jax has no interpreter that can run them (before 0.11).
    """
    mode = compat.gpu_interpret_mode()
    with platform.set_interpreter("gpu"), mode:
        yield


def interpreting() -> bool:
    """Whether kernels traced now run in the interpreter."""
    return platform.interpreting_for("gpu")


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one call is cut into programs, all static.

    Attributes:
      batch, heads, groups, chunks: sizes B, H, G and N.
      chunk, key, value: sizes C, K and V, the widths as padded for the kernels.
      scale: factor on the read.
      beta: whether writes have a strength (the delta rule).
      decay: whether there is a log decay.
      segments: whether there are segments.
    """

    batch: int
    heads: int
    groups: int
    chunks: int
    chunk: int
    key: int
    value: int
    scale: float
    beta: bool
    decay: bool
    segments: bool

    @property
    def repeat(self) -> int:
        """R: value heads that share a query and key head."""
        return self.heads // self.groups

    def local(self, q: Array, v: Array) -> "Cut":
        """The cut of what one device holds: q [B, T, G, K], v [B, T, H, V]."""
        return dataclasses.replace(self, batch=v.shape[0], heads=v.shape[2], groups=q.shape[2])

    @property
    def block(self) -> int:
        """Value columns a program."""
        return tuning.VALUE_BLOCKS[self.key]

    @property
    def walkers(self) -> int:
        """Warpgroups of a scan's program, each with its own block of value columns."""
        return 1 + (self.value // self.block % 2 == 0)

    @property
    def carries(self) -> bool:
        """Whether the state fades or resets on its way through a chunk."""
        return self.decay or self.segments

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers that every token and head has; see rows.py."""
        kinds: tuple[tuple[str, bool], ...] = (("enter", self.carries), ("leave", self.carries))
        kinds += (
            ("beta", self.beta),
            ("-beta", self.beta),
            ("total", self.decay),
            ("-total", self.decay),
            ("segment", self.segments),
            ("-segment", self.segments),
        )
        return tuple(name for name, there in kinds if there)


def cut_call(
    op: str, q: Array, k: Array, v: Array, *, beta, decay, index, scale: float, chunk_size, precision: lax.Precision
) -> Cut:
    """Checks that the kernels serve this call, and chooses its blocks.

    Args:
      op: name for messages.
      q, k: [B, T, G, K].
      v: [B, T, H, V].
      beta: strength of the write or None.
      decay: log decay [B, T, H] or None.
      index: segment of every token or None.
      scale: factor on the read.
      chunk_size: the caller's, or None.
      precision: of the products.

    Raises:
      NotImplementedError: not an sm_90 GPU; inputs that are not bfloat16; a precision above bfloat16 products;
        decay per channel; keys wider than the kernels hold; a chunk size that no kernel has.
    """
    else_chunked = "implementation='chunked' serves it"
    if not (interpreting() or is_hopper()):
        raise NotImplementedError(
            f"the {op} kernel needs an sm_90 GPU (or a trace for one under jax.sharding.use_abstract_mesh), and this"
            f" is {jax.default_backend()!r}; implementation='chunked' serves here"
        )
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        found = ", ".join(str(x.dtype) for x in (q, k, v))
        raise NotImplementedError(
            f"the {op} kernel takes bfloat16 q, k and v (its products are wgmma on bfloat16), got {found};"
            f" {else_chunked}"
        )
    if precision != lax.Precision.DEFAULT:
        raise NotImplementedError(f"the {op} kernel has products at default precision only; {else_chunked}")
    if decay is not None and decay.ndim == 4:
        raise NotImplementedError(
            f"the {op} kernel takes no decay per key channel (its scores do not factor into one product a chunk);"
            f" {else_chunked}"
        )
    if q.shape[-1] > tuning.KEYS[-1]:
        raise NotImplementedError(
            f"the {op} kernel holds states of at most {tuning.KEYS[-1]} key channels in registers, got"
            f" {q.shape[-1]}; {else_chunked}"
        )
    if chunk_size not in (None, tuning.CHUNK):
        raise NotImplementedError(f"the {op} kernel takes chunk_size {tuning.CHUNK}, got {chunk_size}; {else_chunked}")
    batch, length, groups, key = q.shape
    heads, value = v.shape[2:]
    return Cut(
        batch=batch,
        heads=heads,
        groups=groups,
        chunks=-(-length // tuning.CHUNK),
        chunk=tuning.CHUNK,
        key=next(width for width in tuning.KEYS if width >= key),
        value=-(-value // 64) * 64,
        scale=scale,
        beta=beta is not None,
        decay=decay is not None,
        segments=index is not None,
    )


def call_kernel(cut: Cut, name: str, body, grid, out, scratch, operands, **threads) -> tuple[Array, ...]:
    """A Mosaic GPU kernel over `grid`, named after its memory and `name`.

    Args:
      cut: sizes.
      name: of the kernel.
      body: the kernel.
      grid: programs along AXES.
      out: shapes and dtypes of the results.
      scratch: shared memory and barriers.
      operands: arrays.
      **threads: num_threads and thread_name, of more than one warpgroup.
    """
    memory = "delta_rule" if cut.beta else "linear_attention"
    kernel = plgpu.kernel(
        body,
        out_type=list(out),
        scratch_types=scratch,
        grid=grid,
        grid_names=AXES,
        kernel_name=f"memformer_{memory}_{name}",
        # The other semantics, the default since 0.11, solves for layouts: minutes for the inverse, some never found.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **threads,
    )
    # Under shard_map results vary as the operands do; the kernel's own types do not say so.
    return tuple(vary_like(x, *operands) for x in kernel(*operands))


def shared(width: int, *shape: int) -> plgpu.SMEM:
    """A bfloat16 block of shared memory as wgmma reads it, in tiles of `width` columns: both operands have the same."""
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def halves(width: int, *shape: int) -> list[plgpu.SMEM]:
    """Two blocks, whose sum keeps 16 bits of a float32 array."""
    return [shared(width, *shape), shared(width, *shape)]


def put(ref, x: Array) -> None:
    """Stores x in the dtype of the block."""
    ref[...] = x.astype(ref.dtype)


def put_parts(refs, x: Array) -> None:
    """Stores x as the sum of bfloat16 blocks, to 16 bits where there are two, to 24 where there are three."""
    *refs, last = refs
    for ref in refs:
        put(ref, x)
        x = x - x.astype(jnp.bfloat16).astype(jnp.float32)
    put(last, x)


def pairs(a: Sequence[Any], b: Sequence[Any]) -> tuple[tuple[Any, Any], ...]:
    """What to sum for the product of two matrices given by parts, to the bits that they have."""
    count = max(len(a), len(b))
    return tuple((x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < count)


def turned(ref):
    """A block of shared memory, transposed."""
    return compat.transpose_ref(ref)


def products(*sums) -> tuple[Array, ...]:
    """One float32 array for every sum of matrix products; all are in flight at once.

    Args:
      *sums: tuples of pairs of refs in shared memory; the result is the sum over the pairs of a @ b.
    """

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        plgpu.wgmma_wait(0)
        return tuple(accumulator[...] for accumulator in accumulators)

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in sums]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def column(ref, width: int) -> Array:
    """[C] numbers in shared memory as a [C, width] array, one a row."""
    x = compat.load(ref, plgpu.Layout.WGMMA.reduce(1))
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (ref.shape[0], width), (0,)), plgpu.Layout.WGMMA)


def row(ref, height: int) -> Array:
    """[C] numbers in shared memory as a [height, C] array, one a column."""
    x = compat.load(ref, plgpu.Layout.WGMMA.reduce(0))
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (height, ref.shape[0]), (1,)), plgpu.Layout.WGMMA)


def iotas(rows: int, columns: int | None = None) -> tuple[Array, Array]:
    """Row and column index of every entry of a matrix, square where one size is given."""
    shape = (rows, rows if columns is None else columns)
    place = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return tuple(place)
