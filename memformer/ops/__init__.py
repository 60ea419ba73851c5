"""The ops: pure functions that write to a memory and read from it.

All ops share the following contract.

- Layout: arrays are [B, T, H, K]; letters as in `memformer.core.types`. Any T >= 1 and any H, K and V.
- Result: `(output, state)`. Decoding is the same function with T = 1 and the state of the previous call.
- `initial_state`: a state to start from, as an earlier call returned it; None is empty. It belongs to the first
  segment of the call. A matrix state is [B, H, K, V]; the state of an attention op is a cache, which grows with every
  call or has a fixed capacity (`memformer.init_cache`). A matrix state may also be [B, P, H, K, V]: segment p of a row
  then starts from state p, and the returned state has the same shape, with the state at the end of each segment (many
  prompts in one packed call; a place without a segment keeps its state). More than P segments in a row are an error.
  A cache with an axis of documents after the batch (`memformer.init_cache(documents=P)`) works likewise: the tokens of
  a segment take the next slots of its cache. With its arrays, `length` excepted, reshaped to [B P, S, ...] it is the
  cache of B P rows to decode.
- `segment_ids`: for packed sequences, [B, T] integers, 0 = padding. The state resets where the id changes; padding
  leaves the state unchanged and its output is zero. The returned state is that of the last segment.
- `decay`: log decay, at most 0, of the state before each token, per head or per key channel; None is 0.
- `chunk_size`: tokens per chunk (matrix memories) or side of a tile of scores (attention); None lets the
  implementation choose.
- `precision` of matrix products: "default", "high", "highest" or a `jax.lax.Precision`. None is the precision of the
  inputs: the highest for float32 and wider, else the default.
- `implementation`: None chooses the best that serves this call here. "recurrent" processes one token at a time and is
  the reference, "chunked" works in matrix products (XLA), "pallas" runs the TPU or GPU kernels, and "cudnn", where an
  op has it, the library's. Up to 8 tokens of a matrix memory, or of an attention op over a cache of fixed capacity,
  have kernels that read the state once, for decoding; their derivatives are computed as the recurrence.
- dtype: any float dtype in; the output has v's dtype; states and sums are float32 (float64 for float64 inputs).
- Errors: ValueError for a wrong shape, dtype, name or value, naming the argument, what was expected and what was
  given; NotImplementedError where the named implementation cannot serve, with the reason and what can. An
  implementation of None never fails for want of a backend.
- Transformations: jit, grad, vmap, jax.checkpoint and shard_map. Every array argument and the returned state are
  differentiable. Forward mode (jax.jvp) and jax.hessian work with "recurrent" and "chunked"; jit, jax.checkpoint and
  scans go outside of jvp: inside, and in jax.linearize, "recurrent" alone has a forward mode. jax.grad of jax.grad
  works with "recurrent", and for matrix memories with "chunked". "pallas" and "cudnn" have first derivatives in
  reverse mode only, the kernels for decoding all of them. What is missing raises NotImplementedError and names what
  has it.
- Meshes: arrays sharded over batch and heads stay sharded, on Auto and on Explicit mesh axes (docs/meshes.md).
"""
