"""Dynamic 6-grams (arXiv 1410.5401, section 4.4): 200 bits, the probabilities of all 32 contexts drawn per sequence.

    python train.py --config=configs/dynamic_ngrams.py:ntm --workdir=runs/dynamic_ngrams-ntm
    python train.py --config=configs/dynamic_ngrams.py:lstm --workdir=runs/dynamic_ngrams-lstm

The optimal predictor needs 127.7 bits for the 195 predicted bits, a fair coin 195. The memory is the paper's, 128 slots
of width 20. Expected: NTM 129.8 bits after 160,000 sequences, LSTM 134.7 after 640,000, and the optimum 127.9 on the
same 512 sequences, in one hour each on one shared core. With 40 slots of width 8 and a rate of 2e-3 the NTM has 137.7
after 640,000.
"""

from memformer.training.config import default_config

VARIANTS = ("ntm", "lstm")


def get_config(variant="ntm"):
    """Returns the run's config; `variant` is one of `VARIANTS`."""
    config = default_config("recurrent_lm" if variant == "lstm" else "ntm", task="dynamic_ngrams")
    config.task.update(length=200, context=5)
    if variant == "lstm":
        config.model.width = 100
        config.optimizer.learning_rate = 2e-3
        config.train.steps = 20000
    else:
        config.model.slots, config.model.slot_width = 128, 20
        config.optimizer.learning_rate = 1e-3
        config.train.steps = 5000
    config.optimizer.weight_decay = 0.0
    config.train.batch_size = 32
    config.train.log_every = 200
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (200,)
    config.train.final_batches = 16
    return config
