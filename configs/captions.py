"""Image captioning with soft attention (Show, Attend and Tell, arXiv 1502.03044): an LSTM that attends to the picture
for each word, and a Transformer over patches. `python -m memformer.lab captions RUN_FOLDERS` scores captions by beam
search and plots the attention (results: docs/results.md).

Generated pictures of placed shapes. Expected: 7 minutes on one shared core, loss 0.0003 nats per word on new pictures
(seeds 0 to 2: 0.0001 to 0.0005). The test split holds pairs of color and kind that are not in training: loss 0.36.

    python train.py --config=configs/captions.py:shapes --workdir=runs/captions-shapes

A Transformer over patches of 4 x 4 pixels. Expected: 9 minutes, loss 0.011 on new pictures (0.008 to 0.014), 0.57 on
the test split.

    python train.py --config=configs/captions.py:transformer --workdir=runs/captions-transformer

The 785 stamps of Tux Paint (install them with `apt-get install tuxpaint-stamps-default`). Expected: 4 minutes, test
loss 1.3 nats per known word; there are too few pictures to generalize to new objects.

    python train.py --config=configs/captions.py:stamps --workdir=runs/captions-stamps
"""

from memformer.training.config import default_config

VARIANTS = ("shapes", "transformer", "stamps")


def get_config(variant="shapes"):
    """Returns the run's config."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/captions.py has the variants {', '.join(VARIANTS)}, got {variant!r}")
    config = default_config("captioner", task="captions")
    config.task.update(length=9, pictures="shapes", size=32, folder="")
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 4000
    config.train.batch_size = 64
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.eval_batches = 8
    if variant == "transformer":
        config.model.update({"decoder": "transformer", "grid": "patches", "width": 64})
        config.train.steps = 3500
        config.train.batch_size = 32
    if variant == "stamps":
        config.task.update({"length": 12, "pictures": "stamps"})
        config.model.dropout = 0.5
        config.optimizer.weight_decay = 0.05
        config.train.steps = 800
        config.train.batch_size = 32
        config.train.eval_every = 100
        config.train.eval_batches = 3
    return config
