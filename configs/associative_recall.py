"""Associative recall (arXiv 1410.5401, section 4.3): trained on 2 to 6 items of 3 vectors of 6 bits.

    python train.py --config=configs/associative_recall.py:ntm --workdir=runs/associative_recall-ntm
    python train.py --config=configs/associative_recall.py:lstm --workdir=runs/associative_recall-lstm

Guessing costs 18 bits per sequence. The memory has 64 slots (the paper's has 128). Expected after 128,000 sequences, in
wrong bits per test sequence, with times on two shared cores: NTM, 5 minutes, 0.0, and 0.0 at 12 items (about 0.1 after
32,000 sequences); LSTM, 10 minutes or more, 4.7, and 8.1 at 12 items.
"""

from memformer.training.config import default_config

VARIANTS = ("ntm", "lstm")


def get_config(variant="ntm"):
    """Returns the run's config; `variant` is one of `VARIANTS`."""
    config = default_config("recurrent_lm" if variant == "lstm" else "ntm", task="associative_recall")
    config.task.update(length=6, min_length=2, bits=6, rows=3)
    if variant == "lstm":
        config.model.width = 100
    else:
        config.model.slots = 64
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 4000
    config.train.batch_size = 32
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (2, 4, 6, 8, 10, 12)
    return config
