"""Pretrained models in and out, in the Hugging Face format.

    model, tokenizer, config = load_pretrained(folder)
    save_pretrained(model, other_folder, config=config)

`ARCHITECTURES` lists the models that are known, `plan_loading` says what a load reads and holds.
"""

from memformer.pretrained.convert import convert_config, convert_memory, convert_parameters, converted_layers
from memformer.pretrained.distill import (
    Distillation,
    Student,
    TeacherWeight,
    logit_divergence,
    output_error,
)
from memformer.pretrained.folder import open_tensors, read_config, read_index
from memformer.pretrained.load import (
    LoadingPlan,
    load_pretrained,
    plan_loading,
    read_model_config,
    read_parameters,
)
from memformer.pretrained.save import export_tensors, match_architecture, save_pretrained
from memformer.pretrained.table import ARCHITECTURES, Architecture, find_architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Distillation",
    "LoadingPlan",
    "Student",
    "TeacherWeight",
    "convert_config",
    "convert_memory",
    "convert_parameters",
    "converted_layers",
    "export_tensors",
    "find_architecture",
    "load_pretrained",
    "logit_divergence",
    "match_architecture",
    "open_tensors",
    "output_error",
    "plan_loading",
    "read_config",
    "read_index",
    "read_model_config",
    "read_parameters",
    "save_pretrained",
]
