"""Priority sort (arXiv 1410.5401, section 4.5) at a smaller size: the 8 highest of 10 vectors of 8 bits, in order.

    python train.py --config=configs/priority_sort.py:ntm --workdir=runs/priority_sort-ntm
    python train.py --config=configs/priority_sort.py:lstm --workdir=runs/priority_sort-lstm

Expected: 7 minutes on two shared cores. 320,000 sequences are too few, with a constant rate and gradients clipped to a
norm of 10: the NTM ends at 42.1 bits (guessing costs 64) and 15.1 wrong bits per sequence, and still falls (17.4 after
128,000). The LSTM has not been measured.

The sizes of the paper:

    python train.py --config=configs/priority_sort.py:ntm --config.task.length=20 --config.task.answers=16 \
        --config.model.slots=128 --workdir=runs/priority_sort-paper
"""

from memformer.training.config import default_config

VARIANTS = ("ntm", "lstm")


def get_config(variant="ntm"):
    """Returns the run's config; `variant` is one of `VARIANTS`."""
    config = default_config("recurrent_lm" if variant == "lstm" else "ntm", task="priority_sort")
    config.task.update(length=10, answers=8, bits=8)
    if variant == "lstm":
        config.model.width = 100
    else:
        config.model.slots = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.clip_norm = 10.0
    config.optimizer.weight_decay = 0.0
    config.train.steps = 20000
    config.train.batch_size = 16
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (10,)
    config.train.final_batches = 16
    return config
