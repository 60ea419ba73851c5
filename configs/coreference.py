"""Coreference: a small Transformer encoder finds the noun that "it" refers to, in pairs of twin sentences.

    python train.py --config=configs/coreference.py --workdir=runs/coreference
    python -m memformer.lab coreference runs/coreference

Other seeds: --config.seed=1 and --workdir=runs/coreference_seed1; the study measures them together. Noun pairs of
validation and test do not occur in training. Expected: 3 minutes on two shared cores, accuracy 82% at step 500 and
99.4% to 100.0% at the end (three seeds). The family of sentences that is held out of training:

    python eval.py --workdir=runs/coreference --set=task.families=held_out
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config("encoder", task="coreference")
    config.task.update(length=16, families="trained")
    config.model.width = 64
    config.model.heads = 4
    config.model.depth = 3
    config.model.hidden = 128
    config.model.positions = "rotary"
    config.model.norm_place = "pre"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 1500
    config.train.batch_size = 64
    config.train.eval_every = 250
    config.train.eval_batches = 8
    return config
