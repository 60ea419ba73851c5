"""The attention kernels of the GPU as they ship, in Pallas' interpreter.

In the interpreter the library keeps left operands of wgmma in shared memory and adds to accumulators afterwards,
because Pallas' interpreter has neither operands in registers nor accumulators with a start value. In tests it has both
(gpu_interpreter.py): here the program that compiles for a chip runs, and gives what the other one gives.
"""

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from memformer.pallas.gpu.attention import tiles
from tests.numeric import assert_close
from tests.pallas.test_gpu import interpreter, interprets

__all__ = ["interpreter"]


@interprets
def test_shipped_form(interpreter, monkeypatch):
    """Packed softmax attention of four tiles, more than there are slots, with its gradients.

    So run, the detector of races saw that loads of a slot's scalars were not fenced from the next copy to it.
    """
    rng = np.random.default_rng(4)
    arrays = {name: jnp.asarray(rng.standard_normal((1, 200, 1, 16)), "bfloat16") for name in "qkv"}
    ids = jnp.asarray(np.arange(200) // 70, jnp.int32)[None]

    def loss(arrays):
        output, _ = mf.softmax_attention(**arrays, segment_ids=ids, implementation="pallas")
        return jnp.sum(jnp.sin(output.astype("float32"))), output

    def run():
        (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return jax.tree.map(lambda x: x.astype("float32"), (output, gradients))

    want = run()
    monkeypatch.setattr(tiles, "interpreting_for", lambda chip: False)
    assert_close(run(), want, 5e-3)
