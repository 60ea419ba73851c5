"""Time divided over devices (context parallelism): the mesh axes of a call, and what passes between shards of time.

With time on a mesh axis an op runs inside `jax.shard_map`: every device holds T / n consecutive tokens. What a shard
needs of the earlier ones passes by `lax.ppermute` in log2(n) steps (`earlier`), never by a gather of the tokens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memformer.core.segments import Segments
from memformer.core.sharding import letter_axes
from memformer.core.types import Array, Bool, Int

__all__ = ["CONTEXT", "TimeShards", "refuse_sharded_time", "time_shards"]

# The axis over which the library's own meshes shard time.
CONTEXT = "context"


class TimeShards(NamedTuple):
    """The mesh axes over which time is divided, first axis outermost, and the number of devices."""

    names: tuple[str, ...]
    devices: int

    def rank(self) -> Int[Array, ""]:
        """Place of this device's shard in time, inside shard_map."""
        return lax.axis_index(self.names)

    def spec(self, batch: Any, *rest: Any) -> PartitionSpec:
        """The spec of an array [B, T, ...]; `rest` for the dimensions after time."""
        return PartitionSpec(batch, self.names, *rest)

    def run(self, function: Callable[..., Any], others: tuple[str, ...], in_specs: Any, out_specs: Any) -> Callable:
        """`function` inside shard_map over the axes of time and `others`."""
        names = {*self.names, *others}
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names)

    def vary(self, tree: Any) -> Any:
        """Arrays that are equal on all shards, as ones that may differ."""

        def vary(x):
            missing = tuple(name for name in self.names if name not in jax.typeof(x).manual_axis_type.varying)
            return lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(vary, tree)

    def shift(self, tree: Any, by: int = 1) -> Any:
        """The value of the shard `by` places earlier (later where negative), 0 where there is none."""
        pairs = [(i, i + by) for i in range(self.devices) if 0 <= i + by < self.devices]
        return jax.tree.map(lambda x: lax.ppermute(x, self.names, pairs), tree)

    def first(self, tree: Any, other: Any) -> Any:
        """`tree` on the first shard, `other` on all others."""
        return self._choose(self.rank() == 0, tree, other)

    def last(self, tree: Any, other: Any) -> Any:
        """`tree` on the last shard, `other` on all others."""
        return self._choose(self.rank() == self.devices - 1, tree, other)

    def from_last(self, tree: Any) -> Any:
        """The value of the last shard, on all of them."""
        return jax.tree.map(lambda x: lax.psum(self.last(x, jnp.zeros_like(x)), self.names), tree)

    def earlier(self, combine: Callable[[Any, Any], Any], value: Any, start: Any, *, reverse: bool = False) -> Any:
        """The combination of `start` and the values of all earlier shards.

        Args:
          combine: combine(earlier, later), associative; zeros as the earlier value must leave of the later one what is
            read from the result.
          value: of this shard; that of the first shard already holds `start`.
          start: for the first shard.
          reverse: of all later shards instead; the first shard is then the last one.
        """
        sign = -1 if reverse else 1
        distance = 1
        while distance < self.devices - 1:
            value = combine(self.shift(value, sign * distance), value)
            distance *= 2
        return (self.last if reverse else self.first)(start, self.shift(value, sign))

    def local_segments(self, segments: Segments) -> tuple[Segments, Bool[Array, "B"]]:
        """This shard's segments counted from 0, and whether its first one continues the last one before it."""
        index = segments.index
        before = self.shift(index[:, -1])
        return segments._replace(index=index - index[:, :1]), index[:, 0] == before

    @staticmethod
    def _choose(condition: Array, tree: Any, other: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


def time_shards(tokens: int) -> TimeShards | None:
    """The shards of time in the op or module that is traced; None where time is not divided.

    On an Explicit mesh these are the axes of the dimension T of the arguments. On an Auto mesh it is the axis named
    "context", where it divides the tokens.

    Args:
      tokens: T of the call.
    """
    axes = letter_axes()
    part = CONTEXT if axes is None else axes.get("T")
    names = (part,) if isinstance(part, str) else tuple(part or ())
    mesh = jax.sharding.get_abstract_mesh()
    if any(name not in mesh.axis_names or name in mesh.manual_axes for name in names):
        return None
    count = math.prod(mesh.shape[name] for name in names)
    return TimeShards(names, count) if count > 1 and tokens % count == 0 else None


def refuse_sharded_time(name: str, tokens: int) -> None:
    """Raises where time is divided over devices and an op or model runs one step after the other.

    Args:
      name: of the op or model.
      tokens: T of the call.

    Raises:
      NotImplementedError: names the mesh axes.
    """
    shards = time_shards(tokens)
    if shards is not None:
        axes = ", ".join(repr(axis) for axis in shards.names)
        raise NotImplementedError(
            f"{name} cannot divide time over devices: every step needs the whole state of the step before. The mesh has"
            f" time on {shards.devices} devices (axis {axes}): shard the batch over them instead (data, fsdp), or use a"
            " matrix memory or attention"
        )
