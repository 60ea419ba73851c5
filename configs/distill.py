"""Recall by a student made of a teacher with softmax attention, and by the same memory from random weights.

    python train.py --config=configs/distill.py --workdir=runs/distill_teacher
    python train.py --config=configs/distill.py --config.distill.teacher=runs/distill_teacher --config.train.steps=400 \
        --workdir=runs/distill_student
    python train.py --config=configs/distill.py --config.model.memory=gated_delta_rule --config.train.steps=400 \
        --workdir=runs/distill_scratch

Three minutes of CPU time in all; `python -m memformer.lab distill` with the three folders compares them. Other seeds:
--config.seed=1 and folders ..._seed1. Seeds 0, 1, 2: the teacher stops at 99.9% after 320, 510, 440 steps, the student
ends at 98.8%, 98.3%, 99.2% after 400 steps (97.2%, 96.6%, 97.9% after 200).
"""

from memformer.training.config import default_config


def get_config():
    """Returns the run's config."""
    config = default_config(task="mqar")
    config.task.update(length=64, pairs=8, vocab_size=128, power=0.01)
    config.model.memory = "softmax_attention"
    config.model.depth = 2
    config.model.width = 64
    config.model.heads = 2
    # the options that a student takes over from this teacher, so that both start from the same layers
    student = {"conv_width": 0, "output_gate": None, "rotary": True}
    config.model.memory_options = {"softmax_attention": {"rotary": True}, "gated_delta_rule": student}
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 3000
    config.train.batch_size = 64
    config.train.eval_every = 0
    config.train.checkpoint_every = 0
    config.train.stop_accuracy = 0.999
    return config
