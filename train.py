"""Trains a model: python train.py --config=configs/swap.py --config.model.memory=delta_rule --workdir=runs/x"""

from absl import flags

from memformer.training.flags import define_config, define_processes, report_errors, run_command

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", "", "The run's folder; by default runs/<task>-<memory>.")
PROCESSES = define_processes()
DRYRUN = flags.DEFINE_string(
    "dryrun",
    "",
    "Report whether the run fits and how fast it can be, and exit: here (these devices), or on others such as v5p-128, "
    "v6e:8x8, tpu7x:2x2x1, h200:8, which need not be present.",
)
SEARCH = flags.DEFINE_bool(
    "dryrun_search", False, "With --dryrun: search the mesh, batch and remat that fit, and print the three best."
)
FULL = flags.DEFINE_bool(
    "dryrun_full",
    False,
    "With --dryrun for TPUs: compile to the end, the kernels included. Takes minutes; the figures do without.",
)
TASK_MODULE = flags.DEFINE_string(
    "task_module", "", "A Python module that registers tasks of your own, such as my_package.tasks."
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    with report_errors():
        from memformer.training.distributed import join_processes
        from memformer.training.loop import train

        if DRYRUN.value:
            from memformer.training.plan import show_dry_run, show_search

            if SEARCH.value:
                show_search(CONFIG.value, DRYRUN.value)
            else:
                show_dry_run(CONFIG.value, DRYRUN.value, full=FULL.value)
            return
        with join_processes(**PROCESSES()):
            train(CONFIG.value, WORKDIR.value)


def run() -> None:
    """Runs the command."""
    run_command(main)


if __name__ == "__main__":
    run()
