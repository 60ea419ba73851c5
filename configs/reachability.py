"""Reachability in a graph of two trees (DeltaFormer, NeurIPS 2025, listing G.2): one layer.

    python train.py --config=configs/reachability.py --workdir=runs/reachability

Softmax attention in four layers, which fails in the paper:

    python train.py --config=configs/reachability.py --config.model.memory=softmax_attention \
        --config.model.depth=4 --workdir=runs/reachability_softmax
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="reachability")
    config.task.update(length=32, width=128)
    config.model.memory = "deltaformer"
    config.model.depth = 1
    config.model.width = 128
    config.model.heads = 4
    config.model.memory_options = {
        "deltaformer": {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
        "delta_rule": {"beta_limit": 2.0},
        "softmax_attention": {"rotary": True},
    }
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.stop_accuracy = 0.999
    return config
