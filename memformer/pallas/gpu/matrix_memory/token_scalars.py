"""Token scalars in the kernels: write strength, decay and segment per token and head.

One float32 array [B, H, N, names, C], names in the order of `ScanConfig.scalars`: those of pallas/token_scalars.py,
and "-beta", "-whole", "-fraction", "-segment", their negatives. A kernel loads a name either for the rows of a matrix
or for its columns, because the compiler merges two loads of one name and then finds no layout for the result.

Where writes have a strength it is never quite 0: its gradient is computed as a product that contains it, divided by
it.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.calls import MatrixCall
from memformer.core.types import Array
from memformer.pallas import token_scalars
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.matrix_memory.config import ScanConfig
from memformer.pallas.gpu.wgmma import load_column, load_row

__all__ = ["TokenScalars", "stack_scalars"]

# Stands for a write strength of 0.
LEAST = 2.0**-60


def stack_scalars(config: ScanConfig, call: MatrixCall) -> tuple[Array, ...]:
    """The array of the kernels, or () where tokens have no scalars."""
    if not config.scalars:
        return ()
    scalars = token_scalars.token_scalars(config, call)
    if config.beta:
        beta = scalars["beta"]
        scalars["beta"] = beta + lax.stop_gradient(jnp.where(jnp.abs(beta) < LEAST, LEAST - beta, 0.0))
    scalars |= {f"-{name}": -scalars[name] for name in ("beta", "whole", "fraction", "segment") if name in scalars}
    return (jnp.stack([scalars[name] for name in config.scalars], axis=3),)


class TokenScalars:
    """The token scalars of one chunk in shared memory, inside a kernel.

    Args:
      config: sizes.
      ref: [names, C], or None where tokens have no scalars.
    """

    def __init__(self, config: ScanConfig, ref):
        self.config, self.ref = config, ref
        if config.carries:
            # Loaded first although needed last: a commit_smem must separate this load from the next copy to the slot.
            self._chunk_decay = ref[config.scalars.index("decay_in"), config.chunk - 1]

    def scale_rows(self, names: tuple[str, ...], x: Array) -> Array:
        """x [C, width], each row multiplied by its token's scalars of these names, as far as the call has them."""
        for name in names:
            if name in self.config.scalars:
                x = x * load_column(self._named(name), x.shape[1])
        return x

    def scale_tokens(self, names: tuple[str, ...], x: Array, factor: float = 1.0) -> Array:
        """x [width, C], each column multiplied by its token's scalars of these names, as far as the call has them."""
        for name in names:
            if name in self.config.scalars:
                # The product with the factor is computed once per token.
                x, factor = x * (load_row(self._named(name), x.shape[0]) * factor), 1.0
        return x if factor == 1.0 else x * factor

    def scale_columns(self, x: Array) -> Array:
        """x [C, C], each column multiplied by its token's write strength, if there is one."""
        return x * -load_row(self._named("-beta"), x.shape[0]) if self.config.beta else x

    def divide_by_beta(self, x: Array) -> Array:
        """x [C], divided by the write strengths."""
        return x / compat.load(self._named("beta"), plgpu.Layout.WGMMA.reduce(1))

    def decay_state(self, state: Array) -> Array:
        """A state [K, V], decayed over the whole chunk."""
        return state * self._chunk_decay if self.config.carries else state

    def mask_and_decay(self, places: tuple[Array, Array], *scores: Array) -> list[Array]:
        """D times each of the scores [C, C], 0 where masked; rows are the tokens that read.

        Args:
          places: row and column index of every entry.
          *scores: one value per pair of tokens.
        """
        mask = places[0] >= places[1]
        if self.config.segments:
            mask = mask & (self._differences("segment") == 0.0)
        if self.config.decay:
            # Where masked the exponent may be positive and overflow.
            decay = jnp.exp(jnp.where(mask, self._differences("whole") + self._differences("fraction"), 0.0))
            scores = tuple(x * decay for x in scores)
        return [jnp.where(mask, x, 0.0) for x in scores]

    def _differences(self, name: str) -> Array:
        """[C, C]: the scalar of each row's token less that of each column's."""
        size = self.config.chunk
        return load_column(self._named(name), size) + load_row(self._named(f"-{name}"), size)

    def _named(self, name: str):
        return self.ref.at[self.config.scalars.index(name)]
