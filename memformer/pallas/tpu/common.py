"""What the TPU kernels share: where they serve, how a call is cut, and products.

Shapes inside the kernels: a program of the grid (batch, block of heads, chunk) holds P heads and one
chunk of C tokens. Queries and keys may have fewer heads: R = H / G value heads share one, and a
program reads max(1, P / R) of those.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from memformer.core.types import Array
from memformer.pallas.platform import set_interpreter, tpu_kind
from memformer.pallas.tpu import tuning

__all__ = [
    "CHUNKS",
    "Cut",
    "PASSES",
    "abreast",
    "check_backend",
    "cut_call",
    "interpreted",
    "iotas",
    "lockstep",
    "product",
]

# Powers of two, for the ladder; 16 rows of bfloat16 fill a register.
CHUNKS = (16, 32, 64, 128, 256)

# bfloat16 passes of the MXU a product takes: 1, 3 (16 bits of each operand), 6 (all of float32).
PASSES = {lax.Precision.DEFAULT: 1, lax.Precision.HIGH: 3, lax.Precision.HIGHEST: 6}


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None):
    """Runs the kernels traced inside in Pallas' TPU interpreter, on any backend (for tests).

    Args:
      params: settings of the interpreter; None gives "parallel" programs two cores, detects races, and
        poisons memory with NaN.
    """
    params = params or pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
    )
    # Jax's own switch is part of the cache key of jit; ours is what `platform` can see.
    with set_interpreter("tpu"), pltpu.force_tpu_interpret_mode(params):
        yield


def check_backend(op: str, *arrays: Array | jax.ShapeDtypeStruct) -> str:
    """The kind of TPU that this trace is for.

    Raises:
      NotImplementedError: not a TPU; an array in float64.
    """
    kind = tpu_kind()
    if kind is None:
        raise NotImplementedError(
            f"the {op} kernel needs a TPU (or a trace for one under jax.sharding.use_abstract_mesh), and this is"
            f" {jax.default_backend()!r}; implementation='chunked' serves here"
        )
    if any(x.dtype == jnp.float64 for x in arrays):
        raise NotImplementedError(f"the {op} kernel has no float64; implementation='chunked' or 'recurrent' serves it")
    return kind


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one call is cut into programs, all static.

    Attributes:
      batch, heads, groups, chunks: sizes B, H, G and N.
      chunk, key, value: sizes C, K and V.
      most: heads a program at most.
      remat: what the backward pass finds saved, see tuning.py.
      passes: MXU passes of a product.
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
    most: int
    remat: str
    passes: int
    scale: float
    beta: bool
    decay: bool
    segments: bool

    @property
    def repeat(self) -> int:
        """R: value heads that share a query and key head."""
        return self.heads // self.groups

    @property
    def block(self) -> int:
        """P: heads a program, whole groups or an even part of one."""
        fits = (p for p in range(self.most, 0, -1) if self.heads % p == 0)
        return next(p for p in fits if p % self.repeat == 0 or self.repeat % p == 0)

    def local(self, q: Array, v: Array) -> "Cut":
        """The cut of what one device holds: q [B, G, T, K], v [B, H, T, V]."""
        return dataclasses.replace(self, batch=v.shape[0], heads=v.shape[1], groups=q.shape[1])

    @property
    def key_block(self) -> int:
        """Query and key heads a program reads."""
        return max(1, self.block // self.repeat)

    @property
    def carries(self) -> bool:
        """Whether the state fades or resets on its way through a chunk."""
        return self.decay or self.segments

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers that every token and head has; see rows.py."""
        kinds: tuple[tuple[str, bool], ...] = (("beta", self.beta), ("write", self.beta or self.carries))
        kinds += (("enter", self.carries), ("total", self.decay), ("segment", self.segments))
        return tuple(name for name, there in kinds if there)

    def row(self, name: str, head: int) -> int:
        """Where the rows of a program hold this number of this head."""
        return self.names.index(name) * self.block + head

    @property
    def sharing(self) -> int:
        """Value heads of a program that share a query and key head."""
        return self.block // self.key_block

    @property
    def pairs(self) -> list[tuple[int, ...]]:
        """The heads of a program, two and two."""
        return [tuple(range(h, min(h + 2, self.block))) for h in range(0, self.block, 2)]


def cut_call(
    op: str,
    q: Array | jax.ShapeDtypeStruct,
    v: Array | jax.ShapeDtypeStruct,
    *,
    beta,
    decay,
    index,
    scale: float,
    chunk_size: int | None,
    precision: lax.Precision,
    sizes: tuning.Tuning | None = None,
) -> Cut:
    """Checks that the kernels serve this call, and chooses chunk and heads a program.

    Args:
      op: name for messages.
      q: [B, T, G, K].
      v: [B, T, H, V].
      beta: strength of the write or None.
      decay: log decay [B, T, H] or None.
      index: segment of every token or None.
      scale: factor on the read.
      chunk_size: the caller's, or None.
      precision: `jax.lax.Precision`.
      sizes: in place of the table's.

    Raises:
      NotImplementedError: not a TPU; float64; decay per channel; a chunk size that no kernel has.
    """
    kind = check_backend(op, q, v)
    if decay is not None and decay.ndim == 4:
        raise NotImplementedError(
            f"the {op} kernel takes no decay per key channel (its scores do not factor into one product a chunk);"
            " implementation='chunked' serves it"
        )
    if chunk_size is not None and chunk_size not in CHUNKS:
        raise NotImplementedError(f"the {op} kernel takes a chunk_size among {CHUNKS}, got {chunk_size}")
    batch, length, groups, key = q.shape
    heads, value = v.shape[2:]
    sizes = sizes or tuning.choose(kind, length, key, value, q.dtype.itemsize)
    chunk = chunk_size or sizes.chunk
    # Blocks of value columns are heads that share queries and keys.
    blocks = value // sizes.values if value % sizes.values == 0 else 1
    return Cut(
        batch=batch,
        heads=heads * blocks,
        groups=groups,
        chunks=-(-length // chunk),
        chunk=chunk,
        key=key,
        value=value // blocks,
        most=sizes.heads,
        remat=sizes.remat,
        passes=PASSES[precision],
        scale=scale,
        beta=beta is not None,
        decay=decay is not None,
        segments=index is not None,
    )


def split(x: Array, passes: int) -> tuple[Array, ...]:
    """x as the sum of arrays that `product` takes: one in bfloat16 (1 pass), two (3 passes), one in float32 (6)."""
    if passes == 6:
        return (x.astype(jnp.float32),)
    high = x.astype(jnp.bfloat16)
    if passes == 1 or x.dtype == jnp.bfloat16:
        return (high,)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def product(a: Array | tuple[Array, ...], b: Array | tuple[Array, ...], contract: str, passes: int) -> Array:
    """Matrix product in float32: contract "nn" is a b, "nt" a b^T, "tn" a^T b.

    Args:
      a: a matrix, or what `split` made of it.
      b: another.
      contract: which axes.
      passes: 1 rounds operands to bfloat16, 3 keeps 16 bits (2 where one operand is bfloat16), 6 keeps float32.
    """
    axes = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
    precision = lax.Precision.HIGHEST if passes == 6 else None
    a, b = (x if isinstance(x, tuple) else split(x, passes) for x in (a, b))
    parts = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]
    products = (
        lax.dot_general(x, y, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
        for x, y in parts
    )
    return functools.reduce(jnp.add, products)


def iotas(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Row and column index of every entry."""
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def abreast(heads: Sequence[Generator[None, None, Any]], count: int, wait: int) -> Generator[None, None, None]:
    """Waits, then takes the heads through their steps, `count` of them side by side, then the next."""
    for _ in range(wait):
        yield
    for first in range(0, len(heads), count):
        running = list(heads[first : first + count])
        while running:
            running = [head for head in running if next(head, True) is None]
            yield


def lockstep(heads: Sequence[Generator[None, None, Any]], apart: int = 0) -> list[Any]:
    """Advances every head to its next yield, in turn, until all have returned; what they returned.

    Each starts `apart` turns after the one before it: fewer of their large values are alive at once.

    One head is a chain of products that wait for each other; steps of several heads side by side keep
    the MXU busy, where the compiler, given one head after the other, does not look that far.
    """
    results: list[Any] = [None] * len(heads)
    running = dict(enumerate(heads))
    turn = 0
    while running:
        turn += 1
        for i, head in list(running.items()):
            if turn <= i * apart:
                break
            try:
                next(head)
            except StopIteration as stop:
                results[i] = stop.value
                del running[i]
    return results
