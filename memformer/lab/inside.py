"""Inputs of the layers of a trained model, block by block."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from memformer.core.types import Array
from memformer.training.evaluation import LoadedRun

__all__ = ["BlockInputs", "block_inputs", "initial_model", "test_batch"]


class BlockInputs(NamedTuple):
    """Inputs of the two halves of a block, [B, T, D] each.

    Attributes:
      memory: the memory layer's input.
      feedforward: the feedforward layer's; the memory's where the block has none.
    """

    memory: Array
    feedforward: Array


def test_batch(run: LoadedRun, count: int) -> dict[str, np.ndarray]:
    """The first `count` examples of the run's test split, as one batch."""
    source = run.task.source("test", run.config["seed"])
    examples = [source[i] for i in range(count)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def initial_model(run: LoadedRun) -> Any:
    """The run's model before training."""
    module = run.model.module(*run.model.init(jax.random.key(run.config["seed"])), jax.random.key(0))
    module.eval()
    return module


def block_inputs(model: Any, inputs: Any, *, segment_ids: Any = None, positions: Any = None) -> list[BlockInputs]:
    """The inputs of each block's layers on `inputs` [B, T], for a MemoryLM whose layers are not scanned.

    Args:
      model: the model.
      inputs, segment_ids, positions: as for the model.

    Example:
      >>> from memformer.models import build_model
      >>> from flax import nnx
      >>> config = {"width": 8, "depth": 2, "heads": 2, "scan_layers": False}
      >>> model = build_model(config, vocab_size=5, rngs=nnx.Rngs(0))
      >>> [one.memory.shape for one in block_inputs(model, jnp.ones((1, 3), int))]
      [(1, 3, 8), (1, 3, 8)]
    """
    return _block_inputs(model, inputs, segment_ids, positions)


@nnx.jit
def _block_inputs(model: Any, inputs: Any, segment_ids: Any, positions: Any) -> list[BlockInputs]:
    x, found = model.embedding(inputs), []
    for block in model.blocks:
        read = block.norm(x)
        x = x + block.memory(read, segment_ids=segment_ids, positions=positions)[0]
        second = read
        if block.feedforward is not None:
            second = block.feedforward_norm(x)
            x = x + block.feedforward(second)[0]
        found.append(BlockInputs(read, second))
    return found
