"""Fewer programs: those of equal text are compiled once, equal runs share their steps, NumPy needs none."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import lax
from jax._src import compiler, core

KEPT: dict[tuple, Any] = {}


@contextlib.contextmanager
def kept_executables() -> Iterator[None]:
    """Inside, a program whose text, devices and options were compiled before is not compiled again.

    Names and source lines are no part of the text, so tests that read them from a compiled program stay outside. A
    program with host callbacks holds addresses and is always compiled.
    """
    compile_program = compiler.backend_compile_and_load

    def look_up(backend, module, devices, options, host_callbacks):
        key = (id(backend), str(module), tuple(d.id for d in devices), options.SerializeAsString())
        if host_callbacks or key not in KEPT:
            made = compile_program(backend, module, devices, options, host_callbacks)
            return made if host_callbacks else KEPT.setdefault(key, made)
        return KEPT[key]

    with mock.patch.object(compiler, "backend_compile_and_load", look_up):
        yield


def state_by_operation(model, tx, mesh, *, seed, ema=0.0):
    """The state that `init_state` returns, made operation by operation from the same random numbers.

    `init_state` is one program per run, as costly to compile as the step. Operations compile once per shape, for all
    runs of a process. What `init_state` promises is tested in test_step and test_sharding.
    """
    # imported on use: the tests of the core need no more than the core
    from memformer.training import step
    from memformer.training.sharding import state_shardings

    state = step._new_state(model, tx, ema, jax.random.key(seed))
    # copies: the step donates each array
    return jax.device_put(state, state_shardings(state, model.shardings(mesh), mesh), may_alias=False)


@contextlib.contextmanager
def steps_kept() -> Iterator[None]:
    """Inside, runs of equal model, optimizer and mesh share what the trainer and evaluation make of them.

    These are the steps of training and of scoring, which are traced once, the shapes of the state, and the first state
    per seed, made by `state_by_operation`. The runs may differ in steps, folders, evaluations and checkpoints. That a
    new process does as this one is tested in test_crash and test_processes.
    """
    # imported on use: the tests of the core need no more than the core
    from memformer.training import build, evaluation, loop, step
    from memformer.training.sharding import state_shardings

    runs: dict[tuple, Any] = {}
    # model and optimizer stay in `runs`, so that no other object has their id
    made: dict[tuple, Any] = {}
    read = ("accumulate", "label_smoothing", "log_every", "on_nan")
    make = {name: getattr(step, name) for name in ("make_train_step", "make_eval_step", "abstract_state")}

    def build_run(config, **options):
        run = build.build_run(config, **options)
        sections = {name: x for name, x in run.config.items() if name not in ("train", "checkpoint", "mesh", "seed")}
        # a section may name a folder, whose model is another one in the next test
        params = tuple((name, x.shape, x.dtype) for name, x in run.model.params.items())
        key = (json.dumps(sections, sort_keys=True, default=str), type(run.task), build.build_model, run.mesh)
        key += (params, run.model.frozen)
        first = runs.setdefault(key, run)
        return dataclasses.replace(run, model=first.model, tx=first.tx, schedule=first.schedule)

    def keep(name, model, tx, mesh, rest, create):
        key = (name, id(model), id(tx), mesh, step.count_batch, *rest)
        if key not in made:
            # the objects themselves, for runs that another function has built
            made[key] = (create(), model, tx)
        return made[key][0]

    def train_step(model, tx, schedule, mesh, options, ema=0.0):
        rest = (ema, *(options[name] for name in read))
        create = functools.partial(make["make_train_step"], model, tx, schedule, mesh, options, ema)
        return keep("train", model, tx, mesh, rest, create)

    def eval_step(model, mesh):
        return keep("eval", model, None, mesh, (), functools.partial(make["make_eval_step"], model, mesh))

    def shapes(model, tx, mesh, ema=0.0):
        return keep("shapes", model, tx, mesh, (ema,), functools.partial(make["abstract_state"], model, tx, mesh, ema))

    def first_state(model, tx, mesh, *, seed, ema=0.0):
        def create():
            return jax.device_get(state_by_operation(model, tx, mesh, seed=seed, ema=ema))

        state = keep("state", model, tx, mesh, (seed, ema), create)
        return jax.device_put(state, state_shardings(state, model.shardings(mesh), mesh), may_alias=False)

    with contextlib.ExitStack() as stack:
        for module in (loop, evaluation):
            replaced = {"build_run": build_run, "make_eval_step": eval_step, "abstract_state": shapes}
            if module is loop:
                replaced |= {"make_train_step": train_step, "init_state": first_state}
            stack.enter_context(mock.patch.multiple(module, **replaced))
        yield


def lift_arrays() -> None:
    """Makes JAX arrays of NumPy arrays without compiling: JAX 0.10 has a program per shape and dtype, 14 ms each.

    jnp.asarray(x) stages a copy, jnp.asarray(x, dtype) converts what NumPy has converted before.
    """
    for primitive in (getattr(core, "stage_p", None), lax.convert_element_type_p):
        if primitive is not None:
            primitive.def_impl(functools.partial(_lift, primitive.impl))


def _lift(compiled: Callable[..., Any], x: Any, **options: Any) -> Any:
    same = isinstance(x, np.ndarray) and options.get("new_dtype", x.dtype) == x.dtype
    if same and not options.get("weak_type") and jax.sharding.get_abstract_mesh().empty:
        return jax.device_put(x.copy())
    return compiled(x, **options)
