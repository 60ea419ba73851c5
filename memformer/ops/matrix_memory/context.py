"""Matrix memories with time divided over devices.

Over one shard of time the state is an affine map, S_out = M S_in + E: E is the end state from an empty memory, M the
product of the tokens' transitions, [K, K] where writes erase and diagonal where they only add. Every device computes M
and E of its shard without reading, the start state of each shard follows from a prefix of the maps in log2(n) steps,
and then the implementation runs on the shard with its start state, kernels included.

The backward pass mirrors this: the gradient of the state runs the other way by M^T, from each shard's gradient of its
start state, and then the implementation's own backward pass runs with the gradient of its end state.

Per device this costs 1/n of the work, plus the passes that compute M and E (and their counterpart backward), which do
not read; TRAINING.md's alternative, correcting the outputs of a pass from an empty memory, costs the same products and
has one more output of T x K.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memformer.core.autodiff import in_forward_mode
from memformer.core.calls import MatrixCall
from memformer.core.context import TimeShards, time_shards
from memformer.core.decay import FORGOTTEN
from memformer.core.numerics import repeat_heads
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.ops.matrix_memory import chunked, recurrent
from memformer.pallas.sharding import dividing_axes, key_head_repeats

__all__ = ["run"]

Run = Callable[[MatrixCall], tuple[Array, Array]]


def run(implementation: Run, call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs an implementation of a matrix memory; where time lies on several devices, each runs its own tokens.

    Args:
      implementation: of `MatrixCall`s.
      call: of all tokens.
    """
    shards = time_shards(call.q.shape[1])
    if shards is None or call.document_states:
        # Documents move to the starts of chunks: the compiler divides that.
        return implementation(call)
    repeats = key_head_repeats(call.q.shape[2], call.v.shape[2])
    shared: dict[str, Any] = {
        name: None if (x := getattr(call, name)) is None else repeat_heads(x, repeats) for name in "qkw"
    }
    call = dataclasses.replace(call, **shared)
    batch, heads = dividing_axes(call.q.shape[0], call.q.shape[2])
    plan = _Plan(implementation, shards, _without_arrays(call))
    arrays = {name: x for name, x in vars(call).items() if isinstance(x, jax.Array)} | {"segments": call.segments}
    specs = dict.fromkeys(arrays, shards.spec(batch, heads))
    specs |= {"state": PartitionSpec(batch, heads), "segments": shards.spec(batch)}
    forward = in_forward_mode(arrays)

    def local(arrays):
        arrays = arrays | {"state": vary_like(shards.vary(arrays["state"]), arrays["q"])}
        segments = arrays.pop("segments")
        continues = None
        if segments is not None:
            # Masks made of them meet values that differ over heads too.
            segments = jax.tree.map(lambda x: vary_like(x, arrays["q"]), segments)
            segments, continues = shards.local_segments(segments)
        # The recurrence has every derivative, so that it must not meet a custom gradient.
        scan = _scan_plain if forward or implementation is recurrent.run else _scan
        output, state = scan(plan, arrays, segments, continues)
        return output, shards.from_last(state)

    others = (*(batch or ()), *(heads or ()))
    out_specs = (shards.spec(batch, heads), PartitionSpec(batch, heads))
    return shards.run(local, others, (specs,), out_specs)(arrays)


class _Plan(NamedTuple):
    """Static settings.

    Attributes:
      implementation: that runs on each shard.
      shards: of time.
      call: the call without its arrays.
    """

    implementation: Run
    shards: TimeShards
    call: "_Static"


@dataclasses.dataclass(frozen=True)
class _Static:
    """The fields of a call that are no arrays; equal and hashable by value."""

    fields: tuple[tuple[str, Any], ...]

    def call(self, arrays: dict[str, Array], segments: Any) -> MatrixCall:
        """A call with these arrays."""
        absent = {field.name: None for field in dataclasses.fields(MatrixCall)}
        return MatrixCall(**absent | dict(self.fields) | arrays | {"segments": segments})


def _without_arrays(call: MatrixCall) -> _Static:
    kept = ((name, x) for name, x in vars(call).items() if name != "segments" and not isinstance(x, jax.Array))
    return _Static(tuple(kept))


def _scan_plain(plan: _Plan, arrays, segments, continues):
    """Output and end state of this shard; arrays hold the initial state of the whole call as "state"."""
    transition, end = _affine_map(plan, arrays, segments, continues)
    start = _start_state(plan.shards, transition, end, arrays["state"])
    return _run_shard(plan, arrays | {"state": start}, segments, continues)


_scan = jax.custom_vjp(_scan_plain, nondiff_argnums=(0,))


def _scan_forward(plan, arrays, segments, continues):
    transition, end = _affine_map(plan, arrays, segments, continues)
    start = _start_state(plan.shards, transition, end, arrays["state"])
    run_shard = lambda arrays: _run_shard(plan, arrays, segments, continues)  # noqa: E731
    results, pull = jax.vjp(run_shard, arrays | {"state": start})
    return results, (arrays, segments, continues, transition, pull)


def _scan_backward(plan, saved, cotangents):
    arrays, segments, continues, transition, pull = saved
    d_output, d_end = cotangents
    shards = plan.shards
    # Of the start state through this shard alone. The map is linear in the state: any state serves.
    state_only = plan._replace(implementation=_state_form(plan))
    read = lambda state: _run_shard(state_only, arrays | {"state": state}, segments, continues)  # noqa: E731
    (output, _), pull_state = jax.vjp(read, arrays["state"])
    (d_start,) = pull_state((d_output.astype(output.dtype), d_end))
    transposed = transition if transition.shape[-1] == 1 else jnp.swapaxes(transition, -1, -2)
    later = _combine_all(shards, transposed, d_start, jnp.zeros_like(d_end), reverse=True)
    (d_arrays,) = pull((d_output, d_end + later))
    # The initial state is the first shard's.
    d_state = shards.first(d_arrays["state"], jnp.zeros_like(d_end))
    return d_arrays | {"state": d_state}, None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _run_shard(plan: _Plan, arrays, segments, continues):
    """The implementation on this shard; its start state belongs to an earlier segment unless that continues."""
    state = arrays["state"]
    if continues is not None:
        state = jnp.where(continues[:, None, None, None], state, jnp.zeros_like(state))
    return plan.implementation(plan.call.call(arrays | {"state": state}, segments))


def _state_form(plan: _Plan) -> Run:
    """The form that computes end states and their gradients; what it would read is removed by the compiler."""
    if plan.implementation is recurrent.run:
        return recurrent.run

    def form(call):
        try:
            return chunked.run(call)
        except NotImplementedError:
            return recurrent.run(call)

    return form


def _affine_map(plan: _Plan, arrays, segments, continues) -> tuple[Array, Array]:
    """M [B, H, K, K] or [B, H, K or 1, 1] where diagonal, and E [B, H, K, V]."""
    state = arrays["state"]
    empty = jnp.zeros_like(state)
    form = _state_form(plan)
    if arrays.get("beta") is None:
        end = form(plan.call.call(arrays | {"state": empty}, segments))[1]
        transition = _total_decay(arrays, segments, state)
    else:
        # K more value columns, of value 0, that start from the identity.
        width = state.shape[-2]
        identity = jnp.broadcast_to(jnp.eye(width, dtype=state.dtype), (*state.shape[:-1], width))
        identity = vary_like(identity, state)
        v = jnp.pad(arrays["v"], ((0, 0), (0, 0), (0, 0), (0, width)))
        wide = arrays | {"v": v, "state": jnp.concatenate([empty, identity], axis=-1)}
        both = form(plan.call.call(wide, segments))[1]
        end, transition = both[..., :-width], both[..., -width:]
    if continues is not None:
        transition = jnp.where(continues[:, None, None, None], transition, jnp.zeros_like(transition))
    return transition, end


def _total_decay(arrays, segments, state: Array) -> Array:
    """Factor on the state over the shard, [B, H, K or 1, 1]; 0 where a segment ends inside."""
    decay = arrays.get("decay")
    if decay is None:
        factor = vary_like(jnp.ones((*state.shape[:2], 1, 1), state.dtype), state)
    else:
        # As the implementations floor it.
        floored = jnp.maximum(decay.astype(state.dtype), jnp.asarray(FORGOTTEN, state.dtype))
        factor = jnp.exp(jnp.sum(floored, axis=1))
        factor = factor[..., None] if decay.ndim == 4 else factor[..., None, None]
    if segments is None:
        return factor
    whole = segments.index[:, -1] == 0
    return jnp.where(whole[:, None, None, None], factor, jnp.zeros_like(factor))


def _start_state(shards: TimeShards, transition: Array, end: Array, initial: Array) -> Array:
    end = shards.first(_apply(transition, initial) + end, end)
    return _combine_all(shards, transition, end, initial)


def _combine_all(shards: TimeShards, transition, end, start, *, reverse: bool = False) -> Array:
    def combine(earlier, later):
        (m, e), (m_later, e_later) = earlier, later
        return _apply(m_later, m), _apply(m_later, e) + e_later

    return shards.earlier(combine, (transition, end), (transition, start), reverse=reverse)[1]


def _apply(transition: Array, state: Array) -> Array:
    """M S, for a diagonal M too."""
    if transition.shape[-1] == 1:
        return transition * state
    return jnp.matmul(transition, state, precision=lax.Precision.HIGHEST)
