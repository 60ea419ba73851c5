"""Continues prompts with text: python generate.py --workdir=runs/lm --prompt="Once upon a time" --temperature=0.8"""

from absl import flags

from memformer.training.flags import report_errors, run_command

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a run on text (configs lm and text).")
PRETRAINED = flags.DEFINE_string("pretrained", "", "Folder of a pretrained model, instead of --workdir.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest whole one.")
SET = flags.DEFINE_multi_string("set", [], "A change to the run's config, such as mesh.tensor=2; may be repeated.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be repeated.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", "", "A text file with one prompt per line, or .jsonl with 'prompt'.")
CHAT = flags.DEFINE_bool("chat", False, "Prompts are messages of a user, for a model with a chat template.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Most new tokens per prompt.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 takes the most probable token.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample from the k most probable tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample from the most probable tokens that reach this probability together.")
MIN_P = flags.DEFINE_float("min_p", None, "Sample from tokens at least so many times as probable as the first.")
REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: earlier tokens are less probable.")
STOP = flags.DEFINE_multi_string("stop", [], "A string that ends a text; may be repeated.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
TASK_MODULE = flags.DEFINE_string("task_module", "", "A module that registers the task; by default that of the run.")
OUT = flags.DEFINE_string("out", "", "JSON-lines file to write: prompt, text, and why it ended.")


def main(_: list[str]) -> None:
    with report_errors():
        from memformer.training.generation import show_text

        show_text(
            PROMPT.value,
            workdir=WORKDIR.value,
            pretrained=PRETRAINED.value,
            prompt_file=PROMPT_FILE.value,
            step=STEP.value,
            settings=SET.value,
            chat=CHAT.value,
            out=OUT.value,
            max_new_tokens=MAX_NEW_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            min_p=MIN_P.value,
            repetition_penalty=REPETITION_PENALTY.value,
            stop=STOP.value,
            seed=SEED.value,
        )


def run() -> None:
    """Runs the command."""
    run_command(main)


if __name__ == "__main__":
    run()
