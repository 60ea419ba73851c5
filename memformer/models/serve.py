"""Runs an exported model; `export_model` puts a copy of this file beside the programs.

Needs jax, numpy and flatbuffers, with which jax reads programs.

from serve import ServedModel
ServedModel("path/to/folder").generate([[3, 1, 4], [1, 5]], max_new_tokens=32)
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

__all__ = ["ServedModel"]


class ServedModel:
    """An exported model: weights and two compiled programs.

        logits [B, classes], state = prefill(weights, ids [B, T], segment_ids [B, T], state)
        logits [B, classes], state = step(weights, token [B], state)

    Ids are int32; segment_ids are 0 at padding and 1 elsewhere. `prefill` reads any number of tokens, on top of the
    state, and gives the logits after the last one of each row; `step` reads one token per row. Both consume the state.
    A cache has a slot for each token of a call, padding included. Calls that do not fit are not written: count tokens.

    Args:
      folder: from `memformer.models.export_model`.

    Attributes:
      manifest: the contents of manifest.json.
      weights, prefill, step: see above.
    """

    def __init__(self, folder: str | pathlib.Path):
        folder = pathlib.Path(folder)
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        kinds = {name: jnp.dtype(x["dtype"]) for name, x in self.manifest["weights"].items()}
        with np.load(folder / "weights.npz") as arrays:
            # NumPy reads bfloat16 as raw bytes
            self.weights = {name: jnp.asarray(arrays[name].view(kind)) for name, kind in kinds.items()}
        prefill, step = (
            jax.export.deserialize(bytearray((folder / f"{n}.bin").read_bytes())) for n in ("prefill", "step")
        )
        self.prefill = jax.jit(prefill.call, donate_argnums=3)
        self.step = jax.jit(step.call, donate_argnums=2)

    def start(self, batch: int, capacity: int) -> dict[str, jax.Array]:
        """The state of empty sequences, all zeros; caches have `capacity` slots."""
        sizes = {"b": batch, "c": capacity}
        state = {}
        for name, x in self.manifest["state"].items():
            state[name] = jnp.zeros([sizes.get(size, size) for size in x["shape"]], x["dtype"])
        return state

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> np.ndarray:
        """The most probable tokens after each prompt, [B, max_new_tokens]; prompts may differ in length."""
        length = max(map(len, prompts))
        ids = np.array([[0] * (length - len(row)) + list(row) for row in prompts], np.int32)
        valid = np.array([[0] * (length - len(row)) + [1] * len(row) for row in prompts], np.int32)
        state = self.start(len(prompts), length + max_new_tokens)
        logits, state = self.prefill(self.weights, ids, valid, state)
        tokens = [jnp.argmax(logits, axis=-1).astype(jnp.int32)]
        while len(tokens) < max_new_tokens:
            logits, state = self.step(self.weights, tokens[-1], state)
            tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return np.stack(tokens, axis=1)
