"""Tasks of the Chomsky hierarchy (arXiv 2207.02098; DeltaFormer, NeurIPS 2025, table 5): trained on 3 to 40 tokens.

    python train.py --config=configs/hierarchy.py:even_pairs --workdir=runs/even_pairs
    python train.py --config=configs/hierarchy.py:cycle_navigation --workdir=runs/cycle_navigation
    python train.py --config=configs/hierarchy.py:bracket_arithmetic --workdir=runs/bracket_arithmetic
    python train.py --config=configs/hierarchy.py:reverse_string --workdir=runs/reverse_string
    python train.py --config=configs/hierarchy.py:stack_manipulation --workdir=runs/stack_manipulation

Tested on 40 to 256 tokens. configs/parity.py and configs/modular_arithmetic.py are the other two tasks of that table;
`python -m memformer.lab hierarchy` trains those with one answer, `python -m memformer.lab strings` those with strings
(results: docs/results.md).
"""

from memformer.training.config import default_config

VARIANTS = ("even_pairs", "cycle_navigation", "bracket_arithmetic", "reverse_string", "stack_manipulation")


def get_config(variant="even_pairs"):
    """Returns the run's config."""
    config = default_config(task=variant)
    config.task.update(length=40, min_length=3)
    if variant == "cycle_navigation":
        config.task.places = 5
    config.model.memory = "deltaformer"
    config.model.depth = 1
    config.model.width = 128
    config.model.heads = 4
    config.model.memory_options = {
        "deltaformer": {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
        "delta_rule": {"beta_limit": 2.0},
        "softmax_attention": {"rotary": True},
    }
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 3000
    config.train.batch_size = 128
    config.train.stop_accuracy = 0.999
    config.train.final_lengths = (40, 64, 128, 256)
    return config
