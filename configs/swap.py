"""State tracking by swaps (DeltaFormer, NeurIPS 2025, listing G.1): one layer, five objects.

    python train.py --config=configs/swap.py --workdir=runs/swap

Expected: 20 s of training on two cores, 30 s with imports and compilation; stops at step 150 of 400 with test accuracy
100.0% at length 32, and without further training 99.8% at 64, 96.4% at 128, 78.5% at 256. Softmax attention reaches
29.6% at length 32 after 400 steps.

Other memories, and the paper's curriculum from 32 to 256:

    python train.py --config=configs/swap.py --config.model.memory=softmax_attention --workdir=runs/swap_softmax
    python train.py --config=configs/swap.py --config.train.curriculum.enabled=True \
        --config.train.steps=1000 --workdir=runs/swap_curriculum

With a feedforward layer (--config.model.feedforward=swiglu) the curriculum reaches 64, 128 and 256 at steps 80, 90 and
110, with 99.1% accuracy in the first steps at 256.
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="swap")
    # one start token per object: the model can write the start state, and learns in a hundredth of the steps
    config.task.update(length=32, objects=5, start="objects")
    config.model.memory = "deltaformer"
    config.model.depth = 1
    config.model.width = 128
    config.model.heads = 4
    # without a feedforward layer: half the steps, and cheaper ones
    config.model.feedforward = None
    # beta in (0, 2): a swap is a reflection, I - 2 k k^T
    config.model.memory_options = {
        "deltaformer": {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
        "delta_rule": {"beta_limit": 2.0},
        "gated_delta_rule": {"beta_limit": 2.0},
        "kda": {"beta_limit": 2.0},
        "delta_product": {"steps": 2, "beta_limit": 2.0},
        "softmax_attention": {"rotary": True},
    }
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "exponential"
    config.train.steps = 400
    config.train.batch_size = 64
    config.train.stop_accuracy = 0.999
    config.train.final_lengths = (16, 32, 64, 128, 256)
    return config
