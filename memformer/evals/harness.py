"""Adapter for the language-model evaluation harness, the package lm-eval of the extra `evals`."""

import importlib
import json
import os
from collections.abc import Sequence
from typing import Any

from memformer.evals.scoring import TextScorer

__all__ = ["harness_model", "run_harness"]


def harness_model(scorer: TextScorer) -> Any:
    """Makes the model that `lm_eval.simple_evaluate` takes, with its three requests.

    loglikelihood, loglikelihood_rolling and generate_until are the methods of `scorer` of these names.

    Args:
      scorer: a model with its tokenizer.

    Returns:
      An instance of `lm_eval.api.model.LM`.

    Raises:
      ImportError: the package lm-eval is not installed.
    """
    base: Any = _import("lm_eval.api.model").LM
    tokenizer: Any = scorer.tokenizer

    class HarnessModel(base):
        tokenizer_name = tokenizer.fingerprint

        def loglikelihood(self, requests, disable_tqdm=False):
            return self._answer("loglikelihood", requests, scorer.loglikelihood)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return self._answer(
                "loglikelihood_rolling", requests, lambda all_: scorer.loglikelihood_rolling([text for (text,) in all_])
            )

        def generate_until(self, requests, disable_tqdm=False):
            return self._answer("generate_until", requests, scorer.generate_until)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template=False):
            return getattr(tokenizer, "chat_template", None) or ""

        def _answer(self, kind, requests, answer):
            results = answer([request.args for request in requests])
            for request, result in zip(requests, results, strict=True):
                self.cache_hook.add_partial(kind, request.args, result)
            return results

    return HarnessModel()


def run_harness(scorer: TextScorer, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """Evaluates a model on tasks of the harness.

    Args:
      scorer: a model with its tokenizer.
      tasks: YAML files of one's own tasks, or names of tasks that the harness knows (their data must be there:
        nothing is downloaded by this library).
      **options: of `lm_eval.simple_evaluate`, such as num_fewshot and limit.

    Returns:
      The results as the harness gives them: "results" has the metrics by task.

    Raises:
      ValueError: a file that is no task, or an unknown task.
      ImportError: the package lm-eval is not installed.
    """
    manager = _import("lm_eval.tasks").TaskManager()
    chosen = [_read_task(task) if task.endswith((".yaml", ".yml")) else task for task in tasks]
    unknown = [task for task in chosen if isinstance(task, str) and task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks must be YAML files or names that the harness knows, got {', '.join(unknown)}")
    model = harness_model(scorer)
    # the confidence intervals are resampled a hundred thousand times otherwise
    options = {"bootstrap_iters": 1000, **options}
    found = _import("lm_eval").simple_evaluate(model=model, tasks=chosen, task_manager=manager, **options)
    return json.loads(json.dumps(found, default=str))


def _read_task(path: str) -> dict[str, Any]:
    """The task of a YAML file; relative data files are taken from its folder."""
    if not os.path.isfile(path):
        raise ValueError(f"tasks must be YAML files or names that the harness knows; there is no file {path}")
    task = _import("lm_eval.tasks._yaml_loader").load_yaml(path)
    if not isinstance(task, dict) or "task" not in task:
        raise ValueError(f"{path} must be a task of the harness, with the key 'task'")
    arguments = task.get("dataset_kwargs") or {}
    if "data_files" in arguments:
        folder = os.path.dirname(os.path.abspath(path))
        task["dataset_kwargs"] = {**arguments, "data_files": _join(folder, arguments["data_files"])}
    return task


def _join(folder: str, files: Any) -> Any:
    if isinstance(files, dict):
        return {key: _join(folder, value) for key, value in files.items()}
    return [_join(folder, each) for each in files] if isinstance(files, list) else os.path.join(folder, files)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the evaluation harness is needed here and cannot be imported ({error}): pip install "
            "'memformer-jax[evals]', or pip install lm-eval"
        ) from error
