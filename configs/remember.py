"""Remember (ARMT, arXiv 2407.04841): pairs of three-symbol keys and values; 2, 10, 50 pairs, one segment each.

    python train.py --config=configs/remember.py:armt --workdir=runs/remember_armt
    python train.py --config=configs/remember.py:armt_without_gamma --workdir=runs/remember_armt_without_gamma
    python train.py --config=configs/remember.py:rmt --workdir=runs/remember_rmt

The ARMT goes to 10 pairs at step 540 and to 50 at step 1660 of 2000. It ran 1000 steps first
(`--config.train.steps=1000`) and was then taken on: 27 minutes of one core with much other work beside. It is not done
with 50 pairs then. Without gamma it stays at 10 pairs to the end (10 minutes); RMT guesses (1000 steps, 5 minutes). One
question behind n pairs, exact match by `python -m memformer.lab segments RUN_FOLDER...`:

    pairs                  2     10     50    100    200    500
    ARMT               99.8%  97.1%  75.0%  53.5%  35.2%  14.5%
    ARMT without gamma 99.6%  93.6%  56.2%  30.1%  26.2%  12.9%
    RMT                56.2%  19.3%   7.0%   8.6%   3.5%   5.9%
"""

from memformer.training.config import default_config

VARIANTS = ("armt", "armt_without_gamma", "rmt")


def get_config(variant="armt"):
    """Returns the run's config; `variant` is one of VARIANTS."""
    config = default_config("rmt" if variant == "rmt" else "armt")
    # eight questions a sequence, at random places among the pairs; the paper asks one, and draws the number of pairs
    config.task = {"name": "remember", "length": 50, "key_size": 3, "value_size": 1, "symbols": 16, "queries": 8}
    # a pair or a question is one segment
    config.model.segment_length = 6
    config.model.width = 64
    config.model.depth = 2
    config.model.heads = 4
    if variant == "rmt":
        config.model.memory_tokens = 4
    else:
        config.model.memory_tokens = 1
        config.model.key_width = 32
        config.model.correction = variant == "armt"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000 if variant == "rmt" else 2000
    config.train.batch_size = 32
    config.train.log_every = 20
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.stop_accuracy = 0.99
    config.train.curriculum = {"enabled": True, "start": 2, "stop": 50, "factor": 5, "accuracy": 0.98}
    return config
