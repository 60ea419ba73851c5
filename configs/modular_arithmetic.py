"""Modular arithmetic without brackets (arXiv 2411.12537): trained on 3 to 40 tokens, tested on 40 to 256.

    python train.py --config=configs/modular_arithmetic.py:delta_rule --workdir=runs/modular_arithmetic

An LSTM with the value after every digit as a label, and lengths of 10, then up to 40:

    python train.py --config=configs/modular_arithmetic.py:lstm --workdir=runs/modular_arithmetic_lstm

Expected: 3 minutes on two shared cores, accuracy 100% at 40 tokens, 96% to 99% at 250, 94% to 99% at 500 (256 strings
each, three seeds: `python -m memformer.lab hierarchy`). With one label per string it stays at guessing (20%).

The paper's test mixes lengths and reports (accuracy - 1/5) / (4/5):

    python eval.py --workdir=runs/modular_arithmetic --set=task.min_length=40 --set=task.length=256 --lengths=256
"""

from memformer.training.config import default_config

VARIANTS = ("delta_rule", "lstm")


def get_config(variant="delta_rule"):
    """Returns the run's config; `variant` is one of VARIANTS."""
    config = default_config(task="modular_arithmetic")
    config.task.update(length=40, min_length=3, modulus=5)
    config.model.memory = "delta_rule"
    config.model.depth = 3
    config.model.width = 128
    config.model.heads = 4
    config.model.memory_options = {
        "delta_rule": {"beta_limit": 2.0},
        "lstm": {},
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
    if variant == "lstm":
        _take_lstm(config)
    return config


def _take_lstm(config):
    config.task.update(min_length=10, prefixes=True)
    config.model.update(memory="lstm", depth=1, width=128, feedforward=None)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=30, weight_decay=0.0)
    config.train.curriculum = {"enabled": True, "start": 10, "stop": 40, "factor": 4, "accuracy": 0.95}
    config.train.update(steps=3000, batch_size=16, log_every=20, stop_accuracy=0.0, final_lengths=(40, 100, 250, 500))
    config.train.final_batches = 16
