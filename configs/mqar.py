"""Multi-query associative recall (Zoology, arXiv 2312.04927), setting A: vocabulary 8192, 4 pairs in 64 tokens.

    python train.py --config=configs/mqar.py --workdir=runs/mqar

Larger sizes, and setting B (DeltaFormer, NeurIPS 2025, table 1), 32 pairs at width 32:

    python train.py --config=configs/mqar.py --config.task.length=256 --config.task.pairs=16 --workdir=runs/mqar256
    python train.py --config=configs/mqar.py --config.task.vocab_size=256 --config.task.length=128 \
        --config.task.pairs=32 --config.model.width=32 --config.model.heads=1 \
        --config.model.memory_options.deltaformer.read_kernel=relu --workdir=runs/mqar_b
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="mqar")
    config.task.update(length=64, pairs=4, vocab_size=8192, power=0.01)
    config.model.memory = "deltaformer"
    config.model.depth = 2
    config.model.width = 128
    config.model.heads = 2
    config.model.memory_options = {
        "deltaformer": {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
        "softmax_attention": {"rotary": True},
    }
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 2000
    config.train.batch_size = 64
    config.train.stop_accuracy = 0.99
    return config
