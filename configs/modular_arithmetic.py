"""Modular arithmetic without brackets (arXiv 2411.12537): trained on 3 to 40 tokens, tested on 40 to 256.

    python train.py --config=configs/modular_arithmetic.py --workdir=runs/modular_arithmetic

The paper's test mixes lengths and reports (accuracy - 1/5) / (4/5):

    python eval.py --workdir=runs/modular_arithmetic --set=task.min_length=40 --set=task.length=256 --lengths=256
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="modular_arithmetic")
    config.task.update(length=40, min_length=3, modulus=5)
    config.model.memory = "delta_rule"
    config.model.depth = 3
    config.model.width = 128
    config.model.heads = 4
    config.model.memory_options = {
        "delta_rule": {"beta_limit": 2.0},
        "gated_delta_rule": {"beta_limit": 2.0},
        "delta_product": {"steps": 2, "beta_limit": 2.0},
        "deltaformer": {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
    }
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 20000
    config.train.batch_size = 256
    config.train.stop_accuracy = 0.999
    config.train.final_lengths = (40, 64, 128, 256)
    return config
