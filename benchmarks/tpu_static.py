"""What the real TPU compiler makes of the kernels, on a machine without a TPU.

    python -m benchmarks.tpu_static [NAME ...] [--topology v5p:2x2x1] [--out FILE.json]

Needs the libtpu wheel that belongs to this jax (0.0.42.* for jax 0.10.2): it holds the compiler that runs
on TPU machines, and compiles for v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1 without one. For every kernel of a
case, from the compiler's final schedule:

    bundles   instruction bundles (one a cycle at best) a chunk and head
    floor     bundles that the products alone would take at the chip's peak, in one bfloat16 pass
    share     floor / bundles: the part of the MXU's time that goes into products that the equations need
    mxu       share of the MXU's issue slots in use, passes and padding included
    fills, spills   vector registers reloaded and stored for want of registers, a chunk and head
    vmem      MiB of VMEM the kernel holds
    bytes     HBM traffic over that of reading the inputs and writing the outputs once

The figures hold no DMA waits: they compare versions of a kernel and kernels with floors, and are no times.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import memformer as mf
from memformer.pallas.tpu.common import Cut, cut_call

__all__ = ["CASES", "Case", "compile_case", "prepare_compiler"]

# Products of one core: multiply-adds a cycle, times two.
FLOPS_A_CYCLE = {"v5e": 2**17, "v5p": 2**17, "v6e": 2**19, "tpu7x": 2**19}

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: delta_rule or linear_attention, its gradient included."""

    op: str
    batch: int
    length: int
    heads: int
    groups: int
    key: int
    value: int
    dtype: Any = jnp.bfloat16
    decay: bool = False
    segments: bool = False


CASES = {
    "delta": Case("delta_rule", 1, 8192, 16, 16, 128, 128),
    "delta decay": Case("delta_rule", 1, 8192, 16, 16, 128, 128, decay=True),
    "delta small": Case("delta_rule", 2, 4096, 4, 4, 128, 128, decay=True, segments=True),
    "delta odd": Case("delta_rule", 1, 1000, 3, 3, 64, 96, decay=True),
    "delta float32": Case("delta_rule", 1, 8192, 16, 16, 128, 128, jnp.float32, decay=True),
    "delta wide": Case("delta_rule", 1, 4096, 4, 4, 256, 256, decay=True),
    "delta grouped": Case("delta_rule", 1, 4096, 16, 4, 128, 128, decay=True),
    "linear": Case("linear_attention", 1, 8192, 16, 16, 128, 128),
    "linear decay": Case("linear_attention", 1, 8192, 16, 16, 128, 128, decay=True),
    "linear odd": Case("linear_attention", 1, 1000, 3, 3, 64, 96, decay=True, segments=True),
    "linear float32": Case("linear_attention", 1, 8192, 16, 16, 128, 128, jnp.float32, decay=True),
}


def prepare_compiler(dumps: pathlib.Path | None = None) -> None:
    """Sets what libtpu reads when it is first loaded: no TPU is looked for, schedules go to `dumps`."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if dumps is not None:
        flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true --xla_jf_debug_level=2"
        # The final schedule only: all stages of all programs are gigabytes.
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_llo_pass_label_regex=final"


def gradient(case: Case):
    """Value and gradients of every argument, through output and state."""
    names = ["q", "k", "v"] + ["beta"] * (case.op == "delta_rule") + ["decay"] * case.decay

    def run(*arrays):
        ids = arrays[len(names)] if case.segments else None

        def loss(arguments):
            output, state = getattr(mf, case.op)(**arguments, segment_ids=ids, implementation="pallas")
            return jnp.sum(output.astype(jnp.float32)) + jnp.sum(state)

        return jax.value_and_grad(loss)(dict(zip(names, arrays, strict=False)))

    return run


def shapes(case: Case) -> list[jax.ShapeDtypeStruct]:
    """The arguments of `gradient`."""
    keys = (case.batch, case.length, case.groups, case.key)
    values = (case.batch, case.length, case.heads, case.value)
    arrays: list[tuple[tuple[int, ...], Any]] = [(keys, case.dtype), (keys, case.dtype), (values, case.dtype)]
    arrays += [(values[:3], jnp.float32)] * ((case.op == "delta_rule") + case.decay)
    arrays += [(values[:2], jnp.int32)] * case.segments
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]


@functools.cache
def _mesh(topology: str, split: tuple[int, int] = (1, 1)) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(
        np.array(devices[: split[0] * split[1]]).reshape(split), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )


def compile_case(case: Case, topology: str, split: tuple[int, int] = (1, 1)):
    """Forward and backward, compiled for chips of a topology such as "v5e:2x2".

    Args:
      case: the call.
      topology: name of the chips.
      split: devices over batch and over heads.
    """
    mesh = _mesh(topology, split)
    arguments = []
    for x in shapes(case):
        spec = PartitionSpec("data", None, "tensor") if len(x.shape) > 2 else PartitionSpec("data")
        arguments.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)))
    # The mesh tells the library which chip it traces for.
    with jax.set_mesh(mesh):
        return jax.jit(gradient(case)).lower(*arguments).compile()


def floor_flops(case: Case, chunk: int, backward: bool) -> int:
    """FLOPs of the products of one chunk and head, each once, triangles as if full."""
    C, K, V = chunk, case.key, case.value
    keys, values, states = 2 * C * C * K, 2 * C * C * V, 2 * C * K * V
    carries = case.decay or case.segments
    if case.op == "linear_attention":
        if backward:
            return 3 * keys + 2 * values + (4 + carries) * states
        return keys + values + 2 * states
    inverse = 2 * C**3 // 3
    if backward:
        return inverse + 6 * keys + 5 * values + (7 + carries) * states
    return inverse + 2 * keys + 2 * values + 3 * states


def traffic(case: Case, chunk: int, backward: bool) -> float:
    """Bytes of a kernel over those of its inputs and outputs, q to dv, alone."""
    K, V, itemsize = case.key, case.value, jnp.dtype(case.dtype).itemsize
    shared = case.groups / case.heads
    rows = 4 * ((case.op == "delta_rule") + 2 * (case.decay or case.segments) + case.decay + case.segments)
    state = 4 * K * V / chunk
    passes = 2 if backward else 1
    # Backward also reads dO, and writes dq, dk, dv.
    floor = itemsize * (passes * 2 * shared * K + (3 * V if backward else 2 * V))
    return (floor + passes * rows + state) / floor


def report(name: str, topology: str, dumps: pathlib.Path) -> list[dict[str, Any]]:
    """Compiles one case and reads its kernels' schedules."""
    case = CASES[name]
    plan = cut(case, topology)
    chunk, heads = plan.chunk, plan.block
    before = set(dumps.glob("*"))
    text = compile_case(case, topology).as_text()
    rows = []
    for path in sorted(set(dumps.glob("*memformer*final_hlo-static-per-bundle-utilization.txt")) - before):
        lines = path.read_text().splitlines()
        units = [unit.strip() for unit in lines[1].split(",")]
        slots = dict(zip(units, map(int, lines[2].split()), strict=True))
        used = np.array([list(map(int, line.split())) for line in lines[4:] if line.strip()])
        total = dict(zip(units, used.sum(0).tolist(), strict=True))
        kernel = re.sub(r"^\d+-|\.\d+-\d+-final.*", "", path.name)
        backward = "backward" in kernel
        call = next(line for line in text.splitlines() if f"%{kernel}" in line and "custom-call(" in line)
        matrix = [unit for unit in ("MXU", "MATMUL", "MATPUSH") if unit in units]
        floor = floor_flops(case, chunk, backward) / FLOPS_A_CYCLE[topology.split(":")[0]]
        memory = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', call)
        rows.append(
            {
                "case": name,
                "topology": topology,
                "kernel": kernel,
                "chunk": chunk,
                "heads": heads,
                "bundles": round(len(used) / heads),
                "floor": round(floor),
                "share": round(floor * heads / len(used), 3),
                "mxu": round(max(total[unit] / slots[unit] for unit in matrix) / len(used), 3),
                "fills": round(total.get("VLOAD:FILL", 0) / heads),
                "spills": round(total.get("VSTORE:SPILL", 0) / heads),
                "vmem": round(int(memory.group(1)) / 2**20, 1) if memory else None,
                "bytes": round(traffic(case, chunk, backward), 2),
            }
        )
    return rows


def cut(case: Case, topology: str) -> Cut:
    """How the library cuts this case for this chip."""
    q, _, v, *_ = shapes(case)
    with jax.sharding.use_abstract_mesh(_mesh(topology).abstract_mesh):
        return cut_call(
            case.op, q, v, beta=None, decay=None, index=None, scale=1.0, chunk_size=None,
            precision=lax.Precision.DEFAULT,
        )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--topology", action="append", help=f"default: {', '.join(TOPOLOGIES)}")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="tpu-static-") as folder:
        prepare_compiler(pathlib.Path(folder))
        for topology in options.topology or TOPOLOGIES:
            for name in options.names or CASES:
                for row in report(name, topology, pathlib.Path(folder)):
                    rows.append(row)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                for path in pathlib.Path(folder).glob("*"):
                    path.unlink()
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
