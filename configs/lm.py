"""Language model on one's own text, from a token store; bits per byte of held-out documents.

    python -m memformer.data tokenize books/ --out=runs/books.tokens
    python train.py --config=configs/lm.py --workdir=runs/lm --config.data.path=runs/books.tokens

With a tokenizer of the corpus instead of bytes:

    python -m memformer.data train_tokenizer books/ --out=runs/books.tokenizer --vocab_size=8000
    python -m memformer.data tokenize books/ --out=runs/books8k.tokens --tokenizer=runs/books.tokenizer

Two corpora, the first twice as often:

    python train.py --config=configs/lm.py --workdir=runs/mixed --config.data.path=runs/a,runs/b \
        --config.data.weights=(2.0,1.0)

Whole documents in each example instead of windows over the stream, as for prompts with completions:

    python train.py --config=configs/lm.py --workdir=runs/chat --config.data.path=runs/chat.tokens \
        --config.data.packing=best_fit

The optimizer shows warm-up-stable-decay, a moving average of the parameters, and two micro-batches per step.
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="lm")
    config.task.length = 512
    config.model.memory = "gated_delta_rule"
    config.model.depth = 4
    config.model.width = 256
    config.model.heads = 4
    config.model.memory_options = {
        "gated_delta_rule": {"conv_width": 4},
        "softmax_attention": {"rotary": True},
        "deltaformer": {"write_kernel": "softmax", "read_kernel": "softmax"},
    }
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "warmup_stable_decay"
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.95
    config.optimizer.ema = 0.999
    config.train.steps = 2000
    config.train.batch_size = 32
    config.train.accumulate = 2
    config.train.eval_every = 250
    config.train.eval_batches = 16
    return config
