"""Translation of verses from English to Spanish by three generations of models: the last state of an LSTM, attention
over the states of an LSTM, and the Transformer. Same verses and byte pairs; 4000 steps of 32 verses (Transformer 2500).

    python train.py --config=configs/translation.py:last_state --workdir=runs/translation-last_state
    python train.py --config=configs/translation.py:attention --workdir=runs/translation-attention
    python train.py --config=configs/translation.py:transformer --workdir=runs/translation-transformer

BLEU by source length, and plots of the attention:

    python -m memformer.lab translation runs/translation-last_state runs/translation-attention \
        runs/translation-transformer

Expected with the installed verses, seed 0, one shared core (1,074 test verses of at most 39 tokens, four beams): last
state, 33 minutes, BLEU 2.4 (3.3 for the shortest fifth of the sources, 2.4 for the longest); attention, 45 minutes,
BLEU 23.9 (25.3, 24.2); Transformer, 40 minutes, BLEU 20.1 (23.6, 19.4). The last state alone does not learn to
translate in so few steps: it writes fluent but unrelated verses.

The verses are those of the packages sword-text-kjv and sword-text-sparv; without them 514 verses of Genesis are used,
which is only enough to see the loss fall.
"""

from memformer.training.config import default_config

VARIANTS = ("last_state", "attention", "transformer")


def get_config(variant="attention"):
    """Returns the run's config; `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    config = default_config("transformer" if variant == "transformer" else "seq2seq", task="translation")
    config.task.update(length=40, vocab_size=3000, corpus="auto", folder="")
    config.model.width = 128
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 200
    config.train.steps = 4000
    if variant == "transformer":
        config.train.steps = 2500
        config.optimizer.warmup_steps = 150
        config.model.heads = 4
        config.model.hidden = 512
        config.optimizer.learning_rate = 2e-3
        config.optimizer.b2 = 0.98
        config.train.label_smoothing = 0.1
    else:
        config.model.attention = "additive" if variant == "attention" else "none"
    config.train.batch_size = 32
    config.train.eval_every = 500
    config.train.eval_batches = 16
    config.train.checkpoint_every = 1000
    return config
