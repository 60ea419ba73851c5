"""Copy (arXiv 1410.5401, section 4.1): trained on 1 to 20 vectors of 8 bits, tested on up to 120.

    python train.py --config=configs/copy.py:ntm --workdir=runs/copy-ntm
    python train.py --config=configs/copy.py:ntm_feedforward --workdir=runs/copy-ntm_feedforward
    python train.py --config=configs/copy.py:lstm --workdir=runs/copy-lstm

The memory is that of the paper, 128 slots of width 20; the LSTM has one layer of 256 units (the paper's has three).
Guessing costs 84 bits per sequence. Expected wrong bits per test sequence, with times on two shared cores:

    ntm               15 minutes, 208,000 sequences     0.0, and 0.0 at 120 vectors (0.26 bits)
    ntm_feedforward    5 minutes,  80,000 sequences     0.0, and 3.9 at 120 vectors
    lstm               6 minutes, 128,000 sequences    11.4, and 462 at 120 vectors
"""

from memformer.training.config import default_config

VARIANTS = ("ntm", "ntm_feedforward", "lstm")

# the model starts to use the memory after 500 to 1000 steps, and is exact at length 120 a few thousand later
STEPS = {"ntm": 6500, "ntm_feedforward": 2500}


def get_config(variant="ntm"):
    """Returns the run's config; `variant` is one of VARIANTS."""
    config = default_config("recurrent_lm" if variant == "lstm" else "ntm", task="copy")
    config.task.update(length=20, min_length=1, bits=8)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    if variant == "lstm":
        config.train.steps = 4000
    else:
        config.model.controller = "feedforward" if variant == "ntm_feedforward" else "lstm"
        config.optimizer.schedule = "constant"
        config.optimizer.clip_norm = 10.0
        config.train.steps = STEPS[variant]
    config.train.batch_size = 32
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (5, 10, 15, 20, 30, 50, 70, 90, 120)
    return config
