"""Models built from memories, and how they are configured, sampled from and searched."""

from memformer.models.beam import beam_search, decode, length_divisor, repeat_rows
from memformer.models.bert import embed_sentences, load_bert, minilm_folder, read_safetensors
from memformer.models.build import MODELS, build_config, build_model, default_options, model_keys
from memformer.models.captioner import Captioner, CaptionerConfig, doubly_stochastic
from memformer.models.config import POSITIONS, REMAT, LanguageModelConfig, check_input
from memformer.models.encoder import Encoder, EncoderConfig, mean_pool
from memformer.models.export import PLATFORMS, export_model
from memformer.models.generate import TokenStream, bucket_length, generate, pad_prompts
from memformer.models.generate_text import GeneratedText, TextPiece, TextStream, generate_text, start_id
from memformer.models.language_model import Block, MemoryLM, ModelOutput, check_sizes, take_places
from memformer.models.ntm import NTM, NTMConfig, NTMState, NTMTrace
from memformer.models.picture import ConvGrid, PatchGrid, add_places
from memformer.models.presets import PRESETS, from_preset, preset_fields
from memformer.models.recurrent import RecurrentConfig, RecurrentLM
from memformer.models.sampling import Sampling, sample
from memformer.models.segment_memory import ARMTConfig, AssociativeLayer, RMTConfig, SegmentMemory
from memformer.models.seq2seq import Seq2Seq, Seq2SeqConfig
from memformer.models.serve import ServedModel
from memformer.models.stacks import TransformerDecoder, TransformerEncoder
from memformer.models.transformer import Transformer, TransformerConfig

__all__ = [
    "ARMTConfig",
    "AssociativeLayer",
    "Block",
    "Captioner",
    "CaptionerConfig",
    "ConvGrid",
    "Encoder",
    "EncoderConfig",
    "GeneratedText",
    "LanguageModelConfig",
    "MODELS",
    "MemoryLM",
    "ModelOutput",
    "NTM",
    "NTMConfig",
    "NTMState",
    "NTMTrace",
    "PLATFORMS",
    "POSITIONS",
    "PRESETS",
    "PatchGrid",
    "REMAT",
    "RMTConfig",
    "RecurrentConfig",
    "RecurrentLM",
    "Sampling",
    "SegmentMemory",
    "Seq2Seq",
    "Seq2SeqConfig",
    "ServedModel",
    "TextPiece",
    "TextStream",
    "TokenStream",
    "Transformer",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerEncoder",
    "add_places",
    "beam_search",
    "bucket_length",
    "build_config",
    "build_model",
    "check_input",
    "check_sizes",
    "decode",
    "default_options",
    "doubly_stochastic",
    "embed_sentences",
    "export_model",
    "from_preset",
    "generate",
    "generate_text",
    "length_divisor",
    "load_bert",
    "mean_pool",
    "minilm_folder",
    "model_keys",
    "pad_prompts",
    "preset_fields",
    "read_safetensors",
    "repeat_rows",
    "sample",
    "start_id",
    "take_places",
]
