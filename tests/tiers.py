"""The order of the whole suite, and its fast tier.

`pytest -m fast` takes under two minutes on two cores and runs at least one test of every room of the library.
"""

import re

# Files or folders of tests, and a pattern of the functions that are fast ("" takes all).
FAST = {
    "core": "",
    "ops/test_ops.py": "test_(packed_against|padding|odd_lengths|two_calls|which_impl|bad_input)",
    "ops/test_context.py": "test_(where|refusals)",
    "ops/test_addressing.py": "test_(reading|shifts|all_heads)",
    "ops/test_associative.py": "test_(segments|features)",
    "ops/test_softmax_attention.py": "test_(huge|errors)",
    "ops/test_deltaformer.py": "test_(linear_kernels|errors)",
    "ops/test_recurrent_cells.py": "test_(equations|errors)",
    "pallas/test_platform.py": "test_(choice|an_interpreter)",
    "pallas/test_tpu.py": "test_(packed_against|tuning|what_is_saved)",
    "pallas/test_tpu_attention.py": "test_tuning",
    "pallas/test_gpu.py": "test_(packed_against|refusals|other_gpus)",
    "layers/test_basic.py": "test_(norms|constrain|positions|rotary|feedforward|decays|sigmoid)",
    "layers/test_memory.py": "test_(the_whole|every|kernels|user_errors|wrong)",
    "layers/test_lora.py": "test_(user_errors|dtypes)",
    "layers/test_options.py": "test_(user_errors|places|sizes)",
    "layers/test_table.py": "",
    "models/test_language_model.py": "test_(features|an_id|parameters|presets|model_keys|a_preset|configs|user)",
    "models/test_generate.py": "test_(equal_shapes|a_stopped|sample_follows|user_errors)",
    "models/test_generate_text.py": "test_(pieces|random|a_character|stop|the_end|user_errors|segments|the_size)",
    "models/test_export.py": "test_user_errors",
    "models/test_beam.py": "test_(enough_beams|one_beam|user_errors)",
    "models/test_transformer.py": "test_(visible_memory|user_errors)",
    "models/test_seq2seq.py": "test_user_errors",
    "models/test_encoder.py": "test_(features|user_errors)",
    "models/test_ntm.py": "test_(user_errors|inputs)",
    "data": "(?!test_a_job_that_is_killed)",
    "pretrained/test_folder.py": "test_(configs|models_that)",
    "pretrained/test_fla.py": "test_configs",
    "tasks": "(?!test_(answers_are|gaps_follow|the_optimal|held_out_sentences|rewritten_keys))",
    "training/test_dryrun.py": "test_(accelerator|devices_that|changes|nothing|search)",
    "training/test_config.py": "(?!test_flags_that_cannot_be)",
    "training/test_checkpoint.py": "test_(restores|keeps|refuses|no_checkpoint|options)",
    "training/test_input.py": "(?!test_worker)",
    "training/test_losses.py": "",
    "training/test_program.py": "",
    "training/test_optimizer.py": "test_(schedule|unknown|clipping|moving|rate_factors)",
    "training/test_sharding.py": "(?!test_(eight_devices|time_over|explicit|tokens_between))",
    "training/test_step.py": "test_(a_step|micro|defaults)",
    "training/test_loop.py": "test_(early_stop|folder_that|flops)",
    "lab/test_study.py": "(?!test_the_command)",
    "lab/test_runs.py": "test_(the_last|an_unknown)",
    "lab/test_hierarchy.py": "",
    "lab/test_capacity.py": "test_(the_latest|theory)",
    "evals": "test_(user_errors|a_missing_package)",
    "test_configs.py": "",
    "test_distribution.py": "test_the_metadata",
    "test_docstrings.py": "(?!test_examples_run)",
    "test_faces.py": "",
    "test_imports.py": "",
    "test_launch.py": "(?!test_models)",
    "test_readme.py": "(?!test_(training_command|notebook))",
    "test_site.py": "test_(names|the_start)",
    "test_style.py": "(?!test_types)",
    "test_tiers.py": "",
    "test_tune.py": "",
}

# Rows of the parametrized suites that are fast; a test without such a parameter counts whole.
FAST_ROWS = {"delta_rule_head_decay", "delta_rule_grouped", "gated_delta_rule", "softmax_attention"}
SUITES = ("ops/test_ops.py", "layers/test_memory.py", "pallas/test_tpu.py", "pallas/test_gpu.py")

# The files that take about ten seconds or more on a quiet machine, longest first: one that starts late would leave
# the other workers idle.
LONGEST = (
    "ops/test_ops.py",
    "pallas/test_tpu_attention.py",
    "pallas/test_tpu.py",
    # with the TPU's compiler
    "pallas/test_tpu_compile.py",
    "lab/test_trained.py",
    "test_style.py",
    "ops/test_context.py",
    "test_docstrings.py",
    "training/test_processes.py",
    "layers/test_memory.py",
    "training/test_loop.py",
    "ops/test_derivatives.py",
    "models/test_transformer.py",
    "training/test_sharding.py",
    "models/test_language_model.py",
    "lab/test_captions.py",
    "ops/test_matrix_memories.py",
    "pallas/test_tpu_channel.py",
    "pallas/test_tpu_decoding.py",
    "models/test_sharding.py",
    "models/test_export.py",
    "ops/test_document_caches.py",
    "lab/test_translation.py",
    "models/test_generate_text.py",
    "models/test_segment_memory.py",
    "training/test_optimizer.py",
    "lab/test_language.py",
    "training/test_checkpoint.py",
    "lab/test_context.py",
    "training/test_crash.py",
    "training/test_generation.py",
    "lab/test_path.py",
    "ops/test_meshes.py",
    "training/test_url.py",
    "layers/test_sharding.py",
    "ops/test_cached_ops.py",
    "models/test_captioner.py",
    "models/test_ntm.py",
    "test_readme.py",
    "training/test_dryrun.py",
    "pallas/test_gpu_attention.py",
)


def is_fast(path: str, function: str, row: str = "") -> bool:
    """Whether a test is in the fast tier.

    Args:
      path: its file, relative to tests/.
      function: its name, without parameters.
      row: the row of a shared suite that it runs, if it runs one.
    """
    if path in SUITES and row and row not in FAST_ROWS:
        return False
    return any((path == place or path.startswith(place + "/")) and re.match(FAST[place], function) for place in FAST)
