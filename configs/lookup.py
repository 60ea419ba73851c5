"""Content-addressable lookup: one attention head finds a pair by its key, at any position.

    python train.py --config=configs/lookup.py:anywhere --workdir=runs/lookup-anywhere

The control is trained with the queried pair always first, and attends by position:

    python train.py --config=configs/lookup.py:first --workdir=runs/lookup-first

Both, evaluated on pairs in random order (docs/results.md has three seeds: other ones with --config.seed=1 and
--workdir=runs/lookup-anywhere_seed1, ..., all of which the study measures together):

    python -m memformer.lab lookup runs/lookup-anywhere runs/lookup-first

Expected: 3 minutes each on two shared cores; accuracy 100.0% each on the training distribution, 100.0% and 12.7% to
13.1% (three seeds) on pairs in random order (chance 6.2%).
"""

from memformer.training.config import default_config

VARIANTS = ("anywhere", "first")


def get_config(variant="anywhere"):
    """Returns the run's config; `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    config = default_config("encoder", task="lookup")
    config.task.update(length=17, key_width=16, values=16, noise=0.1, asked=variant)
    config.model.width = 64
    config.model.heads = 1
    config.model.depth = 1
    config.model.hidden = 64
    config.model.norm_place = "pre"
    config.model.max_length = 17
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 1500
    config.train.batch_size = 64
    config.train.eval_every = 250
    config.train.eval_batches = 8
    config.train.final_lengths = (17,)
    return config
