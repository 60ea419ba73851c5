"""Few tokens of a matrix memory on TPU: one kernel that reads the state once and writes it once, in place.

The tokens of a call are a chunk: reads of the state that it starts from, what the tokens write and read of each other,
and one update, with decays G from the start of the call and D to its end.

    u = a v - b ((G w) S + sum of earlier writes)    o = s ((G q) S + sum of writes)    S' = G S + (D k)^T u

Of several writes both products with the state run on the matrix unit, exact to 24 bits: every operand is the sum of
three in bfloat16, of which each product that matters is taken. So a token costs the vector unit little beyond splitting
the state. Keys are transposed for several heads at once; their products meet zeros in the rows of other heads.

A single write reads and changes the state on the vector unit, which spares the split. What that needs are keys whose
numbers lie in all lanes of a row: products of transposed keys with ones, which are exact, and which the matrix unit
does meanwhile.

With K = V = 128 a head moves 128 KiB of state, and for one token about 8 KiB of rows, so that the least number of
bundles per head is what these take at the bandwidth of the memory: 256 on v5e, 177 on v5p, 149 on v6e, 42 on one core
of tpu7x (CLOCK and BANDWIDTH in benchmarks/tpu/static.py).

What has K channels lies in rows of one array [N, rows, K], what has V channels or is one number per head (decay, erase
strength) in those of another [N, rows, V]; N counts batch rows and heads.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.calls import MatrixCall
from memformer.core.sharding import vary_like
from memformer.core.symbolic import round_up
from memformer.core.types import Array, Float
from memformer.pallas.checks import unsupported
from memformer.pallas.decoding import MatrixStep
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.checks import check_tpu

__all__ = ["block_heads", "loop_heads", "run"]

# Bytes of state in one block: two of them are read and two written while a third pair is computed.
BLOCK = 2**20

# Blocks of a call, if it has as many heads: fewer would leave nothing to read beside the computation.
BLOCKS = 8

# Value columns that are computed together.
COLUMNS = 128

# Heads of one step of the loop, if a tile has no more, and how many heads later their results are used: enough to cover
# the latency.
HEADS, WRITE_LAG, STORE_LAG = 8, 6, 2

# The same for a single write, whose blocks are twice as large: more heads hide more latency of the first and the last.
SINGLE_HEADS = 32

# Pairs of summands whose products make up one that is exact to 24 bits, as in `_split`.
PAIRS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))

# Rows of a tile that is transposed.
LANES = 128

# Writes of one call, over all of its tokens: they are unrolled.
MOST_WRITES = 32


class _Places:
    """Places of the vectors of a call among the rows of the two arrays: by kind, then by time."""

    def __init__(self, step: MatrixStep):
        tokens, writes = range(step.tokens), range(step.writes)
        self.erase = ("w" if step.erase else "k") if step.beta else ""
        # What reads the state comes first.
        kinds = [self.erase] * bool(self.erase) + ["q"] + ["k"] * (self.erase != "k")
        # Keys decay where later tokens read them.
        kinds += ["decay"] * (step.decay == "channel" or (step.decay != "" and step.tokens > 1))
        self.reads = step.tokens * (1 + step.writes * bool(self.erase))
        self.key_names = self._names(kinds, writes)
        kinds = ["v"] + ["beta"] * step.beta + ["decay"] * (step.decay == "head")
        self.value_names = self._names(kinds, writes)
        self.keys, self.values = (
            [(t, name) for names in kinds for t in tokens for name in names]
            for kinds in (self.key_names, self.value_names)
        )

    @staticmethod
    def _names(kinds, writes) -> list[list[str]]:
        """The names of each kind of vector, of all writes of a token."""
        return [[kind] if kind in ("q", "decay") else [f"{kind}{n}" for n in writes] for kind in kinds]

    def key(self, t: int, name: str) -> slice:
        """The row of a vector with K channels of token t."""
        row = self.keys.index((t, name))
        return slice(row, row + 1)

    def value(self, t: int, name: str) -> slice:
        """The row of a vector with V channels of token t."""
        row = self.values.index((t, name))
        return slice(row, row + 1)


def _forget(step: MatrixStep, x: Array, factor: Array) -> Array:
    """x times a factor; a factor of 0 forgets what is not finite too, where sequences are packed."""
    scaled = x * factor
    return jnp.where(factor == 0.0, jnp.zeros_like(scaled), scaled) if step.packed else scaled


def _split(x: Array) -> tuple[Array, Array, Array]:
    """Three summands of 8 bits each, which bfloat16 holds."""

    def cut(x):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        return lax.bitcast_convert_type(bits, jnp.float32)

    high = cut(x)
    rest = x - high
    middle = cut(rest)
    return high, middle, rest - middle


def _product(a: Array, b: Array) -> Array:
    """A product of two arrays that bfloat16 holds."""
    a, b = (x.astype(jnp.bfloat16) for x in (a, b))
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _pad_rows(parts: list[Array], rows: int, before: int = 0) -> Array:
    """The rows of arrays, with zeros before and behind them."""
    width, used = parts[0].shape[1], before + sum(x.shape[0] for x in parts)
    front = [jnp.zeros((before, width), jnp.float32)] * bool(before)
    return jnp.concatenate([*front, *parts, *[jnp.zeros((rows - used, width), jnp.float32)] * (rows > used)])


class _Keys:
    """Vectors of one head with K channels, and what needs no state.

    Attributes:
      x: the vectors.
      written: at each token, the keys of all writes, those before it decayed to it, [T N, K].
      factor: the decay over all tokens, [1, K], or None.
      read: vectors that read the state, decayed to its tokens, [rows, K].
      alive: at each token, 0 where it sees nothing of the state, with a decay per channel and packed sequences.
    """

    def __init__(self, step: MatrixStep, rows: _Places, x: Array):
        tokens, writes = step.tokens, step.writes
        k = x[rows.key(0, "k0").start : rows.key(tokens - 1, f"k{writes - 1}").stop]
        token = lax.broadcasted_iota(jnp.int32, k.shape, 0) // writes
        self.x, self.written, factors = x, [], []
        for t in range(tokens):
            if (t, "decay") in rows.keys:
                decay = x[rows.key(t, "decay")]
                factors.append(factors[-1] * decay if t else decay)
                k = jnp.where(token < t, k * decay, k) if t else k
            self.written.append(k)
        self.factor = factors[-1] if factors else None
        self.alive = None
        self.read = x[: rows.reads]
        if step.decay == "channel":
            repeated = [x for x in factors for _ in range(writes)] * bool(rows.erase)
            self.read = self.read * jnp.concatenate([*repeated, *factors])
            if step.packed:
                self.alive = [jnp.max(x, axis=1, keepdims=True) for x in factors]

    def transposed(self, step: MatrixStep) -> list[Array]:
        """Rows whose products with those of `_update` update the state; three for a decay per channel."""
        parts = _split(self.written[-1])
        decay = list(_split(self.factor)) if step.decay == "channel" else []
        return [parts[i] for i, _ in PAIRS] + decay


def _read_state(read: Array, s: Array) -> Array:
    """Vectors times the state, [rows, V]."""
    size = round_up(read.shape[0], 8)
    left = jnp.concatenate(_split(_pad_rows([read], size)))
    total = sum(_product(left, part) for part in _split(s))
    return total[:size] + total[size : 2 * size] + total[2 * size :]


def _write(step: MatrixStep, rows: _Places, keys: _Keys, r: Array, y: Array) -> tuple[Array, Array, Array | None]:
    """Runs the tokens of one head.

    Args:
      step: settings.
      rows: places of the vectors.
      keys: of the head.
      r: what they read of the state.
      y: vectors with V channels.

    Returns:
      The output [T, V], what is written [T N, V], and the decay over all tokens if it is one per head, [1, V].
    """
    many = step.tokens * step.writes
    place = lax.broadcasted_iota(jnp.int32, (many, 1), 0)
    u, factor, outputs = None, None, []

    def recall(t, row, name):
        found = r[row : row + 1]
        if factor is not None:
            found = _forget(step, found, factor)
        if keys.alive is not None:
            found = jnp.where(keys.alive[t] == 0.0, 0.0, found)
        if u is not None:
            scores = jnp.sum(keys.written[t] * keys.x[rows.key(t, name)], axis=1, keepdims=True)
            found += jnp.sum(_forget(step, u, scores), axis=0, keepdims=True)
        return found

    for t in range(step.tokens):
        if step.decay == "head":
            decay = y[rows.value(t, "decay")]
            factor = decay if factor is None else factor * decay
        for n in range(step.writes):
            row, new = t * step.writes + n, y[rows.value(t, f"v{n}")]
            if step.beta:
                new = new - y[rows.value(t, f"beta{n}")] * recall(t, row, f"{rows.erase}{n}")
            # Rows of later writes are 0 until then.
            u = jnp.where(place == row, new, 0.0 if u is None else u)
        outputs.append(recall(t, rows.reads - step.tokens + t, "q"))
    if step.packed:
        kept = jnp.max(jnp.abs(keys.written[-1]), axis=1, keepdims=True)
        u = jnp.where(kept == 0.0, 0.0, u)
    return outputs[0] if step.tokens == 1 else jnp.concatenate(outputs), u, factor


def _update(step: MatrixStep, transposed: Array, at: int, u: Array) -> tuple[Array, Array | None]:
    """The change of the state, and the factor on it with a decay per channel, [K, V]; at: first row of the head."""
    parts, (size, many) = _split(u), (transposed.shape[1], u.shape[0])
    added = _product(transposed, _pad_rows([parts[i] for _, i in PAIRS], size, at))
    if step.decay != "channel":
        return added, None
    ones = jnp.ones((3, u.shape[1]), jnp.float32)
    return added, _product(transposed, _pad_rows([ones], size, at + len(PAIRS) * many))


def _is_single(step: MatrixStep) -> bool:
    return step.tokens * step.writes == 1


def _tile(step: MatrixStep, block: int) -> tuple[int, int]:
    """Rows of one head in a tile that is transposed, and heads of the tile."""
    if _is_single(step):
        height = round_up(3 * len(_Places(step).keys), 8)
    else:
        height = round_up(len(PAIRS) * step.tokens * step.writes + 3 * (step.decay == "channel"), 8)
    return height, _divisor(block, max(1, LANES // height))


def loop_heads(step: MatrixStep, block: int) -> int:
    """Heads of one step of the loop over a block: whole tiles."""
    _, together = _tile(step, block)
    return together * _divisor(block // together, max(1, (SINGLE_HEADS if _is_single(step) else HEADS) // together))


def _divisor(count: int, most: int) -> int:
    """The largest divisor of count up to `most`."""
    return next(n for n in range(min(most, count), 0, -1) if count % n == 0)


def _value_columns(width: int) -> list[slice]:
    return [slice(start, min(start + COLUMNS, width)) for start in range(0, width, COLUMNS)]


def _broadcast_columns(transposed: Array, at: int, count: int) -> list[Array]:
    """The vectors of a head with the same number in all lanes, [K, COLUMNS] each.

    Args:
      transposed: a tile, whose rows from `at` on hold the first summands of all vectors, then the others.
      at: first row of the head.
      count: number of vectors.
    """
    row = lax.broadcasted_iota(jnp.int32, (transposed.shape[1], COLUMNS), 0) - at
    ones = [jnp.where((row == n) | (row == n + count) | (row == n + 2 * count), 1.0, 0.0) for n in range(count)]
    found = _product(transposed, jnp.concatenate(ones, axis=1))
    return [found[:, n * COLUMNS : (n + 1) * COLUMNS] for n in range(count)]


def _single_kernel(x_ref, y_ref, s_ref, o_ref, end_ref, *, step: MatrixStep):
    """One write of one token, whose reads of the state are sums on the vector unit."""
    rows, (block, _, width) = _Places(step), s_ref.shape
    height, together = _tile(step, block)
    group, names = loop_heads(step, block), [name for _, name in rows.keys]

    def load_state(h, part, columns):
        """The state before the token, decayed per channel, and the factor per head."""
        state = s_ref[h, :, part]
        if step.decay == "channel":
            return _forget(step, state, columns["decay"][:, : state.shape[1]]), None
        return state, y_ref[h, :, part][rows.value(0, "decay")] if step.decay else None

    def read(h, part, columns):
        """Writes the output; returns what the token writes."""
        x, y, (state, factor) = x_ref[h], y_ref[h, :, part], load_state(h, part, columns)

        def recall(name):
            found = jnp.sum(columns[name][:, : state.shape[1]] * state, axis=0, keepdims=True)
            return found if factor is None else _forget(step, found, factor)

        u = y[rows.value(0, "v0")]
        if step.beta:
            u = u - y[rows.value(0, "beta0")] * recall(f"{rows.erase}0")
        if step.packed:
            kept = jnp.max(jnp.abs(x[rows.key(0, "k0")]), axis=1, keepdims=True)
            u = jnp.where(kept == 0.0, 0.0, u)
        score = jnp.sum(x[rows.key(0, "q")] * x[rows.key(0, "k0")], axis=1, keepdims=True)
        o_ref[h, :, part] = recall("q") + score * u
        return u

    def write(h, part, columns, u):
        state, factor = load_state(h, part, columns)
        state = state if factor is None else _forget(step, state, factor)
        end_ref[h, :, part] = state + columns["k0"][:, : u.shape[1]] * u

    def run_heads(i, carry):
        heads = [i * group + j for j in range(group)]
        columns = []
        for first in range(0, group, together):
            tile = [_split(x_ref[h]) for h in heads[first : first + together]]
            tile = [_pad_rows([x[: len(names)] for x in parts], height) for parts in tile]
            transposed = jnp.concatenate(tile).T.astype(jnp.bfloat16)
            for j in range(together):
                found = _broadcast_columns(transposed, j * height, len(names))
                columns.append(dict(zip(names, found, strict=True)))
        work = [(h, part, found) for h, found in zip(heads, columns, strict=True) for part in _value_columns(width)]
        for one in work:
            write(*one, read(*one))
        return carry

    lax.fori_loop(0, block // group, run_heads, 0)


def _kernel(x_ref, y_ref, s_ref, o_ref, end_ref, *, step: MatrixStep):
    rows, (block, _, width) = _Places(step), s_ref.shape
    height, together = _tile(step, block)
    group = loop_heads(step, block)
    columns = _value_columns(width)

    def heads(i, carry):
        parts = [(j, part) for j in range(group) for part in columns]
        keys, tiles, read, update = {}, {}, {}, {}

        def start(n):
            j, part = parts[n]
            h = i * group + j
            if j not in keys:
                near = range(j, j + together)
                keys.update({m: _Keys(step, rows, x_ref[i * group + m]) for m in near})
                tile = [_pad_rows(keys[m].transposed(step), height) for m in near]
                tiles[j // together] = jnp.concatenate(tile).T.astype(jnp.bfloat16)
            read[n] = _read_state(keys[j].read, s_ref[h, :, part])

        def write(n):
            j, part = parts[n]
            h = i * group + j
            o_ref[h, :, part], u, factor = _write(step, rows, keys[j], read.pop(n), y_ref[h, :, part])
            added, factors = _update(step, tiles[j // together], j % together * height, u)
            update[n] = added, factors if step.decay == "channel" else factor

        def store(n):
            j, part = parts[n]
            h = i * group + j
            added, factor = update.pop(n)
            state = s_ref[h, :, part]
            end_ref[h, :, part] = added + (state if factor is None else _forget(step, state, factor))

        for n in range(len(parts) + WRITE_LAG + STORE_LAG):
            for stage, at in ((start, n), (write, n - WRITE_LAG), (store, n - WRITE_LAG - STORE_LAG)):
                if 0 <= at < len(parts):
                    stage(at)
        return carry

    lax.fori_loop(0, block // group, heads, 0)


def block_heads(step: MatrixStep, heads: int, key: int, value: int) -> int:
    """Heads per program, of all batch rows."""
    size = 4 * round_up(key, 8) * round_up(value, 128)
    most = max(1, min((1 + _is_single(step)) * BLOCK // size, heads // BLOCKS))
    return _divisor(heads, most)


def _decode(step: MatrixStep, x: Array, y: Array, state: Array) -> tuple[Array, Array]:
    """One device's shard: x [B, H, rows, K], y [B, H, rows, V], state [B, H, K, V]."""
    like = (x, y, state)
    batch, heads, key, value = state.shape
    x, y, state = (z.reshape(-1, *z.shape[2:]) for z in like)
    block = block_heads(step, batch * heads, key, value)

    def spec(z):
        return pl.BlockSpec((block, *z.shape[1:]), lambda i: (i, 0, 0))

    out = [
        varying_result((batch * heads, step.tokens, value), jnp.float32, *like),
        varying_result(state.shape, jnp.float32, *like),
    ]
    o, end = pl.pallas_call(
        functools.partial(_single_kernel if _is_single(step) else _kernel, step=step),
        grid=(batch * heads // block,),
        in_specs=[spec(x), spec(y), spec(state)],
        out_specs=[spec(z) for z in out],
        out_shape=out,
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=f"memformer_{step.name}_decode",
    )(x, y, state)
    return o.reshape(batch, heads, step.tokens, value), end.reshape(batch, heads, key, value)


def _pack(arrays: dict[str, Array], kinds: list[list[str]], width: int) -> Array:
    """Vectors and numbers of tokens [B, T, H, width] as rows [B, H, rows, width]; kinds: the names of each."""

    def rows(names):
        found = [arrays[name] for name in names]
        found = [x if x.ndim == 4 else jnp.broadcast_to(x[..., None], (*x.shape, width)) for x in found]
        x = jnp.moveaxis(jnp.stack(found, axis=2), 3, 1)
        return x.reshape(*x.shape[:2], -1, width)

    x = jnp.concatenate([rows(names) for names in kinds], axis=2)
    # Whole registers.
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 8), (0, 0)))


def _isolate(arrays: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """Replaces vectors with K channels that are not finite, because heads, also of other sequences, share products.

    Such a vector becomes ones, because a key of zeros is padding, whose values are ignored.

    Returns:
      The arrays, values of tokens with such a key being NaN, and whether a query is finite, [B, T, H, 1].
    """
    wide = [name for name, x in arrays.items() if x.ndim == 4 and not name.startswith("v")]
    finite = {name: jnp.all(jnp.isfinite(arrays[name]), axis=3, keepdims=True) for name in wide}
    stored = functools.reduce(jnp.logical_and, [finite[name] for name in wide if name != "q"])
    found = dict(arrays) | {name: jnp.where(finite[name], arrays[name], 1.0) for name in wide}
    found |= {name: jnp.where(stored, x, jnp.nan) for name, x in arrays.items() if name.startswith("v")}
    return found, finite["q"]


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
    (arrays, readable), rows = _isolate(step.operands(call)), _Places(step)
    x, y = _pack(arrays, rows.key_names, call.q.shape[3]), _pack(arrays, rows.value_names, call.v.shape[3])
    state = vary_like(call.state.astype(jnp.float32), x, y)
    x, y = (vary_like(z, state) for z in (x, y))
    kernel = split_batch_and_heads(_decode, (step,), step.axes, results=2)
    o, end = kernel(x, y, state)
    return jnp.where(readable, jnp.swapaxes(o, 1, 2), jnp.nan), end
