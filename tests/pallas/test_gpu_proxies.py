"""Stores of GPU kernels are fenced before wgmma and TMA read them: the programs of all kernels are read.

Tensor cores and copies read shared memory by another way (proxy) than loads and stores do, and see a store only after
a fence, `commit_smem`. Pallas' interpreter checks this for copies; it reads operands of wgmma without a clock.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import memformer as mf
from tests.pallas.test_gpu import H200

STORES = ("swap", "store", "addupdate")


def subprograms(eqn):
    """The jaxprs of an equation."""
    for value in eqn.params.values():
        for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def kernels(jaxpr):
    """The bodies of all Mosaic GPU kernels of a program, by their names."""
    for eqn in jaxpr.eqns:
        for inner in subprograms(eqn):
            if eqn.primitive.name in ("mpmd_map", "core_map"):
                yield eqn.params["name"], inner
            else:
                yield from kernels(inner)


def unfenced(jaxpr, names=None, stored=frozenset(), found=None):
    """Reads of stores that no fence precedes, and the references stored since the last fence when the program ends.

    Args:
      jaxpr: of a kernel, or a part of one.
      names: reference of the kernel by variable of this part.
      stored: references stored before it, without a fence.
      found: reads found so far.
    """
    names, found = {} if names is None else names, [] if found is None else found

    def name_of(x):
        return names.get(x, x) if not hasattr(x, "val") else None

    for eqn in jaxpr.eqns:
        kind, inputs = eqn.primitive.name, [name_of(x) for x in eqn.invars]
        if kind in STORES and "smem" in str(eqn.invars[0].aval):
            stored |= {inputs[0]}
        elif kind == "commit_smem":
            stored = frozenset()
        elif kind in ("wgmma_ref", "copy_smem_to_gmem"):
            read = inputs[1:3] if kind == "wgmma_ref" else inputs[:1]
            found.extend((kind, str(eqn.invars[inputs.index(x)].aval)) for x in read if x in stored)
        else:
            ends = []
            for inner in subprograms(eqn):
                arguments = inputs[len(inputs) - len(inner.invars) :] if kind == "cond" else inputs
                known = dict(zip(inner.constvars, inputs, strict=False)) if inner.constvars else {}
                arguments = arguments[len(inner.constvars) :]
                if kind == "while":
                    # The variables of a condition and of a body are those of the loop less the other's constants.
                    skip = eqn.params["cond_nconsts"] if inner is eqn.params["body_jaxpr"].jaxpr else 0
                    arguments = inputs[skip : skip + len(inner.invars)]
                known |= dict(zip(inner.invars, arguments, strict=False))
                # Twice: what the end of a loop has stored, its beginning reads.
                end = stored
                for _ in range(1 + (kind in ("while", "scan"))):
                    end = unfenced(inner, known, end | stored, found)[1]
                ends.append(end)
            if ends:
                stored = frozenset().union(*ends) | (stored if kind in ("while", "scan") else frozenset())
    return found, stored


def trace(op, decay, width=128):
    """The kernels of the gradient of an op."""
    x, scalar = jax.ShapeDtypeStruct((1, 200, 1, width), jnp.bfloat16), jax.ShapeDtypeStruct((1, 200, 1), jnp.float32)
    arrays = dict.fromkeys("qkv", x) | ({"beta": scalar} if op.startswith("delta") else {})
    if decay:
        arrays["decay"] = scalar if decay == "head" else jax.ShapeDtypeStruct((1, 200, 1, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 200), jnp.int32)

    def loss(arrays, ids):
        output, _ = getattr(mf, op)(**arrays, segment_ids=ids, implementation="pallas")
        return jnp.sum(output.astype("float32"))

    with jax.sharding.use_abstract_mesh(H200):
        return dict(kernels(jax.make_jaxpr(jax.grad(loss))(arrays, ids).jaxpr))


CASES = [("delta_rule", "head", 128), ("delta_rule", "head", 256), ("delta_rule", "channel", 256)]
CASES += [("softmax_attention", None, 128), ("deltaformer", None, 128)]


@pytest.mark.parametrize(("op", "decay", "width"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_stores_are_fenced(op, decay, width):
    found = trace(op, decay, width)
    assert len(found) >= 2
    assert {name: unfenced(jaxpr)[0] for name, jaxpr in found.items()} == {name: [] for name in found}


def trace_decoding():
    """The kernel that reads a cache of DeltaFormer, whose values it splits in shared memory."""
    x, beta = jax.ShapeDtypeStruct((1, 2, 1, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2, 1), jnp.float32)
    cache = mf.init_cache(
        "deltaformer", batch=1, capacity=128, groups=1, key_width=128, value_width=128, dtype="bfloat16"
    )
    call = functools.partial(mf.deltaformer, initial_state=cache, write_kernel="linear", implementation="pallas")
    with jax.sharding.use_abstract_mesh(H200):
        return dict(kernels(jax.make_jaxpr(lambda x, beta: call(x, x, x, beta=beta)[0])(x, beta).jaxpr))


def test_stores_of_decoding_are_fenced(monkeypatch):
    (jaxpr,) = trace_decoding().values()
    assert unfenced(jaxpr)[0] == []
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    (jaxpr,) = trace_decoding().values()
    assert {kind for kind, _ in unfenced(jaxpr)[0]} == {"wgmma_ref", "copy_smem_to_gmem"}


def test_a_missing_fence_is_found(monkeypatch):
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    found = {name: {kind for kind, _ in unfenced(jaxpr)[0]} for name, jaxpr in trace("delta_rule", "head").items()}
    name = "memformer_delta_rule_"
    # The scans have no operand of wgmma that they store.
    assert found[f"{name}chunk_scan_forward"] == found[f"{name}chunk_scan_backward"] == {"copy_smem_to_gmem"}
    assert found[f"{name}intra_chunk"] == found[f"{name}intra_chunk_backward"] == {"wgmma_ref", "copy_smem_to_gmem"}
