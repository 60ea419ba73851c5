"""Shape legend, glossary and array aliases of the library.

Every array is named by letters, in code, documentation and tests:

    B  batch                 K  key width
    T  time (queries)        V  value width
    S  source time (cache)   D  model width
    H  heads (of queries)    N  chunks, or writes per token
                             P  documents (segments) per row
    G  key/value heads       C  chunk length
       where fewer (H % G == 0)    L  levels of log-linear attention
                             M  slots of gated slot attention

Arrays are [B, T, H, K]; a matrix state is [B, H, K, V] in float32 (float64 under x64).
No other module defines letters.

Glossary:

    matrix memory    a fixed K x V state per head: linear attention, the delta rule, DeltaProduct
    attention        a memory that keeps all keys and values in a cache: softmax attention, DeltaFormer
    write, read      storing a value at a key; retrieving what is stored at a query
    similarity       kappa(k, q), how strongly a key matches a query; named by `Kernel`
    kernel           a Pallas program; only the class `Kernel` and the arguments named after it mean kappa
    decay            log of the factor on the state per token, at most 0, per head or per key channel
    alpha, beta      write strength and erase strength
    w                erase vector: where a write erases, the key unless given
    segment          one of the sequences packed into a row; id 0 is padding
    chunk, tile      C consecutive tokens; a block of scores of C queries and C keys
    chunk scan       the loop over chunks that carries the state
    decay_in         decay from the start of the chunk to a token
    decay_out        decay from a token to the end of the chunk
    chunk_decay      decay over the whole chunk
    qk, wk           decayed inner products inside a chunk of queries and keys, and of erase vectors and keys (kk
                     where they are the keys)
    lse              log-sum-exp of a row of scores
    delta            sum of an output times its gradient: the normaliser's part in the gradient of scores
    mask             which slots a query sees: `core.mask.Mask`
    token scalars    one number per token and head: decay, beta, segment
    cache, slot      keys and values of earlier tokens; the place of one token
    call             checked arguments of an op in one layout: `core.calls`
"""

from typing import TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "ArrayLike", "Bool", "Dims", "Float", "Int"]

ArrayLike: TypeAlias = jax.typing.ArrayLike
Dims: TypeAlias = dict[str, int]
