"""Captions of pictures, as Show, Attend and Tell (arXiv 1502.03044) gives them: an LSTM that looks at a part of the
picture for each word; and a Transformer over patches. `python -m memformer.lab captions RUN_FOLDERS` scores captions by
beam search and draws the attention (docs/results.md has its figures).

Generated pictures of placed shapes; about 8 minutes on one core of two with other work beside, loss on new pictures
0.0005 nats a word. The printed test split has pairs of colour and kind that are never trained on: loss 0.34.

    python train.py --config=configs/captions.py:shapes --workdir=runs/captions-shapes

The same by a Transformer over patches of 4 x 4 pixels; 14 minutes with much other work beside, loss on new pictures
0.0047, on the test split 0.37:

    python train.py --config=configs/captions.py:transformer --workdir=runs/captions-transformer

The 785 stamps of Tux Paint (first `apt-get install tuxpaint-stamps-default`); 6 minutes with much other work beside,
test loss 1.3 nats a word that has an id: too few pictures to name what was not seen.

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
