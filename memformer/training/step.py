"""The model as pure functions of flat parameters, and the compiled steps of training and evaluation.

Parameters are a flat dict from dotted path to array ("layers.0.memory.query.kernel"); optimizer masks, shardings,
checkpoints and error messages use these paths. A train state is a plain dict:

    step       int32 []        steps taken
    key        uint32 [2]      random key of the run: step s uses fold_in(key, s)
    params     {path: array}
    rest       {path: array}   other variables of the model; absent if it has none
    opt_state                  optax state, of the parameters that are trained
    ema        {path: float32} of the same; absent without optimizer.ema
    sums       {name: float32} counts since the last log
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memformer.training.losses import count_batch, smoothing_loss
from memformer.training.optimizer import update_ema
from memformer.training.sharding import RULES, partition_spec, state_shardings

__all__ = ["Functional", "abstract_state", "init_state", "make_eval_step", "make_functional", "make_train_step"]

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
Arrays = dict[str, jax.Array]

SUMS = (
    "loss",
    "weight",
    "correct",
    "errors",
    "sequences",
    "sequences_correct",
    "tokens",
    "aux",
    "bad_step",
    "bad_count",
    "steps",
)


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model without its arrays; made by `make_functional`.

    Attributes:
      build: creates the module from rngs.
      graphdef: static structure for `nnx.merge`.
      params: abstract value of each parameter, by dotted path.
      axes: logical axis names of each parameter, or None.
      multiplied: the share of a parameter by which a token is multiplied, where it is not 1 (experts).
      streams: abstract keys and counts of the random streams (dropout).
      paths: dotted path -> path of keys in the module, for all variables.
      frozen: names of the parameters that are not trained.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    params: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str | None, ...] | None]
    multiplied: dict[str, float]
    streams: dict[str, jax.ShapeDtypeStruct]
    paths: dict[str, tuple]
    frozen: frozenset[str] = frozenset()

    def trained(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that are trained."""
        return {name: x for name, x in params.items() if name not in self.frozen}

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        """Initializes the parameters and the other variables from `key`."""
        with nnx.use_eager_sharding(False):
            _, params, _, rest = nnx.split(self.build(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
        return _values(params), _values(rest)

    def module(self, params: Arrays, rest: Arrays, key: jax.Array) -> nnx.Module:
        """Returns the module with these arrays; its random streams start from `key`."""
        arrays = {**params, **rest, **self._start_streams(key)}
        return nnx.merge(self.graphdef, nnx.from_flat_state([(self.paths[n], x) for n, x in arrays.items()]))

    def _start_streams(self, key: jax.Array) -> Arrays:
        started = {}
        for index, (name, stream) in enumerate(sorted(self.streams.items())):
            if jnp.issubdtype(stream.dtype, jax.dtypes.prng_key):
                started[name] = jax.random.split(jax.random.fold_in(key, index), stream.shape)
            else:
                started[name] = jnp.zeros(stream.shape, stream.dtype)
        return started

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """Sharding of each parameter on `mesh`."""
        specs = {name: partition_spec(self.axes[name], x.shape, mesh) for name, x in self.params.items()}
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    def size(self, without: tuple[str, ...] = ()) -> int:
        """Number of parameters, without those whose path contains a word of `without`."""
        return sum(x.size for name, x in self.params.items() if not any(word in name for word in without))

    def count(self) -> str:
        """The number of parameters, and of those that are trained, as a log shows them."""
        trained = sum(x.size for x in self.trained(self.params).values())
        return f"{self.size():,} parameters" + (f" ({trained:,} trained)" if self.frozen else "")

    def matrix_size(self, without: tuple[str, ...] = ()) -> int:
        """The parameters that multiply a token: of experts the chosen ones, of a frozen parameter two thirds.

        Of the three products per token of a frozen parameter its gradient falls away.
        """
        sizes = {name: x.size * self.multiplied.get(name, 1.0) for name, x in self.params.items()}
        used = {name: n * (2 / 3 if name in self.frozen else 1) for name, n in sizes.items()}
        return round(sum(n for name, n in used.items() if not any(word in name for word in without)))


def make_functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Traces a model for its structure, without allocating arrays."""
    # with rules Flax would shard each parameter by its names alone, and refuse two names on one mesh axis
    with nnx.use_eager_sharding(False), nnx.logical_axis_rules([(name, None) for name, _ in RULES]):
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graphdef, params, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
    paths = {_dotted(path): path for part in (params, streams, rest) for path, _ in nnx.to_flat_state(part)}
    metadata = {_dotted(path): variable.get_metadata() for path, variable in nnx.to_flat_state(params)}
    axes = {name: found.get("out_sharding") for name, found in metadata.items()}
    multiplied = {name: found["multiplied"] for name, found in metadata.items() if "multiplied" in found}
    return Functional(build, graphdef, _values(params), axes, multiplied, _values(streams), paths)


def _values(state: nnx.State) -> dict[str, Any]:
    return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _new_state(model: Functional, tx: optax.GradientTransformation, ema: float, key: jax.Array) -> State:
    params, rest = model.init(jax.random.fold_in(key, 0))
    state: State = {
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.fold_in(key, 1)),
        "params": params,
        "opt_state": tx.init(model.trained(params)),
        "sums": _no_sums(),
    }
    if rest:
        state["rest"] = rest
    if ema:
        # a copy: the step donates both
        state["ema"] = {name: jnp.array(x, jnp.float32, copy=True) for name, x in model.trained(params).items()}
    return state


def _no_sums() -> Arrays:
    return {name: jnp.full((), -1.0 if name == "bad_step" else 0.0, jnp.float32) for name in SUMS}


def abstract_state(model: Functional, tx: optax.GradientTransformation, mesh: Mesh, ema: float = 0.0) -> State:
    """Shapes, dtypes and shardings of the train state of a run: the target of a restore."""
    shapes = jax.eval_shape(lambda: _new_state(model, tx, ema, jax.random.key(0)))
    shardings = state_shardings(shapes, model.shardings(mesh), mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(
    model: Functional, tx: optax.GradientTransformation, mesh: Mesh, *, seed: int, ema: float = 0.0
) -> State:
    """Creates the train state at step 0, sharded from the start: no device ever holds all of it.

    The values do not depend on the mesh. Call it inside `mesh_scope`.
    """

    def make(key: jax.Array) -> State:
        return _new_state(model, tx, ema, key)

    key = jax.random.key(seed)
    # traced once: jit finds the trace of this function
    shapes = jax.eval_shape(make, key)
    return jax.jit(make, out_shardings=state_shardings(shapes, model.shardings(mesh), mesh))(key)


def make_train_step(
    model: Functional,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], jax.Array],
    mesh: Mesh,
    options: Mapping[str, Any],
    ema: float = 0.0,
) -> jax.stages.Wrapped:
    """Returns the compiled step (state, batch) -> (state, report); it donates the state.

    The gradient is that of the mean loss over the whole batch, independent of the shards and of the `accumulate`
    micro-batches; frozen parameters have none. The report holds the sums since the last log (a multiple of `log_every`
    steps), and the norms and learning rate of this step.

    Args:
      model: from `make_functional`.
      tx: optimizer.
      schedule: learning rate by step, for the report.
      mesh: the mesh of the run.
      options: the run's `train` section: accumulate, label_smoothing, log_every, on_nan.
      ema: decay of the moving average of the parameters; 0 for none.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh, ema))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(state: State, batch: Batch) -> tuple[State, Arrays]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        grads, counts, rest = _gradients(model, state, batch, key, options)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(counts["loss"])
        trained = model.trained(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], trained)
        trained = optax.apply_updates(trained, updates)
        params = {**state["params"], **trained}
        new = {**state, "params": params, "opt_state": opt_state}
        if rest:
            new["rest"] = rest
        if ema:
            new["ema"] = update_ema(state["ema"], trained, ema, state["step"])
        if options["on_nan"] == "skip":
            new = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
            counts = {name: jnp.where(good, x, jnp.zeros_like(x)) for name, x in counts.items()}
        new["sums"] = _add_sums(state, counts, good, options["log_every"])
        new["step"] = state["step"] + 1
        report = {
            **new["sums"],
            "gradient_norm": norm,
            "parameter_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
        }
        return new, report

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))


def _add_sums(state: State, counts: Arrays, good: jax.Array, log_every: int) -> Arrays:
    """Sums since the last log, kept in the state so that a resumed run logs what an uninterrupted one does."""
    start = state["step"] % log_every == 0
    before = {name: jnp.where(start, zero, state["sums"][name]) for name, zero in _no_sums().items()}
    number = (state["step"] + 1).astype(jnp.float32)
    sums = {name: before[name] + x for name, x in counts.items()}
    sums["steps"] = before["steps"] + 1
    sums["bad_count"] = before["bad_count"] + jnp.where(good, 0.0, 1.0).astype(jnp.float32)
    sums["bad_step"] = jnp.where(good | (before["bad_step"] > 0), before["bad_step"], number)
    return sums


def _gradients(
    model: Functional, state: State, batch: Batch, key: jax.Array, options: Mapping[str, Any]
) -> tuple[Arrays, Arrays, Arrays]:
    """Gradient of the mean loss of a batch (with auxiliary losses), its counts, and the new variables of the model."""
    weight = jnp.maximum(jnp.sum(batch["loss_weights"]), jnp.float32(1e-8))
    parts, smoothing = options["accumulate"], options["label_smoothing"]

    def loss(trained: Arrays, rest: Arrays, part: Batch, part_key: jax.Array):
        module = model.module({**state["params"], **trained}, rest, part_key)
        module.train()
        output = _call(module, part)
        counts = count_batch(output.logits, part["targets"], part["loss_weights"])
        counts["tokens"] = jnp.sum((part["segment_ids"] > 0).astype(jnp.float32))
        aux = sum((x.astype(jnp.float32) for x in output.aux.values()), jnp.zeros((), jnp.float32))
        counts["aux"] = aux / parts
        changed = _values(nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))) if rest else {}
        objective = counts["loss"]
        if smoothing:
            objective = (1 - smoothing) * objective + smoothing * smoothing_loss(output.logits, part["loss_weights"])
        return objective / weight + counts["aux"], (counts, changed)

    gradient = jax.grad(loss, has_aux=True)
    trained, rest = model.trained(state["params"]), state.get("rest", {})
    if parts == 1:
        grads, (counts, rest) = gradient(trained, rest, batch, key)
        return grads, counts, rest

    def one(carry: tuple, item: tuple):
        total, rest = carry
        part, index = item
        grads, (counts, rest) = gradient(trained, rest, part, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, total, (grads, counts)), rest), None

    micro = jax.tree.map(lambda x: _micro_batches(x, parts), dict(batch))
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradient, trained, rest, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    ((grads, counts), rest), _ = jax.lax.scan(one, (zeros, rest), (micro, jnp.arange(parts)))
    return grads, counts, rest


def _micro_batches(x: jax.Array, parts: int) -> jax.Array:
    """Reshapes [B, ...] to [parts, B / parts, ...]; every device keeps its own rows."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _call(module: nnx.Module, batch: Batch) -> Any:
    """Calls the model; arrays of a batch other than inputs and scoring are keyword arguments of their names."""
    arguments = {name: x for name, x in batch.items() if name not in ("inputs", "targets", "loss_weights")}
    return module(batch["inputs"], **arguments)


def make_eval_step(model: Functional, mesh: Mesh) -> Callable[[Arrays, Arrays, Batch], Arrays]:
    """Returns the compiled (params, rest, batch) -> sums of `count_batch`; dropout is off."""

    def step(params: Arrays, rest: Arrays, batch: Batch) -> Arrays:
        module = model.module(params, rest, jax.random.key(0))
        module.eval()
        output = _call(module, batch)
        return count_batch(output.logits, batch["targets"], batch["loss_weights"])

    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
