"""Costs of a compiled program, read from its text: FLOPs, memory traffic and collectives of one device, loops counted.

XLA's own cost analysis counts the body of a loop once. Here every computation is weighted with the number of times it
runs, from the trip counts of the loops that hold it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

__all__ = ["Collective", "Program", "read_program"]

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Ops without traffic of their own: names for values, or loops whose bodies are counted.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "async-start", "async-update",
)  # fmt: skip
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind between the same devices.

    Attributes:
      kind: HLO name, such as "all-gather".
      axes: the mesh axes whose devices take part.
      bytes: size of the whole arrays per step: gathered, before they are scattered, or summed.
      calls: number of calls per step.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Costs of one run of a program on one device.

    Attributes:
      flops: of matrix products and convolutions outside kernels.
      bytes: read from and written to device memory; values that stay in a fusion are not counted.
      kernels: calls of Pallas kernels, whose FLOPs are not in `flops`.
      collectives: by kind and mesh axes, the largest first.
    """

    flops: float
    bytes: float
    kernels: int
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str

    @property
    def number(self) -> int:
        """Number of a parameter."""
        return int(self.text.split("parameter(")[1].split(")")[0])


_Computation = dict[str, _Instruction]


def read_program(text: str, mesh: Mesh) -> Program:
    """Reads the costs of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      mesh: the mesh over which it was compiled.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> x = jnp.zeros((4, 8))
      >>> loop = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c @ jnp.ones((8, 8)), None), x, None, length=10)[0])
      >>> read_program(loop.lower(x).compile().as_text(), mesh).flops == 10 * 2 * 4 * 8 * 8
      True
    """
    computations, entry = _parse(text)
    runs = _count_runs(computations, entry)
    flops = traffic = 0.0
    kernels = 0
    found: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    moved: dict[str, tuple[int, str, tuple[str, ...], float]] = {}
    for name, (count, caller) in runs.items():
        body = computations[name]
        for step in body.values():
            flops += count * _flops(step, body)
            kernels += count * ('custom_call_target="tpu_custom_call"' in step.text or "mosaic_gpu" in step.text)
            if caller == name and step.opcode not in FREE and not step.opcode.endswith("-done"):
                traffic += count * _traffic(step, body, computations)
            kind = step.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # how TPUs write the sum of which each device keeps a part
                kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
                axes, size = _axes(step.attributes, mesh)
                item = (count, kind, axes, count * _payload(step, body, size))
                # an asynchronous collective is written once for each fusion that it overlaps, those of inner loops
                # included; outside fusions the collectives of shard_map have one channel in common
                channel = re.search(r"channel_id=(\d+)", step.attributes) if caller != name else None
                key = channel[1] if channel else f"{name} {step.name}"
                moved[key] = min(moved.get(key, item), item)
    for count, kind, axes, total in moved.values():
        found[kind, axes][0] += total
        found[kind, axes][1] += count
    listed = [Collective(kind, axes, total, int(calls)) for (kind, axes), (total, calls) in found.items() if axes]
    return Program(flops, traffic, kernels, tuple(sorted(listed, key=lambda c: -c.bytes)))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The instructions of each computation by name, and the name of the entry computation."""
    computations: dict[str, _Computation] = {}
    entry, body = "", {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            body = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if found:
            step = _instruction(found[1], line[found.end() :], line)
            body[step.name] = step
    return computations, entry


def _instruction(name: str, rest: str, line: str) -> _Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:stop]))
    return _Instruction(name, kind, rest[:start], operands, rest[stop + 1 :], line)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text) - 1


def _count_runs(computations: Mapping[str, _Computation], entry: str) -> dict[str, tuple[int, str]]:
    """Number of times that each computation runs, and the computation outside fusions that holds it."""
    runs: dict[str, tuple[int, str]] = {}

    def visit(name: str, count: int, caller: str) -> None:
        before = runs.get(name, (0, caller))[0]
        runs[name] = (before + count, caller)
        for step in computations[name].values():
            for callee, times, fused in _callees(step, computations):
                visit(callee, count * times, caller if fused else callee)

    visit(entry, 1, entry)
    return runs


def _callees(step: _Instruction, computations: Mapping[str, _Computation]) -> Iterator[tuple[str, int, bool]]:
    """Computations that an instruction runs, how often, and whether they are parts of it."""
    if step.opcode == "while":
        body, condition = re.search(r"body=%?([\w.\-]+)", step.text), re.search(r"condition=%?([\w.\-]+)", step.text)
        if body and condition:
            yield body[1], _trips(step, computations[condition[1]]), False
    elif step.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", step.text)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", step.text)
        # one of them runs: the largest bounds the others
        if names:
            yield max(names, key=lambda name: len(computations[name])), 1, False
    elif step.opcode in ("fusion", "call", "async-start", "custom-call"):
        for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", step.attributes):
            if name in computations:
                yield name, 1, step.opcode in ("fusion", "async-start")


def _trips(step: _Instruction, condition: _Computation) -> int:
    """Trip count of a loop: as the compiler noted it, or the constant of its condition; 1 where it depends on data."""
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', step.text)
    if noted:
        return int(noted[1])
    constants = [s for s in condition.values() if s.opcode == "constant" and s.type.startswith("s32[]")]
    found = [re.search(r"constant\((\d+)\)", constant.text) for constant in constants]
    return max((int(match[1]) for match in found if match), default=1)


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element types and shapes of the arrays of a type."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    return [(name, tuple(int(n) for n in sizes.split(",") if n)) for name, sizes in found]


def _bytes(kind: str) -> float:
    return sum(math.prod(shape) * _bits(name) / 8 for name, shape in _shapes(kind))


def _bits(name: str) -> int:
    digits = re.search(r"\d+", name)
    return BITS.get(name, int(digits[0]) if digits else 32)


def _flops(step: _Instruction, body: _Computation) -> float:
    if step.opcode not in ("dot", "convolution") or any(name not in body for name in step.operands):
        return 0.0
    output = math.prod(_shapes(step.type)[0][1])
    left, right = (_shapes(body[name].type)[0][1] for name in step.operands[:2])
    if step.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", step.attributes)
        return 2.0 * output * math.prod(left[int(n)] for n in contracted[1].split(",") if n) if contracted else 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", step.attributes)
    if labels is None:
        return 0.0
    shape = _shapes(step.type)[0][1]
    products = float(right[labels[2].index("i")])
    for label, size in zip(labels[3], shape, strict=True):
        spatial = label.isdigit()
        products *= _pairs(step, labels, left, right, size, label) if spatial else size
    return 2.0 * products


def _pairs(
    step: _Instruction, labels: re.Match[str], left: Sequence[int], right: Sequence[int], size: int, label: str
) -> int:
    """Pairs of an output and a window position of a convolution that meet an element, along one dimension."""
    found = re.search(r"window=\{([^}]*)\}", step.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1])) if found else {}
    axis = int(label)

    def option(name: str, default: str) -> list[int]:
        return [int(n) for n in (window[name].split("x")[axis] if name in window else default).split("_")]

    taps, length = right[labels[2].index(label)], left[labels[1].index(label)]
    (stride,), pad = option("stride", "1"), option("pad", "0_0")[0]
    (dilation,), (spread,) = option("rhs_dilate", "1"), option("lhs_dilate", "1")
    at = np.arange(size)[:, None] * stride + np.arange(taps) * dilation - pad
    return int(np.sum((at >= 0) & (at < length * spread) & (at % spread == 0)))


def _traffic(step: _Instruction, body: _Computation, computations: Mapping[str, _Computation]) -> float:
    """Bytes that an instruction reads and writes in device memory."""
    operands = [body[name].type for name in step.operands if name in body]
    if step.opcode == "copy-start":
        # its result names the copy, and what it copies
        return sum(_device_bytes(array + layout) for array, layout in _arrays(step.type)[:2])
    if step.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _device_bytes(step.type)
    if step.opcode == "dynamic-update-slice":
        return 2 * _device_bytes(operands[1])
    if step.opcode != "fusion":
        return _device_bytes(step.type) + sum(map(_device_bytes, operands))
    called = re.search(r"calls=%?([\w.\-]+)", step.attributes)
    inside = computations.get(called[1], {}) if called else {}
    root = next((part for part in inside.values() if part.text.lstrip().startswith("ROOT")), None)
    if root is None:
        return _device_bytes(step.type) + sum(map(_device_bytes, operands))
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    users: dict[str, list[_Instruction]] = collections.defaultdict(list)
    for part in inside.values():
        for name in part.operands:
            users[name].append(part)
    parameters = {part.number: part.name for part in inside.values() if part.opcode == "parameter"}
    read = (_read(kind, parameters.get(number, ""), users, inside) for number, kind in enumerate(operands))
    # whether a result lies on the chip is said outside the fusion only
    kinds = [array + layout for array, layout in _arrays(step.type)]
    return sum(read) + sum(_written(*item, inside) for item in zip(results, kinds, strict=False))


def _read(
    kind: str, name: str, users: Mapping[str, Sequence[_Instruction]], inside: Mapping[str, _Instruction]
) -> float:
    """Bytes that a fusion reads of an operand."""
    total, whole = 0.0, _device_bytes(kind)
    for use in users.get(name, ()):
        if use.opcode in ("dynamic-slice", "slice", "gather"):
            total += _bytes(use.type)
        elif not (_passes(use) or (use.opcode == "dynamic-update-slice" and use.operands[0] == name)):
            return whole
    return min(total, whole)


def _written(result: _Instruction, kind: str, inside: Mapping[str, _Instruction]) -> float:
    """Bytes that a fusion writes of a result."""
    if "S(1)" in kind:
        return 0.0
    while result.opcode in ("bitcast", "copy") and result.operands[0] in inside:
        result = inside[result.operands[0]]
    if result.opcode == "parameter" or _passes(result):
        return 0.0
    if result.opcode == "dynamic-update-slice":
        # updated in place: only the new part
        return _bytes(inside[result.operands[1]].type)
    return _bytes(kind)


def _passes(step: _Instruction) -> bool:
    """Whether an instruction of a fusion hands on the buffers of a collective in flight, or of the fusion's results."""
    return step.opcode in (*COLLECTIVES, "tuple") or "AsyncCollective" in step.attributes


def _device_bytes(kind: str) -> float:
    """Bytes of the arrays of a type that lie in device memory; S(1) is on the chip."""
    return sum(_bytes(array) for array, layout in _arrays(kind) if "S(1)" not in layout)


def _arrays(kind: str) -> list[tuple[str, str]]:
    """The arrays of a type, each with its layout."""
    return re.findall(r"(\w+\[[\d,]*\])(\{[^}]*\})?", kind)


def _payload(step: _Instruction, body: _Computation, group: int) -> float:
    """Bytes of the whole arrays of a collective."""
    inputs = sum(_bytes(body[name].type) for name in step.operands if name in body)
    return inputs * group if step.opcode.startswith("all-gather") else inputs


def _axes(attributes: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group of a collective differ, and the size of a group."""
    groups = _groups(attributes, mesh.size)
    first = max(groups, key=len, default=[])
    if len(first) < 2:
        return (), 1
    places = np.stack(
        np.unravel_index(np.asarray(groups if len({len(g) for g in groups}) == 1 else [first]), mesh.devices.shape)
    )
    varies = np.any(places != places[:, :, :1], axis=(1, 2))
    return tuple(name for name, differs in zip(mesh.axis_names, varies, strict=True) if differs), len(first)


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective, as numbers of devices in the order of the mesh."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        found = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        return [pair for pair in found if pair[0] != pair[1]]
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        return _tiles(tiled[2], tiled[3]).reshape(_numbers(tiled[1])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _tiles(named[2], named[3]) if named[2] else np.arange(devices)
        grid, chosen = order.reshape(tuple(sizes.values())), re.findall(r"'(\w+)'", named[4])
        others = [i for i, name in enumerate(sizes) if name not in chosen]
        inside = [i for i, name in enumerate(sizes) if name in chosen]
        count = math.prod(grid.shape[i] for i in inside)
        return grid.transpose([*others, *inside]).reshape(-1, count).tolist()
    return [list(range(devices))]


def _tiles(sizes: str, order: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
