"""Words over a group (arXiv 2404.08819): label each letter with the running product; train at length 32, test to 500.

    python train.py --config=configs/group_words.py --workdir=runs/s3

Expected: 3 minutes on two shared cores, stops at step 560, held-out accuracy at length 32 100.0% of letters and 99.6%
of whole words.

S3, S4 and A5 need two delta steps per token, S5 four (arXiv 2502.10297), S5 restricted to swaps one:

    python train.py --config=configs/group_words.py --config.task.group=S5 \
        --config.model.memory_options.delta_product.steps=4 --workdir=runs/s5
    python train.py --config=configs/group_words.py --config.task.group=S5_swaps \
        --config.model.memory=delta_rule --workdir=runs/s5_swaps
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="group_words")
    config.task.update(length=32, group="S3")
    config.model.memory = "delta_product"
    config.model.depth = 1
    config.model.width = 128
    config.model.heads = 8
    config.model.memory_options = {
        "delta_product": {"steps": 2, "beta_limit": 2.0},
        "delta_rule": {"beta_limit": 2.0},
        "gated_delta_rule": {"beta_limit": 2.0},
        "deltaformer": {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
    }
    config.model.feedforward = "mlp"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "exponential"
    config.optimizer.warmup_steps = 50
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.stop_accuracy = 0.999
    config.train.final_lengths = (32, 64, 128, 256, 500)
    return config
