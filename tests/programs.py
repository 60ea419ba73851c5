"""What a compiled program costs, read from its text: products and collectives, loops counted."""

import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


class Cost(NamedTuple):
    """Per device.

    Attributes:
      flops: of matrix products.
      moved: bytes of the results of each kind of collective.
      looped: kinds of collectives that run inside a loop.
    """

    flops: float
    moved: dict[str, float]
    looped: frozenset[str]


def program_cost(text: str) -> Cost:
    """The cost of a compiled program (`compiled.as_text()`); a loop of unknown length counts once."""
    computations, entry = {}, ""
    for block in re.split(r"\n(?=\S)", text):
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{", block)
        if head:
            computations[head[2]] = block.split("\n")[1:]
            entry = head[2] if head[1] else entry
    return _cost(computations, entry)


def _cost(computations: dict[str, list[str]], name: str) -> Cost:
    flops, moved, looped = 0.0, dict.fromkeys(COLLECTIVES, 0.0), set()
    shapes = {}
    for line in computations[name]:
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if found is None:
            continue
        result, kind, op, rest = found.groups()
        shapes[result] = _dims(kind)
        if op == "dot":
            left = shapes[re.search(r"%([\w.\-]+)", rest)[1]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
            flops += 2 * math.prod(shapes[result]) * math.prod(left[int(i)] for i in contracted.split(",") if i)
        base = op.removesuffix("-start")
        if base in COLLECTIVES:
            moved[base] += _bytes(kind)
        times = 1
        if op == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            times = int(trips[1]) if trips else 1
        called = re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}", line)
        for part in ", ".join(a or b for a, b in called).split(", ") if called else ():
            inner = _cost(computations, part.lstrip("%"))
            flops += times * inner.flops
            moved = {key: moved[key] + times * inner.moved[key] for key in moved}
            inside = {key for key in moved if inner.moved[key]} if op == "while" else set()
            looped |= inner.looped | inside
    return Cost(flops, moved, frozenset(looped))


def _dims(kind: str) -> list[int]:
    found = re.match(r"\w+\[([\d,]*)\]", kind)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _bytes(kind: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    return sum(SIZES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)
