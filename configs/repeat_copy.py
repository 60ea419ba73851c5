"""Repeat copy (arXiv 1410.5401, section 4.2) at a smaller size: 1 to 5 vectors of 4 bits, 1 to 5 times.

    python train.py --config=configs/repeat_copy.py:ntm --workdir=runs/repeat_copy-ntm
    python train.py --config=configs/repeat_copy.py:lstm --workdir=runs/repeat_copy-lstm

Expected after 320,000 sequences, in wrong bits per test sequence, with times on two shared cores: NTM, 8 minutes, 0.0
(1.9 after 128,000 sequences); LSTM, 4 minutes, 0.2. Neither goes beyond the 5 vectors of training: 24.6 and 16.4 at 6.
The rate is constant and gradients are clipped to a norm of 10: with a cosine, a norm of 1 and 96,000 sequences the NTM
had 6.8.

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
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.clip_norm = 10.0
    config.optimizer.weight_decay = 0.0
    config.train.steps = 20000
    config.train.batch_size = 16
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (2, 3, 4, 5, 6, 8, 10)
    config.train.final_batches = 16
    return config
