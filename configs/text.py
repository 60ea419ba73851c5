"""Byte-level language model on the sources of the Python standard library; bits per byte of held-out files.

    python train.py --config=configs/text.py --workdir=runs/text

On the files of a folder, selected by suffix:

    python train.py --config=configs/text.py --config.task.folder=/path/to/books --config.task.suffix=.txt \
        --workdir=runs/books
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="text")
    config.task.update(length=256, folder="", suffix=".py")
    config.model.memory = "gated_delta_rule"
    config.model.depth = 2
    config.model.width = 128
    config.model.heads = 2
    config.model.memory_options = {
        "gated_delta_rule": {"conv_width": 4},
        "softmax_attention": {"rotary": True},
        "deltaformer": {"write_kernel": "softmax", "read_kernel": "softmax"},
    }
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.eval_every = 250
    config.train.eval_batches = 16
    return config
