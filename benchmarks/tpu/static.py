"""Schedules of the TPU kernels by the real TPU compiler, without a TPU.

    python -m benchmarks.tpu.static [NAME ...] [--topology v5p:2x2x1] [--out FILE.json]

Needs the libtpu wheel of this jax (0.0.42.* for jax 0.10.2, 0.0.50.* for 0.12.0.1): it contains the compiler of TPU
machines, and compiles for v5e:2x2, v5p:2x2x1, v6e:2x2 and tpu7x:2x2x1 without one. The figures of a kernel come from
the final schedule of its main loop (the branch-free run with the most products; the start and end of a chunk scan are
left out). A program of attention or DeltaFormer takes one block of R rows through two stretches, each a row of the
table: "loop", the loop over earlier tiles, R columns per step (backward: over later tiles of rows), and "own", the
diagonal tile: half of a step's products and, for the write, the triangular solve.

    bundles   instruction bundles (at best one per cycle) per chunk and head
    floor     bundles of the products alone at the chip's peak, in one bfloat16 pass
    share     floor / bundles: the part of the MXU's time spent on products that the equations need
    mxu       share of the MXU's issue slots in use, passes and padding included
    fills, spills   vector registers reloaded and stored for lack of registers, per chunk and head
    vmem      MiB of VMEM that the kernel uses
    hbm       KiB read and written per chunk and head
    moved     bundles that these transfers would take at peak memory bandwidth
    bytes     hbm over the bytes of reading the inputs and writing the outputs once
    token     bundles per token and head (matrix memories), which compares kernels of different chunks

Cases of other projects have no floor: `splash` reports the bundles of its whole main loop, `tokamax KDA`, per chunk and
head, those of its two forward kernels, which run one after the other. The figures include no DMA waits: they compare
versions of a kernel, and kernels with their floors; they are not times.
--out keeps the rows that the file has of other cases and chips.
"""

import argparse
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
from benchmarks import floor
from benchmarks.cases import Case
from benchmarks.tpu.schedule import Loop, loops, scoped_memory
from memformer.core.calls import MatrixCall
from memformer.pallas.decoding import MOST_TOKENS, MatrixStep
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.attention import decoding as attention_decoding
from memformer.pallas.tpu.checks import check_tpu
from memformer.pallas.tpu.matrix_memory import channel_decay, chunk_scan, delta_rule, linear_attention
from memformer.pallas.tpu.matrix_memory import decoding as matrix_decoding
from memformer.pallas.tpu.matrix_memory.config import ScanConfig, plan_call

__all__ = ["CASES", "compile_case", "decodes", "make_mesh", "matrix_rows", "prepare_compiler"]

# FLOPs per cycle of one core, and the clock in GHz that makes them the 197, 459, 918 and 2307 TFLOP/s per chip of
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; v5p and tpu7x have two cores. No data sheet gives a clock: FLOPs
# per cycle are the power of two closest to the schedule of one large product by this tool, in thousands per bundle
# 162 on v5e, 161 on v5p (95% of the slots in use), 444 on v6e (77%), 778 on tpu7x (73%). v5 reaches 1.3 times that.
FLOPS_PER_CYCLE = {"v5e": 2**17, "v5p": 2**17, "v6e": 2**19, "tpu7x": 2**20}
CLOCK = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 1.1}

# GB/s of HBM per core, from the same pages.
BANDWIDTH = {"v5e": 819, "v5p": 2765 / 2, "v6e": 1638, "tpu7x": 7380 / 2}

# Stretches of an attention kernel, by the number of loops around them.
PARTS = {1: "own", 2: "loop"}

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


CASES = {
    "delta": Case("delta_rule", 1, 8192, 16, 16, 128, 128),
    "delta decay": Case("delta_rule", 1, 8192, 16, 16, 128, 128, decay="head"),
    "delta small": Case("delta_rule", 2, 4096, 4, 4, 128, 128, decay="head", segments=2),
    "delta odd": Case("delta_rule", 1, 1000, 3, 3, 64, 96, decay="head"),
    "delta float32": Case("delta_rule", 1, 8192, 16, 16, 128, 128, "float32", decay="head"),
    "delta channel": Case("delta_rule", 1, 8192, 16, 16, 128, 128, decay="channel"),
    "delta documents": Case("delta_rule", 1, 8192, 16, 16, 128, 128, decay="head", segments=8, documents=True),
    "delta channel documents": Case(
        "delta_rule", 1, 8192, 16, 16, 128, 128, decay="channel", segments=8, documents=True
    ),
    "delta wide": Case("delta_rule", 1, 4096, 4, 4, 256, 256, decay="head"),
    "delta grouped": Case("delta_rule", 1, 4096, 16, 4, 128, 128, decay="head"),
    "linear": Case("linear_attention", 1, 8192, 16, 16, 128, 128),
    "linear decay": Case("linear_attention", 1, 8192, 16, 16, 128, 128, decay="head"),
    "linear channel": Case("linear_attention", 1, 8192, 16, 16, 128, 128, decay="channel"),
    "linear odd": Case("linear_attention", 1, 1000, 3, 3, 64, 96, decay="head", segments=2),
    "linear float32": Case("linear_attention", 1, 8192, 16, 16, 128, 128, "float32", decay="head"),
    "delta decode": Case("delta_rule", 64, 1, 32, 16, 128, 128, decay="head"),
    "delta decode 8": Case("delta_rule", 64, 8, 32, 16, 128, 128, decay="head"),
    "delta channel decode": Case("delta_rule", 64, 1, 32, 32, 128, 128, decay="channel"),
    "linear decode": Case("linear_attention", 64, 1, 32, 32, 128, 128, decay="head"),
    "delta channel decode 8": Case("delta_rule", 64, 8, 32, 32, 128, 128, decay="channel"),
    "linear decode 8": Case("linear_attention", 64, 8, 32, 32, 128, 128, decay="head"),
    "softmax decode": Case("softmax_attention", 64, 1, 32, 8, slots=4096),
    "softmax decode 8": Case("softmax_attention", 64, 8, 32, 8, slots=4096),
    "softmax decay decode": Case("softmax_attention", 64, 1, 8, 8, decay="head", slots=4096),
    "deltaformer decode": Case("deltaformer", 64, 1, 16, 8, slots=4096),
    "deltaformer decode 8": Case("deltaformer", 64, 8, 16, 8, write="linear", decay="head", slots=4096),
    "deltaformer": Case("deltaformer", 1, 8192, 16, 16, 128, 128, write="softmax"),
    "deltaformer linear": Case("deltaformer", 1, 8192, 16, 16, 128, 128, write="linear"),
    "deltaformer wide": Case("deltaformer", 1, 4096, 4, 4, 256, 256, write="softmax"),
    "softmax": Case("softmax_attention", 1, 8192, 16, 16, 128, 128),
    "deltaformer decay": Case("deltaformer", 1, 8192, 16, 16, 128, 128, write="softmax", decay="head"),
    "softmax decay": Case("softmax_attention", 1, 8192, 16, 16, 128, 128, decay="head"),
    "softmax segments": Case("softmax_attention", 1, 8192, 16, 4, 128, 128, segments=2),
}


def prepare_compiler(dumps: pathlib.Path | None = None) -> None:
    """Sets the environment that libtpu reads when it loads: no search for a TPU, schedules dumped to `dumps`."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if dumps is not None:
        flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true --xla_jf_debug_level=2"
        # The final schedule only: the stages of all programs take gigabytes.
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_llo_pass_label_regex=final"


def gradient(case: Case):
    """A function of the arrays of `specs`: value and gradients of every argument, through output and state.

    For a few tokens, whose kernels have no gradient: output and state, from a state to start from, the last of the
    arrays.
    """
    names = list(case.shapes)

    def run(*arrays):
        ids = arrays[len(names)] if case.segments else None

        def loss(arguments):
            call = functools.partial(getattr(mf, case.op), segment_ids=ids, implementation="pallas")
            results = call(**arguments, **case.options)
            # A cache has integer leaves too.
            floats = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.float32(0))

        return jax.value_and_grad(loss)(dict(zip(names, arrays, strict=False)))

    def decode(*arrays):
        ids = arrays[len(names)] if case.segments else None
        call = functools.partial(getattr(mf, case.op), segment_ids=ids, implementation="pallas")
        return call(**dict(zip(names, arrays, strict=False)), initial_state=arrays[-1])

    return decode if decodes(case) else run


def decodes(case: Case) -> bool:
    """Whether a case is a few tokens of a matrix memory, or of attention over a cache of fixed capacity."""
    return case.length <= MOST_TOKENS and (case.slots > 0 or not case.is_attention)


def specs(case: Case) -> list[Any]:
    """Shapes and dtypes of the arguments of `gradient`, the last of them a cache where there is one."""
    found = [
        jax.ShapeDtypeStruct(shape, case.dtype if name in "qkvw" else jnp.float32)
        for name, shape in case.shapes.items()
    ]
    found += [jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)] * bool(case.segments)
    return found + [_state(case)] * decodes(case)


def _state(case: Case) -> Any:
    """The shape of a matrix memory's state, or of a cache."""
    if not case.slots:
        return jax.ShapeDtypeStruct((case.batch, case.heads, case.key, case.value), jnp.float32)
    decays = {"decay_heads": case.shapes["decay"][2]} if case.decay else {}
    sizes = {"batch": case.batch, "capacity": case.slots, "groups": case.groups}
    widths = {"key_width": case.key, "value_width": case.value}
    return jax.eval_shape(lambda: mf.init_cache(case.op, **sizes, **widths, **decays, dtype=case.dtype))


@functools.cache
def make_mesh(topology: str, split: tuple[int, int] = (1, 1)) -> Mesh:
    """Mesh of a topology's chips over batch ("data") and heads ("tensor")."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(
        np.array(devices[: split[0] * split[1]]).reshape(split), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )


def compile_case(case: Case, topology: str, split: tuple[int, int] = (1, 1)):
    """Compiles forward and backward for a topology.

    Args:
      case: the call.
      topology: such as "v5e:2x2".
      split: number of devices over batch and over heads.
    """
    mesh = make_mesh(topology, split)

    def place(x, heads=2):
        spec = ("data", *(None,) * (heads - 1), "tensor") if len(x.shape) > 2 else ("data",) * bool(x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    *arguments, last = specs(case)
    heads = 1 if decodes(case) and not case.slots else 2
    arguments = [*map(place, arguments), jax.tree.map(functools.partial(place, heads=heads), last)]
    # The library reads the chip from the mesh.
    with jax.set_mesh(mesh):
        donated = len(arguments) - 1 if decodes(case) else ()
        return jax.jit(gradient(case), donate_argnums=donated).lower(*arguments).compile()


def report(name: str, topology: str, dumps: pathlib.Path) -> list[dict[str, Any]]:
    """Compiles one case and reads the schedules of its kernels."""
    before = set(dumps.glob("*"))
    if name in OTHERS:
        _, names = OTHERS[name](topology)
        theirs = [loop for loop, *_ in loops(dumps, before, names)]
        if name not in OTHERS_SIZES:
            return [_row(name, topology, loop, 1) for loop in theirs]
        chunk, heads = OTHERS_SIZES[name]
        return [_row(name, topology, loop, heads) | _per_token(loop, chunk, heads) for loop in theirs]
    case = CASES[name]
    if not case.is_attention and not decodes(case):
        return matrix_rows(name, case, topology, dumps)
    text = compile_case(case, topology).as_text()
    found = loops(dumps, before, "memformer")
    if decodes(case):
        return [_decode_row(name, topology, text, max(kernel, key=lambda loop: loop.depth)) for kernel in found]
    return [_attention_row(name, topology, text, loop) for kernel in found for loop in kernel if loop.depth in PARTS]


def _decode_row(name: str, topology: str, text: str, loop: Loop) -> dict[str, Any]:
    """Row of a kernel for a few tokens.

    The inner loop of a matrix memory takes several heads, that of attention a block of slots with all of their key
    heads: its row is that of one key head and 128 slots.
    """
    case, chip = CASES[name], topology.split(":")[0]
    moved = floor.decode_traffic(case)
    if not case.slots:
        delta = case.op != "linear_attention"
        step = MatrixStep(case.op, case.length, 1, delta, False, case.decay, case.segments > 0, 1.0)
        block = matrix_decoding.block_heads(step, case.batch * case.heads, case.key, case.value)
        heads = matrix_decoding.loop_heads(step, block)
    else:
        block = attention_decoding.block_slots(case.slots, case.groups)
        heads, moved = block * case.groups // 128, floor.slot_traffic(case, 128)
    return _row(name, topology, loop, heads) | {
        "vmem": round(scoped_memory(text, loop.kernel) / 2**20, 1),
        "hbm": round(moved[0] / 2**10, 1),
        "moved": round(moved[0] / BANDWIDTH[chip] * CLOCK[chip]),
        "bytes": round(moved[0] / moved[1], 2),
    }


def matrix_rows(name: str, case: Case, topology: str, dumps: pathlib.Path) -> list[dict[str, Any]]:
    """Compiles the kernels of one case of a matrix memory, forward and backward, and reads their schedules.

    The kernels alone: the rest of the call, which the compiler would dump too, takes several times as long.
    """
    config, rows = scan_config(case, topology), []
    for backward in (False, True):
        before = set(dumps.glob("*"))
        text = compile_kernel(case, topology, config, backward).as_text()
        for loop, *_ in loops(dumps, before, "memformer"):
            chunk, heads = config.chunk, config.program_heads
            flops = floor.chunk_flops(case, chunk, backward) * heads
            more = _compare(topology, text, loop, heads, flops, floor.chunk_traffic(case, chunk, backward))
            rows.append(_row(name, topology, loop, heads) | _per_token(loop, chunk, heads) | more)
    return rows


def compile_kernel(case: Case, topology: str, config: ScanConfig, backward: bool):
    """Compiles one kernel of a matrix memory, which saves the states if forward."""
    wide, scalar = case.dtype if case.dtype == "bfloat16" else "float32", "float32"
    batch, heads, length = config.batch, config.heads, config.chunks * config.chunk
    Array = tuple[tuple[int, ...], str]
    value: Array = ((batch, heads, length, config.value), wide)
    step = (
        channel_decay.STEPS[config.beta] if config.channels else (delta_rule if config.beta else linear_attention).STEP
    )
    documents = (config.documents,) * bool(config.documents)
    state: Array = ((batch, heads, *documents, *step.state_shape(config)), scalar)
    states: Array = ((batch, heads, config.chunks, *step.state_shape(config)), jnp.dtype(config.states_dtype).name)
    arrays: list[Array] = [((batch, config.groups, length, config.key), wide)] * config.keys + [value]
    arrays += [((batch, heads, length, config.key), scalar)] * config.channels
    arrays += [states, value, state] if backward else [state]
    arrays += [((batch, heads, len(config.scalars), config.chunks, config.chunk), scalar)] * bool(config.scalars)
    arrays += [((batch, config.chunks), "int32")] * bool(config.documents)
    static = (step, config) if backward else (step, config, True)
    mesh = make_mesh(topology)
    place = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(chunk_scan.backward if backward else chunk_scan.forward, *static))
        return run.lower(*(jax.ShapeDtypeStruct(*array, sharding=place) for array in arrays)).compile()


def _attention_row(name: str, topology: str, text: str, loop: Loop) -> dict[str, Any]:
    """Row of one stretch of a kernel of DeltaFormer or softmax attention."""
    case, part, backward = CASES[name], PARTS[loop.depth], "backward" in loop.kernel
    with jax.sharding.use_abstract_mesh(make_mesh(topology).abstract_mesh):
        rows = _tile_rows(case, backward)
    # The write kernel takes two heads per program where their number is even.
    heads = 2 if "write_forward" in loop.kernel and case.groups % 2 == 0 else 1
    flops = floor.tile_flops(case, rows, part, backward) * heads
    more = _compare(topology, text, loop, heads, flops, floor.tile_traffic(case, loop.kernel, rows))
    return _row(name, topology, loop, heads) | {"part": part, "chunk": rows, "heads": heads} | more


def _tile_rows(case: Case, backward: bool) -> int:
    """R, the rows per tile that the library chooses for the chip of the current mesh."""
    # A shape stands in for an array: only its dtype is read.
    array: Any = jax.ShapeDtypeStruct((), case.dtype)
    kind = check_tpu(case.op, array)
    size, _, _, back, _ = tuning.choose_tiles(kind, case.length, case.key, case.value, case.itemsize)
    return back if backward else size


def _compare(topology: str, text: str, loop: Loop, heads: int, flops: float, moved: tuple[float, float]):
    """Compares a loop with its floors; VMEM comes from the text of the compiled program."""
    chip = topology.split(":")[0]
    least = flops / FLOPS_PER_CYCLE[chip]
    return {
        "floor": round(least / heads),
        "share": round(least / loop.bundles, 3),
        "vmem": round(scoped_memory(text, loop.kernel) / 2**20, 1),
        "hbm": round(moved[0] / 2**10, 1),
        "moved": round(moved[0] / BANDWIDTH[chip] * CLOCK[chip]),
        "bytes": round(moved[0] / moved[1], 2),
    }


def _per_token(loop: Loop, chunk: int, heads: int) -> dict[str, Any]:
    """Sizes of one run of a program's loop, and its bundles per token and head."""
    return {"chunk": chunk, "heads": heads, "token": round(loop.bundles / (chunk * heads), 2)}


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
    """JAX's splash attention: causal, [1, 8192, 16, 128] bfloat16, forward."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((8192, 8192))] * 16)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask)
    return _compile(topology, kernel, [(16, 8192, 128)] * 3), "splash"


def tokamax_kda(topology: str):
    """Kimi delta attention of tokamax (decay per channel): [1, 8192, 32, 128] bfloat16, forward."""
    from tokamax import config
    from tokamax._src.ops.kda import api

    wide, scalar = (32, 1, 8192, 128), (32, 1, 8192)
    call = functools.partial(api.kimi_delta_attention, implementation="mosaic")
    # By default it looks for a chip on this machine.
    with config.cross_compile(True):
        return _compile(topology, call, [wide, wide, wide, (*wide, jnp.float32), (*scalar, jnp.float32)]), "kda"


def _compile(topology: str, function, arrays):
    """Compiles a function of another project; a trailing entry of a shape that is not a number is its dtype."""
    mesh = make_mesh(topology)
    arguments = []
    for shape in arrays:
        dtype = jnp.bfloat16 if isinstance(shape[-1], int) else shape[-1]
        sizes = tuple(size for size in shape if isinstance(size, int))
        arguments.append(jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec())))
    with jax.set_mesh(mesh):
        return jax.jit(lambda *x: function(*x)).lower(*arguments).compile()


# Kernels of other projects: functions that compile them, by name.
OTHERS = {"splash": splash, "tokamax KDA": tokamax_kda}

# Tokens and heads per program of theirs, where both kernels of a pass have the same (`estimate_mini_batch` of tokamax's
# kda/common.py: as many heads as VMEM holds, at most 16).
OTHERS_SIZES = {"tokamax KDA": (64, 16)}


def scan_config(case: Case, topology: str) -> ScanConfig:
    """The configuration that the library chooses for this case on a chip."""
    # Shapes stand in for arrays: planning reads nothing else.
    arrays: dict[str, Any] = dict(zip(case.shapes, specs(case), strict=False))
    state: Any = jax.ShapeDtypeStruct((case.batch, case.heads, case.key, case.value), jnp.float32)
    call = MatrixCall(
        op=case.op,
        q=arrays["q"],
        k=arrays["k"],
        v=arrays["v"],
        w=None,
        alpha=None,
        beta=arrays.get("beta"),
        decay=arrays.get("decay"),
        segments=None,
        state=arrays.get("initial_state", state),
        writes=1,
        scale=1.0,
        precision=lax.Precision.DEFAULT,
        chunk_size=None,
    )
    with jax.sharding.use_abstract_mesh(make_mesh(topology).abstract_mesh):
        return plan_call(call)


def main(arguments: list[str]) -> None:
    """Prints the table, and writes it to --out."""
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
    """Replaces the file's rows of the same cases and chips."""
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
