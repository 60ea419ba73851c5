"""Floors: the FLOPs and bytes that no implementation can do without."""

from benchmarks.cases import Case

__all__ = ["chunk_flops", "chunk_traffic", "decode_traffic", "floor", "slot_traffic", "tile_flops", "tile_traffic"]


def floor(case: Case, gradient: bool) -> tuple[float, float]:
    """FLOPs and bytes of one call.

    A matrix memory counts as its recurrence: 2 K V per product (the read, the write and, in the delta family, the
    read before each write) and K V for the decay; its backward pass counts twice that. Attention counts the visible
    pairs of one product with keys and one with values, DeltaFormer two of each; the backward pass counts 2.5 times
    that. Bytes: each argument and the output once; in the backward pass each of them, the cotangent and each gradient
    once.
    """
    tokens = float(case.batch * case.heads * case.length)
    if case.is_attention:
        pairs = case.length / max(case.segments, 1) / 2
        parts = 2 if case.op == "deltaformer" and not case.only_u else 1
        flops, backward = parts * tokens * pairs * 2 * (case.key + case.value), 2.5
    else:
        products = 1 + case.steps * (1 if case.op == "linear_attention" else 2)
        flops, backward = tokens * case.key * case.value * (2 * products + bool(case.decay)), 2.0
    out = float(case.itemsize * case.batch * case.length * (case.groups if case.only_u else case.heads) * case.value)
    # w is q, and alpha is absent: see `cases.inputs`.
    sizes = {name: _size(shape) for name, shape in case.shapes.items() if name not in ("w", "alpha")}
    given = float(sum(size * (case.itemsize if name in "qkv" else 4) for name, size in sizes.items()))
    return (flops * (1 + backward), 3 * given + 2 * out) if gradient else (flops, given + out)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def chunk_flops(case: Case, chunk: int, backward: bool) -> int:
    """FLOPs of a matrix memory's products per chunk and head, each counted once, triangles counted as full."""
    C, K, V = chunk, case.key, case.value
    keys, values, states = 2 * C * C * K, 2 * C * C * V, 2 * C * K * V
    carries = bool(case.decay or case.segments)
    if case.op == "linear_attention":
        if backward:
            return 3 * keys + 2 * values + (4 + carries) * states
        return keys + values + 2 * states
    inverse = 2 * C**3 // 3
    if backward:
        return inverse + 6 * keys + 5 * values + (7 + carries) * states
    return inverse + 2 * keys + 2 * values + 3 * states


def chunk_traffic(case: Case, chunk: int, backward: bool) -> tuple[float, float]:
    """Bytes a TPU matrix-memory kernel moves per chunk and head, and those of inputs, output and gradients alone."""
    K, V = case.key, case.value
    shared = case.groups / case.heads
    delta, carries = case.op == "delta_rule", bool(case.decay or case.segments)
    scalars = 4 * (delta + (delta or carries) + carries + bool(case.decay) + bool(case.segments))
    # The delta rule's intra-chunk stage reads them once more.
    scalars *= 2 if delta else 1
    # One pass per product: the states are saved in bfloat16.
    state = 2 * K * V / chunk
    passes = 2 if backward else 1
    # The backward pass also reads the output's gradient, and writes those of q, k and v.
    least = case.itemsize * (passes * 2 * shared * K + (3 * V if backward else 2 * V))
    return chunk * (least + passes * scalars + state), chunk * least


def decode_traffic(case: Case) -> tuple[float, float]:
    """Bytes that the TPU kernel for a few tokens moves per head, and those of reading and writing the state once.

    The rows of a token are in float32: q, k and a decay per channel; v, the output, beta and a decay per head, which
    several tokens have among their keys too.
    """
    delta = case.op != "linear_attention"
    keys = case.length * (2 + (case.decay == "channel" or (case.decay == "head" and case.length > 1)))
    values = case.length * (1 + delta + (case.decay == "head"))
    rows = -(-keys // 8) * 8 * case.key + (-(-values // 8) * 8 + case.length) * case.value
    state = 2 * 4 * case.key * case.value
    return float(state + 4 * rows), float(state)


def slot_traffic(case: Case, slots: int) -> tuple[float, float]:
    """Bytes that the TPU kernel over a cache reads per key head and `slots` slots, and those of keys and values alone.

    u of DeltaFormer is in float32. A segment is one number of 4 bytes per slot, read for eight rows of the batch and
    shared by the key heads; a decay is two per head that has one.
    """
    value = 4 if case.op == "deltaformer" else case.itemsize
    heads = case.shapes["decay"][2] / case.groups if case.decay else 0
    least = slots * (case.itemsize * case.key + value * case.value)
    return least + 4 * slots * (8 / case.groups + 2 * heads), float(least)


def tile_flops(case: Case, rows: int, part: str, backward: bool) -> int:
    """FLOPs of the products of an attention kernel per step of its main loop (part "loop") or for its diagonal tile.

    Forward: scores and values; backward: scores, their gradients, and the gradients of q, k and v. The diagonal tile
    has half of the pairs, and its triangular solve takes as many FLOPs as the values would.
    """
    products = 3 * case.key + 2 * case.value if backward else case.key + case.value
    return (2 if part == "loop" else 1) * rows**2 * products


def tile_traffic(case: Case, kernel: str, rows: int) -> tuple[float, float]:
    """Bytes a TPU attention kernel moves per R tokens of one head, and those of inputs and outputs alone."""
    K, V, itemsize = case.key, case.value, case.itemsize
    # u and every gradient leave a kernel in float32; per-token scalars take eight numbers of 4 bytes.
    values = 4 * V if "write" in kernel else itemsize * V
    least = itemsize * (2 * K + V) + values
    per_key = bool(case.segments or case.decay)
    scalars = 4 + 32 * ("write" in kernel or per_key) + 32 * per_key
    if "backward" in kernel:
        least += itemsize * (2 * K + V)
        scalars += (4 - itemsize) * (2 * K + V) + 32
    return rows * (least + scalars), rows * least
