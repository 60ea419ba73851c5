"""Priority sort (arXiv 1410.5401, section 4.5) at a smaller size: the 8 highest of 10 vectors of 8 bits, in order.

    python train.py --config=configs/priority_sort.py:ntm --workdir=runs/priority_sort-ntm
    python train.py --config=configs/priority_sort.py:ntm_one_head --workdir=runs/priority_sort-ntm_one_head
    python train.py --config=configs/priority_sort.py:lstm --workdir=runs/priority_sort-lstm

The NTM has four read and four write heads (the paper's has five, or eight with a feedforward controller). It ends at
2.2 bits (guessing costs 64) and 0.5 wrong bits per sequence after 256,000 sequences, 10 minutes on two shared cores;
with one head of each at 42.1 and 15.1 after 320,000; the LSTM at 45.6 and 16.6 after 256,000.

The sizes of the paper:

    python train.py --config=configs/priority_sort.py:ntm --config.task.length=20 --config.task.answers=16 \
        --config.model.slots=128 --workdir=runs/priority_sort-paper
"""

from memformer.training.config import default_config

VARIANTS = ("ntm", "ntm_one_head", "lstm")


def get_config(variant="ntm"):
    """Returns the run's config; `variant` is one of `VARIANTS`."""
    config = default_config("recurrent_lm" if variant == "lstm" else "ntm", task="priority_sort")
    config.task.update(length=10, answers=8, bits=8)
    if variant == "lstm":
        config.model.width = 100
    else:
        config.model.slots = 32
        config.model.read_heads = config.model.write_heads = 1 if variant == "ntm_one_head" else 4
    config.optimizer.learning_rate = 1e-3
    config.optimizer.clip_norm = 10.0
    config.optimizer.weight_decay = 0.0
    if variant == "ntm_one_head":
        config.optimizer.schedule = "constant"
        config.train.steps = 20000
    else:
        # constant for 10,000 steps
        config.optimizer.schedule, config.optimizer.decay_fraction = "warmup_stable_decay", 0.375
        config.train.steps = 16000
    config.train.batch_size = 16
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.train.final_lengths = (10,)
    config.train.final_batches = 16
    return config
