"""Repeat copy (arXiv 1410.5401, section 4.2) at a smaller size: 1 to 5 vectors of 4 bits, 1 to 5 times.

    python train.py --config=configs/repeat_copy.py:ntm --workdir=runs/repeat_copy-ntm
    python train.py --config=configs/repeat_copy.py:lstm --workdir=runs/repeat_copy-lstm

Expected: 4 minutes on two shared cores. 96,000 sequences are too few: the NTM ends at 20.0 bits and 6.8 wrong bits per
sequence. The LSTM has not been measured.

The sizes of the paper (1 to 10 vectors of 8 bits, 1 to 10 times) have three times as many steps per sequence:

    python train.py --config=configs/repeat_copy.py:ntm --config.task.length=10 --config.task.repeats=10 \
        --config.task.bits=8 --config.model.slots=128 --config.model.slot_width=20 --workdir=runs/repeat_copy-paper
"""

from memformer.training.config import default_config

VARIANTS = ("ntm", "lstm")


def get_config(variant="ntm"):
    """Returns the run's config; `variant` is one of `VARIANTS`."""
    config = default_config("recurrent_lm" if variant == "lstm" else "ntm", task="repeat_copy")
    config.task.update(length=5, min_length=1, bits=4, repeats=5)
    if variant == "lstm":
        config.model.width = 100
    else:
        config.model.slots, config.model.slot_width = 16, 10
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 3000
    config.train.batch_size = 32
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (5, 10)
    return config
