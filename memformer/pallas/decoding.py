"""Static settings and operands of the kernels that decode a few tokens of a matrix memory, for every chip.

Such a kernel reads the state of a head once and writes it once, for all tokens of the call.
"""

import dataclasses
from typing import Self

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.numerics import repeat_heads
from memformer.core.types import Array, Bool
from memformer.pallas.sharding import KernelAxes, kernel_axes

__all__ = ["MOST_TOKENS", "MatrixStep", "find_starts"]

# T up to which a call is decoded by these kernels.
MOST_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class MatrixStep:
    """Static settings of a call of a matrix memory with a few tokens.

    Attributes:
      name: of the op.
      tokens: T.
      writes: N, per token.
      beta: whether writes erase.
      erase: whether they erase at a vector other than k.
      decay: whether there is a decay, and which: "", "head" or "channel". Starts of packed sequences count as one.
      packed: whether sequences are packed.
      scale: factor on the read.
      axes: mesh axes of batch and heads.
    """

    name: str
    tokens: int
    writes: int
    beta: bool
    erase: bool
    decay: str
    packed: bool
    scale: float
    axes: KernelAxes = dataclasses.field(default_factory=kernel_axes, kw_only=True)

    @classmethod
    def of(cls, call: MatrixCall) -> Self:
        """The settings of a call."""
        kind = "channel" if call.decay_per_channel else "head"
        return cls(
            name=call.op,
            tokens=call.q.shape[1],
            writes=call.writes,
            beta=call.beta is not None,
            erase=call.w is not None,
            decay="" if call.decay is None and call.segments is None else kind,
            packed=call.segments is not None,
            scale=call.scale,
        )

    def operands(self, call: MatrixCall) -> dict[str, Array]:
        """The vectors and numbers of each token and value head in float32 by name, [B, T, H, width] or [B, T, H].

        The query is scaled, a value has its write strength, and `decay` is a factor, 0 at the start of a sequence.
        Those of write n of a token have its number behind their name.
        """
        repeats = call.v.shape[2] // call.q.shape[2]
        values = call.v.astype(jnp.float32)
        strength = call.beta if call.alpha is None else call.alpha
        if strength is not None:
            values = values * strength.astype(jnp.float32)[..., None]
        q, k, w = (
            None if x is None else repeat_heads(x.astype(jnp.float32), repeats) for x in (call.q, call.k, call.w)
        )
        found = {"q": call.scale * q}
        for name, x in (("k", k), ("w", w), ("v", values), ("beta", call.beta)):
            if x is not None:
                found |= {f"{name}{n}": x[:, n :: self.writes].astype(jnp.float32) for n in range(self.writes)}
        if self.decay:
            found["decay"] = _decay_factor(call)
        return found


def _decay_factor(call: MatrixCall) -> Array:
    """Factor on the state before each token, [B, T, H] or [B, T, H, K]."""
    shape = (*call.q.shape[:2], call.v.shape[2])
    factor = jnp.ones(shape, jnp.float32) if call.decay is None else jnp.exp(call.decay.astype(jnp.float32))
    if call.segments is None:
        return factor
    starts = find_starts(call)
    return jnp.where(starts.reshape(*starts.shape, *(1,) * (factor.ndim - 2)), 0.0, factor)


def find_starts(call: MatrixCall) -> Bool[Array, "B T"]:
    """Tokens that start a sequence behind the first one of a packed call."""
    index = call.segments.index
    return jnp.diff(index, axis=1, prepend=jnp.zeros_like(index[:, :1])) != 0
