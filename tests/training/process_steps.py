"""Losses of the first steps on a mesh."""

import jax

from memformer.training.build import build_run
from memformer.training.input import batch_shapes, make_loader
from memformer.training.sharding import batch_layout, mesh_scope
from memformer.training.step import init_state, make_train_step
from tests.training.small import small_config

STEPS = 2


def losses(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> list[float]:
    """The loss after each step of a small run on the mesh; its time steps divide by four, its batch does not."""
    small = {"model__depth": 1, "model__heads": 4, "model__feedforward": None}
    config = small_config(**small, train__log_every=STEPS, task__start="none")
    config.mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    config.train.batch_size = 6
    run = build_run(config.to_dict(), devices=devices)
    layout = batch_layout(batch_shapes(run.task, 6), run.mesh)
    loader = make_loader(run.task, "train", batch_size=6, seed=0, rows=layout.rows, place=layout.place)
    with mesh_scope(run.mesh):
        state = init_state(run.model, run.tx, run.mesh, seed=0)
        step = make_train_step(run.model, run.tx, run.schedule, run.mesh, run.config["train"])
        found = []
        for _ in range(STEPS):
            state, report = step(state, next(loader))
            found.append(float(report["loss"]))
    loader.close()
    return found
