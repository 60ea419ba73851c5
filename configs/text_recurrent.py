"""Byte-level language model with one LSTM between embedding and output layer; bits per byte of held-out files.

    python train.py --config=configs/text_recurrent.py --workdir=runs/text-recurrent

Expected after 1.6 million bytes, two minutes on one core: 1.99 bits per byte of the test files (seeds 0 to 2: 1.97 to
2.01).

The text is that of configs/text.py. A GRU or a plain RNN:

    python train.py --config=configs/text_recurrent.py --config.model.cell=gru --workdir=runs/text-gru
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config("recurrent_lm", task="text")
    config.task.update(length=128, folder="", suffix=".py")
    config.model.cell = "lstm"
    config.model.width = 256
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 400
    config.train.batch_size = 32
    config.train.eval_every = 200
    config.train.eval_batches = 16
    return config
