"""What the real TPU compiler makes of the kernels, on a machine without a TPU.

    python -m benchmarks.tpu_static [NAME ...] [--topology v5p:2x2x1] [--out FILE.json]

Needs the libtpu wheel that belongs to this jax (0.0.42.* for jax 0.10.2, 0.0.50.* for 0.12.0.1): it holds the compiler
that runs on TPU machines, and compiles for v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1 without one. For every kernel of a
case, from the compiler's final schedule of its main loop (the run without a branch that has most products; what starts
and ends a walk is left out; attention and DeltaFormer have two, see benchmarks/tpu_attention.py):

    bundles   instruction bundles (one a cycle at best) a chunk and head
    floor     bundles that the products alone would take at the chip's peak, in one bfloat16 pass
    share     floor / bundles: the part of the MXU's time that goes into products that the equations need
    mxu       share of the MXU's issue slots in use, passes and padding included
    fills, spills   vector registers reloaded and stored for want of registers, a chunk and head
    vmem      MiB of VMEM the kernel holds
    hbm       KiB read and written a chunk and head
    moved     bundles that moving these would take at the memory's peak
    bytes     hbm over that of reading the inputs and writing the outputs once

Cases of other projects (`splash`, `tokamax KDA`) have no floor here, and bundles of their whole main loop. The figures
hold no DMA waits: they compare versions of a kernel and kernels with floors, and are no times. --out adds the rows to
those that the file has of other cases and chips.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
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
from benchmarks import tpu_attention as attention
from benchmarks.tpu_schedule import Loop, loops, scoped_memory
from memformer.pallas.tpu.common import Cut, cut_call

__all__ = ["CASES", "Case", "compile_case", "make_mesh", "prepare_compiler"]

# FLOPs a cycle of one core, and GHz so that they are the 197, 459, 918 and 2307 TFLOP/s a chip of
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; v5p and tpu7x have two cores. No sheet names a clock: FLOPs a
# cycle are the power of two that agrees best with the schedule of one large product by this tool, thousands a bundle
# 162 on v5e, 161 on v5p (95% of the slots in use), 444 on v6e (77%), 778 on tpu7x (73%). v5 comes to 1.3 times it.
FLOPS_A_CYCLE = {"v5e": 2**17, "v5p": 2**17, "v6e": 2**19, "tpu7x": 2**20}
CLOCK = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 1.1}

# GB/s of memory a core, from the same pages.
BANDWIDTH = {"v5e": 819, "v5p": 2765 / 2, "v6e": 1638, "tpu7x": 7380 / 2}

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op, its gradient included; groups are heads of q and k, in attention-like ops of k and v.

    `steps` are delta_product's writes a token.
    """

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
    write: str | None = None
    steps: int = 0

    @property
    def cached(self) -> bool:
        """Whether the op's state is a cache."""
        return self.op in ("deltaformer", "softmax_attention")

    @property
    def names(self) -> list[str]:
        """Arrays of the call, in the order of `shapes`, segments left out."""
        if self.op == "deltaformer":
            return ["q", "k", "v", "w", "alpha", "beta"]
        return ["q", "k", "v"] + ["beta"] * self.op.startswith("delta_") + ["decay"] * self.decay


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
    "deltaformer": Case("deltaformer", 1, 8192, 16, 16, 128, 128, write="softmax"),
    "deltaformer linear": Case("deltaformer", 1, 8192, 16, 16, 128, 128, write="linear"),
    "deltaformer wide": Case("deltaformer", 1, 4096, 4, 4, 256, 256, write="softmax"),
    "softmax": Case("softmax_attention", 1, 8192, 16, 16, 128, 128),
    "softmax segments": Case("softmax_attention", 1, 8192, 16, 4, 128, 128, segments=True),
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
    options = {} if case.write is None else {"write_kernel": case.write}

    def run(*arrays):
        ids = arrays[len(case.names)] if case.segments else None

        def loss(arguments):
            call = functools.partial(getattr(mf, case.op), segment_ids=ids, implementation="pallas")
            results = call(**arguments, **options)
            # A cache has leaves that are no floats.
            floats = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.float32(0))

        return jax.value_and_grad(loss)(dict(zip(case.names, arrays, strict=False)))

    return run


def shapes(case: Case) -> list[jax.ShapeDtypeStruct]:
    """The arguments of `gradient`."""
    rows = (case.batch, case.length)
    few, many = (*rows, case.groups), (*rows, case.heads)
    queries, values = (many, few) if case.cached else (few, many)
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        "q": ((*queries, case.key), case.dtype),
        "k": ((*few, case.key), case.dtype),
        "w": ((*few, case.key), case.dtype),
        "v": ((*values, case.value), case.dtype),
    }
    if case.op == "delta_product":
        kinds["k"] = ((*rows, case.steps, case.heads, case.key), case.dtype)
        kinds["v"] = ((*rows, case.steps, case.heads, case.value), case.dtype)
        kinds["beta"] = ((*rows, case.steps, case.heads), jnp.float32)
    arrays = [kinds.get(name, (values, jnp.float32)) for name in case.names]
    arrays += [(rows, jnp.int32)] * case.segments
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]


@functools.cache
def make_mesh(topology: str, split: tuple[int, int] = (1, 1)) -> Mesh:
    """Chips of a topology, over batch and over heads."""
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
    mesh = make_mesh(topology, split)
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


def traffic(case: Case, chunk: int, backward: bool) -> tuple[float, float]:
    """Bytes a chunk and head moves, and those of its inputs and outputs, q to dv, alone."""
    K, V, itemsize = case.key, case.value, jnp.dtype(case.dtype).itemsize
    shared = case.groups / case.heads
    delta, carries = case.op == "delta_rule", case.decay or case.segments
    rows = 4 * (delta + (delta or carries) + carries + case.decay + case.segments)
    # A memory that prepares reads the rows twice.
    rows *= 2 if delta else 1
    state = 4 * K * V / chunk
    passes = 2 if backward else 1
    # Backward also reads dO, and writes dq, dk, dv.
    floor = itemsize * (passes * 2 * shared * K + (3 * V if backward else 2 * V))
    return chunk * (floor + passes * rows + state), chunk * floor


def report(name: str, topology: str, dumps: pathlib.Path) -> list[dict[str, Any]]:
    """Compiles one case and reads its kernels' schedules."""
    before = set(dumps.glob("*"))
    if name in OTHERS:
        compiled, names = OTHERS[name](topology)
        return [_row(name, topology, loop, 1) for loop, *_ in loops(dumps, before, names)]
    case = CASES[name]
    text = compile_case(case, topology).as_text()
    found = loops(dumps, before, "memformer")
    if case.cached:
        return [
            _cached_row(name, topology, text, loop)
            for kernel in found
            for loop in kernel
            if loop.depth in attention.PARTS
        ]
    plan = cut(case, topology)
    rows = []
    for loop, *_ in found:
        backward = "backward" in loop.kernel
        floor = floor_flops(case, plan.chunk, backward) * plan.block
        sizes = {"chunk": plan.chunk, "heads": plan.block}
        more = _against(topology, text, loop, plan.block, floor, traffic(case, plan.chunk, backward))
        rows.append(_row(name, topology, loop, plan.block) | sizes | more)
    return rows


def _cached_row(name: str, topology: str, text: str, loop: Loop) -> dict[str, Any]:
    """One stretch of a kernel of DeltaFormer or of attention."""
    case, part, backward = CASES[name], attention.PARTS[loop.depth], "backward" in loop.kernel
    with jax.sharding.use_abstract_mesh(make_mesh(topology).abstract_mesh):
        rows = attention.block_rows(case, backward)
    heads = attention.heads(case, loop.kernel)
    floor = attention.floor_flops(case, rows, part, backward) * heads
    more = _against(topology, text, loop, heads, floor, attention.traffic(case, loop.kernel, rows))
    return _row(name, topology, loop, heads) | {"part": part, "chunk": rows, "heads": heads} | more


def _against(topology: str, text: str, loop: Loop, heads: int, flops: float, moved: tuple[float, float]):
    """A loop beside its floor, VMEM from the compiled program's text, and bytes."""
    chip = topology.split(":")[0]
    floor = flops / FLOPS_A_CYCLE[chip]
    return {
        "floor": round(floor / heads),
        "share": round(floor / loop.bundles, 3),
        "vmem": round(scoped_memory(text, loop.kernel) / 2**20, 1),
        "hbm": round(moved[0] / 2**10, 1),
        "moved": round(moved[0] / BANDWIDTH[chip] * CLOCK[chip]),
        "bytes": round(moved[0] / moved[1], 2),
    }


def _row(name: str, topology: str, loop: Loop, heads: int) -> dict[str, Any]:
    return {
        "case": name,
        "topology": topology,
        "kernel": loop.kernel,
        "bundles": round(loop.bundles / heads),
        "mxu": round(loop.mxu, 3),
        "fills": round(loop.used.get("VLOAD:FILL", 0) / heads),
        "spills": round(loop.used.get("VSTORE:SPILL", 0) / heads),
    }


def splash(topology: str):
    """JAX's own attention kernel: causal, [1, 8192, 16, 128] bfloat16, forward."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((8192, 8192))] * 16)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask)
    return _compile(topology, kernel, [(16, 8192, 128)] * 3), "splash"


def tokamax_kda(topology: str):
    """tokamax' Kimi delta attention (decay per channel): [1, 8192, 32, 128] bfloat16, forward."""
    from tokamax import config
    from tokamax._src.ops.kda import api

    wide, scalar = (32, 1, 8192, 128), (32, 1, 8192)
    call = functools.partial(api.kimi_delta_attention, implementation="mosaic")
    # It would look for the chip on this machine.
    with config.cross_compile(True):
        return _compile(topology, call, [wide, wide, wide, (*wide, jnp.float32), (*scalar, jnp.float32)]), "kda"


def _compile(topology: str, function, arrays):
    """One function of another project; a last entry of a shape that is no number is its dtype."""
    mesh = make_mesh(topology)
    specs = []
    for shape in arrays:
        dtype = jnp.bfloat16 if isinstance(shape[-1], int) else shape[-1]
        sizes = tuple(size for size in shape if isinstance(size, int))
        specs.append(jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec())))
    with jax.set_mesh(mesh):
        return jax.jit(lambda *x: function(*x)).lower(*specs).compile()


# Kernels of other projects, by name: compiled, and which kernels are theirs.
OTHERS = {"splash": splash, "tokamax KDA": tokamax_kda}


def cut(case: Case, topology: str) -> Cut:
    """How the library cuts this case for this chip."""
    q, _, v, *_ = shapes(case)
    with jax.sharding.use_abstract_mesh(make_mesh(topology).abstract_mesh):
        return cut_call(
            case.op, q, v, beta=None, decay=None, index=None, scale=1.0, chunk_size=None,
            precision=lax.Precision.DEFAULT,
        )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"cases: {', '.join([*CASES, *OTHERS])}")
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
                    _write(pathlib.Path(options.out), rows)


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Puts the rows in place of those the file has of the same case and chip."""
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    new = {(row["case"], row["topology"]) for row in rows}
    old = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in old if (row["case"], row["topology"]) not in new] + [about | row for row in rows]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main(sys.argv[1:])
