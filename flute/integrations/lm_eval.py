r"""Zero-shot tasks through lm-eval, with questions from local files or lm-eval's own tasks.

    --tasks  ->  TaskList: local questions (.jsonl), names in lm-eval's registry, folders of YAML
             ->  lm_eval.simple_evaluate(HFLM(model), ...)  ->  {task: {"acc": ..., ...}}

A local file is one JSON object per line, of one of two kinds, as in MosaicML's evaluation sets:

    {"query": text, "choices": [text, ...], "gold": index}             which choice follows
    {"context_options": [text, ...], "continuation": text, "gold": index}  which context fits

A query that ends in a "Question: ..." is asked with "\nAnswer:" after it. lm-eval is imported only
when tasks are run; local files need neither network nor its task library.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flute.errors import UnsupportedProblemError
from flute.evaluate import EvaluationError, context_of

METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity", "perplexity")
"""Metrics in order of interest; a task's first is the one shown in tables and plots."""
_BATCH_SIZE = 8
_BOOTSTRAP_ITERATIONS = 1000
"""For standard errors of metrics other than means; 0 would leave out those of means too."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question: the model picks the likeliest (context, continuation).

    Args:
        contexts: one text per choice, or a single one for all.
        continuations: one text per choice, or a single one for all.
        gold: index of the right choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskList:
    """What is to be asked.

    Args:
        local: task name -> its questions.
        names: tasks that lm-eval knows, or finds in ``folders``.
        folders: with lm-eval's YAML files.
    """

    local: dict[str, list[Question]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()


def check_installed() -> None:
    """Check that lm-eval is there, before the work whose last step needs it.

    Raises:
        UnsupportedProblemError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedProblemError(
            "Zero-shot tasks need lm-eval: `pip install lm-eval`. Or leave `--tasks` out."
        )


def find_tasks(sources: Sequence[str], limit: int | None = None) -> TaskList:
    """Read what ``--tasks`` names.

    Args:
        sources: .jsonl files, folders of .jsonl or .yaml files, or names of lm-eval's tasks
            (several may stand in one string, separated by commas).
        limit: questions per local file, the first ones.

    Raises:
        EvaluationError: a path that is not there, a folder without tasks, or a line that is no
            question; the message names file and line.
    """
    local: dict[str, list[Question]] = {}
    names: list[str] = []
    folders: list[Path] = []
    for source in (part for text in sources for part in text.split(",") if part):
        path = Path(source)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
        recipes = sorted((*path.glob("*.yaml"), *path.glob("*.yml"))) if path.is_dir() else []
        if path.is_file():
            files = [path]
        elif path.is_dir() and not files and not recipes:
            raise EvaluationError(f"`{source}` holds no tasks: expected .jsonl or .yaml files.")
        elif not path.is_dir() and (path.suffix or len(path.parts) > 1):
            raise EvaluationError(
                f"`{source}` is no task file; expected a .jsonl file or a folder."
            )
        elif not path.is_dir():
            names.append(source)
        for file in files:
            local[file.stem] = read_questions(file, limit)
        if recipes:
            folders.append(path)
            found = (re.search(r"^task:\s*['\"]?([\w.-]+)", r.read_text(), re.M) for r in recipes)
            names += [match[1] for match in found if match]
    if not local and not names:
        raise EvaluationError("`--tasks` names no task; expected files, a folder, or names.")
    return TaskList(local, tuple(dict.fromkeys(names)), tuple(folders))


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read a .jsonl file of questions.

    Args:
        path: the file; empty lines are passed over.
        limit: read the first so many questions only.

    Raises:
        EvaluationError: no UTF-8, no JSON, no question, or a file without any.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"`{path}` cannot be read as UTF-8 text: {error}") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(questions) >= limit:
            break
        if line.strip():
            questions.append(_read_question(line, f"`{path}`, line {number}"))
    if not questions:
        raise EvaluationError(f"`{path}` holds no questions.")
    return questions


def _read_question(line: str, where: str) -> Question:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{where} is no JSON object.")
    keys = ("query", "choices") if "choices" in content else ("continuation", "context_options")
    prompt, options = (content.get(key) for key in keys)
    texts = options if isinstance(options, list) else []
    if not isinstance(prompt, str) or len(texts) < 2 or not all(map(_is_text, texts)):
        raise EvaluationError(
            f'{where} has the keys {sorted(content)}; expected "query", "choices" (two texts or '
            'more) and "gold", or "context_options" (texts), "continuation" and "gold".'
        )
    gold = content.get("gold")
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise EvaluationError(f'{where}: "gold" is {gold!r}; expected 0 .. {len(texts) - 1}.')
    if "choices" not in content:
        return Question(tuple(texts), (prompt,), gold)
    prompt = prompt.rstrip()
    if "Question:" in prompt.rpartition("\n")[2]:
        prompt += "\nAnswer:"
    return Question((prompt,), tuple(texts), gold)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def run_tasks(
    model: Any, tokenizer: Any, tasks: TaskList, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Ask a model all questions, without examples (zero-shot).

    Args:
        model: a transformers causal language model, dense or quantised, on any device.
        tokenizer: its tokenizer.
        tasks: from `find_tasks`.
        limit: questions per task of lm-eval's own.

    Returns:
        Task -> {metric: value, metric + "_error": standard error, "samples": count}.

    Raises:
        UnsupportedProblemError: lm-eval is missing.
        EvaluationError: lm-eval does not know a task or cannot load its data.
    """
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    context = context_of(model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of every default it takes
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=_BATCH_SIZE, max_length=context
    )
    manager = TaskManager(
        include_path=[str(folder) for folder in tasks.folders] or None,
        include_defaults=bool(tasks.names),
    )
    asked = [*map(_task_config, tasks.local.items()), *tasks.names]
    try:
        report = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=asked,
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            task_manager=manager,
            log_samples=False,
        )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise EvaluationError(
            f"lm-eval could not run {', '.join((*tasks.local, *tasks.names))}: {error}"
        ) from error
    return parse_results(report)


def _task_config(item: tuple[str, list[Question]]) -> dict[str, Any]:
    """Return lm-eval's description of a local task; the data is handed over in memory."""
    name, questions = item

    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        rows = [vars(question) | {"contexts": list(question.contexts)} for question in questions]
        rows = [row | {"continuations": list(row["continuations"])} for row in rows]
        return DatasetDict({"test": Dataset.from_list(rows)})

    by_context = len(questions[0].contexts) > 1
    if any((len(question.contexts) > 1) != by_context for question in questions):
        raise EvaluationError(f"Task `{name}` mixes questions of both kinds; split the file.")
    metrics = ["acc"] if by_context else ["acc", "acc_norm"]
    return {
        "task": name,
        "custom_dataset": load,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": _gold if by_context else _context,
        "doc_to_choice": "contexts" if by_context else "continuations",
        "doc_to_target": _continuation if by_context else _gold,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
    }


def _gold(row: dict[str, Any]) -> int:
    return int(row["gold"])


def _context(row: dict[str, Any]) -> str:
    return str(row["contexts"][0])


def _continuation(row: dict[str, Any]) -> str:
    return str(row["continuations"][0])


def parse_results(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task from what `lm_eval.simple_evaluate` returned.

    Args:
        report: has "results": task -> {"metric,filter": value, "metric_stderr,filter": value or
            "N/A"}, and "n-samples": task -> {"effective": count}.

    Returns:
        Task -> {metric: value, metric + "_error": standard error where there is one, "samples"}.

    Raises:
        EvaluationError: a task without a figure, or with NaN.
    """
    tasks: dict[str, dict[str, float]] = {}
    for task, values in report["results"].items():
        found: dict[str, float] = {}
        for key, value in values.items():
            metric, _, _ = key.partition(",")
            if "," in key and isinstance(value, int | float):
                found.setdefault(metric.replace("_stderr", "_error"), float(value))
        broken = sorted(metric for metric, value in found.items() if math.isnan(value))
        if not found or broken:
            what = f"NaN for {', '.join(broken)}" if broken else "no figures"
            raise EvaluationError(f"lm-eval reports {what} of task `{task}`.")
        counts = report.get("n-samples", {}).get(task, {})
        tasks[task] = found | ({"samples": counts["effective"]} if "effective" in counts else {})
    return tasks


def main_metric(values: dict[str, float]) -> str:
    """Return which metric of a task stands for it: the first known one, else the first."""
    return next((metric for metric in METRICS if metric in values), next(iter(values)))
