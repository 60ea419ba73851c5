"""Training: configs, sharding, input, train step, loop, checkpoints, evaluation, dry run."""

from memformer.training.build import Run, build_run, model_settings
from memformer.training.checkpoint import Checkpoints, Restored
from memformer.training.checksums import CHECKSUMS, EMPTY, JSON_ITEMS, StateHandler, damage
from memformer.training.config import (
    FREE_KEYS,
    RunError,
    add_options,
    apply_preset,
    changed_keys,
    complete_config,
    default_config,
    drop_options,
    run_errors,
    set_values,
    unknown_key,
)
from memformer.training.curriculum import Curriculum
from memformer.training.distributed import agree, join_processes
from memformer.training.dryrun import DryRun, dry_run, find_devices, lower_step, show_dry_run
from memformer.training.evaluation import LoadedRun, Scorer, evaluate_checkpoint, fits_model, load_run, parameters_of
from memformer.training.files import (
    check_folder,
    disk_errors,
    error_reason,
    free_space,
    is_url,
    replace_file,
    write_bytes,
)
from memformer.training.flags import define_config, parse_flags, read_config, report_errors
from memformer.training.folder import describe_changes, make_folder, read_run_config, schedule_steps, write_run_config
from memformer.training.guards import FiniteGuard, NotFiniteError
from memformer.training.input import Batch, Loader, batch_arrays, check_batch, check_split, make_loader
from memformer.training.lock import LOCK, run_lock
from memformer.training.loop import Trainer, train
from memformer.training.losses import SCORES, count_batch, means, smoothing_loss
from memformer.training.metrics import (
    RunLog,
    flops_per_token,
    format_table,
    log,
    memory_pattern,
    model_name,
    peak_flops,
    read_records,
)
from memformer.training.optimizer import decay_mask, make_optimizer, make_schedule, update_ema
from memformer.training.orbax_errors import SaveError, hide_orbax, save_errors, step_folders
from memformer.training.paths import abstract, describe, difference, flatten, nest
from memformer.training.plots import COLOURS, plot_learning_curve, plot_lengths
from memformer.training.profiling import Profiler
from memformer.training.remote import Mirror, copy_folder
from memformer.training.report import draw_curve, final_scores, result_table, write_report
from memformer.training.sharding import (
    AXES,
    RULES,
    global_batch,
    make_mesh,
    mesh_scope,
    partition_spec,
    state_shardings,
)
from memformer.training.signals import StopSignal
from memformer.training.step import (
    Functional,
    abstract_state,
    init_state,
    make_eval_step,
    make_functional,
    make_train_step,
)
from memformer.training.validate import OPTIMIZER_RANGES, SCHEDULES, validate

__all__ = [
    "AXES",
    "CHECKSUMS",
    "COLOURS",
    "EMPTY",
    "FREE_KEYS",
    "JSON_ITEMS",
    "LOCK",
    "OPTIMIZER_RANGES",
    "RULES",
    "SCHEDULES",
    "SCORES",
    "Batch",
    "Checkpoints",
    "Curriculum",
    "DryRun",
    "FiniteGuard",
    "Functional",
    "LoadedRun",
    "Loader",
    "Mirror",
    "NotFiniteError",
    "Profiler",
    "Restored",
    "Run",
    "RunError",
    "RunLog",
    "SaveError",
    "Scorer",
    "StateHandler",
    "StopSignal",
    "Trainer",
    "abstract",
    "abstract_state",
    "add_options",
    "agree",
    "apply_preset",
    "batch_arrays",
    "build_run",
    "changed_keys",
    "check_batch",
    "check_folder",
    "check_split",
    "complete_config",
    "copy_folder",
    "count_batch",
    "damage",
    "decay_mask",
    "default_config",
    "define_config",
    "describe",
    "describe_changes",
    "difference",
    "disk_errors",
    "draw_curve",
    "drop_options",
    "dry_run",
    "error_reason",
    "evaluate_checkpoint",
    "final_scores",
    "find_devices",
    "fits_model",
    "flatten",
    "flops_per_token",
    "format_table",
    "free_space",
    "global_batch",
    "hide_orbax",
    "init_state",
    "is_url",
    "join_processes",
    "load_run",
    "log",
    "lower_step",
    "make_eval_step",
    "make_folder",
    "make_functional",
    "make_loader",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "means",
    "memory_pattern",
    "mesh_scope",
    "model_name",
    "model_settings",
    "nest",
    "parameters_of",
    "parse_flags",
    "partition_spec",
    "peak_flops",
    "plot_learning_curve",
    "plot_lengths",
    "read_config",
    "read_records",
    "read_run_config",
    "replace_file",
    "report_errors",
    "result_table",
    "run_errors",
    "run_lock",
    "save_errors",
    "schedule_steps",
    "set_values",
    "show_dry_run",
    "smoothing_loss",
    "state_shardings",
    "step_folders",
    "train",
    "unknown_key",
    "update_ema",
    "validate",
    "write_bytes",
    "write_report",
    "write_run_config",
]
