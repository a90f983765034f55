"""Zero-shot tasks: reading questions, lm-eval's report; lm-eval itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, tiny_model

from flute.errors import UnsupportedProblemError
from flute.evaluate import EvaluationError
from flute.integrations.lm_eval import (
    Question,
    check_installed,
    find_tasks,
    main_metric,
    parse_results,
    read_questions,
    run_tasks,
)

CHOICE = {"query": "The opposite of hot is", "choices": ["cold", "warm"], "gold": 0}
CONTEXT = {"context_options": ["Ice", "Fire"], "continuation": "is cold.", "gold": 0}
REPORT = {
    "results": {
        "piqa": {
            "alias": "piqa",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 0.6,
            "acc_norm_stderr,none": "N/A",
        },
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 20.5},
    },
    "n-samples": {"piqa": {"original": 100, "effective": 26}},
}


def write(path, *questions):
    path.write_text("\n".join(json.dumps(question) for question in questions))
    return path


def test_questions_of_both_kinds_are_read(tmp_path):
    asked = {"query": "Passage: x.\nQuestion: is it?\n", "choices": ["no", "yes"], "gold": 1}
    path = write(tmp_path / "t.jsonl", CHOICE, CONTEXT, asked)
    assert read_questions(path) == [
        Question(("The opposite of hot is",), ("cold", "warm"), 0),
        Question(("Ice", "Fire"), ("is cold.",), 0),
        Question(("Passage: x.\nQuestion: is it?\nAnswer:",), ("no", "yes"), 1),
    ]
    assert len(read_questions(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "`.*bad.jsonl`, line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"query": "x"}', r"line 2 has the keys \['query'\]; expected \"query\", \"choices\""),
        (json.dumps({**CHOICE, "choices": ["one"]}), "two texts or more"),
        (json.dumps({**CHOICE, "choices": ["one", 2]}), "two texts or more"),
        (json.dumps({**CHOICE, "gold": 2}), r'line 2: "gold" is 2; expected 0 \.\. 1'),
        (json.dumps({**CHOICE, "gold": True}), '"gold" is True'),
        (json.dumps({**CONTEXT, "continuation": None}), "line 2 has the keys"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(CHOICE)}\n{line}\n")
    with pytest.raises(EvaluationError, match=message):
        read_questions(path)


def test_tasks_come_from_files_folders_and_names(tmp_path):
    write(tmp_path / "a.jsonl", CHOICE)
    write(tmp_path / "b.jsonl", CONTEXT, CONTEXT)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "c.yaml").write_text("include: x.yaml\ntask: c_local\ntag: []\n")
    tasks = find_tasks([str(tmp_path), str(recipes), "piqa,arc_easy"], limit=1)
    assert {name: len(questions) for name, questions in tasks.local.items()} == {"a": 1, "b": 1}
    assert tasks.names == ("c_local", "piqa", "arc_easy")
    assert tasks.folders == (recipes,)
    assert list(find_tasks([str(tmp_path / "b.jsonl")]).local) == ["b"]


def test_missing_tasks_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("\n\n")
    for source, message in (
        (tmp_path / "empty", "holds no tasks: expected .jsonl or .yaml"),
        (tmp_path / "none.jsonl", "holds no questions"),
        (tmp_path / "other.jsonl", "is no task file; expected a .jsonl file or a folder"),
        (tmp_path / "no" / "folder", "is no task file"),
        (",", "names no task"),
    ):
        with pytest.raises(EvaluationError, match=message):
            find_tasks([str(source)])


def test_a_report_becomes_figures_with_standard_errors():
    figures = parse_results(REPORT)
    assert figures == {
        "piqa": {"acc": 0.5, "acc_error": 0.1, "acc_norm": 0.6, "samples": 26},
        "wikitext": {"word_perplexity": 20.5},
    }
    assert main_metric(figures["piqa"]) == "acc"
    assert main_metric({"f1": 1.0}) == "f1"


def test_nan_and_nothing_are_not_figures():
    with pytest.raises(EvaluationError, match="reports NaN for acc of task `t`"):
        parse_results({"results": {"t": {"acc,none": math.nan}}})
    with pytest.raises(EvaluationError, match="reports no figures of task `t`"):
        parse_results({"results": {"t": {"alias": "t"}}})


def test_without_lm_eval_the_message_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedProblemError, match="need lm-eval: `pip install lm-eval`"):
        check_installed()


@pytest.fixture
def fake(monkeypatch):
    """An lm-eval that remembers what it was asked and gives back `REPORT`."""
    calls = {}
    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("flute.integrations.lm_eval.check_installed", lambda: None)

    def simple_evaluate(**arguments):
        calls.update(arguments)
        if "unknown" in arguments["tasks"]:
            raise KeyError("unknown")
        return REPORT

    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = lambda **a: SimpleNamespace(**a)
    modules["lm_eval.tasks"].TaskManager = lambda **a: SimpleNamespace(**a)
    level = logging.getLogger("lm_eval").level
    yield calls
    logging.getLogger("lm_eval").setLevel(level)


def test_lm_eval_is_given_the_model_and_the_questions(fake, tmp_path):
    model = tiny_model()
    write(tmp_path / "a.jsonl", CHOICE)
    write(tmp_path / "b.jsonl", CONTEXT)
    figures = run_tasks(model, "tokenizer", find_tasks([str(tmp_path), "piqa"]), limit=5)
    assert figures == parse_results(REPORT)
    assert fake["model"].pretrained is model
    assert fake["model"].max_length == 64
    assert fake["num_fewshot"] == 0
    assert fake["limit"] == 5
    assert fake["task_manager"].include_defaults is True
    choice, context, name = fake["tasks"]
    assert name == "piqa"
    row = {"contexts": ["The opposite of hot is"], "continuations": ["cold", "warm"], "gold": 0}
    assert choice["doc_to_text"](row) == "The opposite of hot is"
    assert choice["doc_to_target"](row) == 0
    assert choice["doc_to_choice"] == "continuations"
    row = {"contexts": ["Ice", "Fire"], "continuations": ["is cold."], "gold": 1}
    assert context["doc_to_text"](row) == 1
    assert context["doc_to_target"](row) == "is cold."
    assert context["doc_to_choice"] == "contexts"
    with pytest.raises(EvaluationError, match=r"could not run unknown: .*unknown"):
        run_tasks(model, "tokenizer", find_tasks(["unknown"]))


def test_a_file_of_both_kinds_is_refused(fake, tmp_path):
    path = write(tmp_path / "mixed.jsonl", CHOICE, CONTEXT)
    with pytest.raises(EvaluationError, match="Task `mixed` mixes questions of both kinds"):
        run_tasks(tiny_model(), "tokenizer", find_tasks([str(path)]))


# ---- with the library


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Log-probability of what follows a context."""
    whole = tokenizer(f"{context} {continuation}", return_tensors="pt").input_ids
    start = tokenizer(context, return_tensors="pt").input_ids.shape[1]
    logits = model(input_ids=whole).logits[0, start - 1 : -1].float().log_softmax(-1)
    return float(logits.gather(1, whole[0, start:, None]).sum())


def test_lm_eval_scores_as_one_does_by_hand(tmp_path):
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    texts = ["he went to the", "of the king of", "in the middle of", "she did not know"]
    choices = ["house", "England and of France", "what to do", "the the the"]
    answers = [[log_likelihood(model, tokenizer, text, c) for c in choices] for text in texts]
    best = [max(range(4), key=row.__getitem__) for row in answers]
    golds = [best[0], best[1], best[2], (best[3] + 1) % 4]  # three right, one wrong
    rows = zip(texts, golds, strict=True)
    write(
        tmp_path / "choice.jsonl",
        *({"query": text, "choices": choices, "gold": gold} for text, gold in rows),
    )
    rest = "in the house."
    likely = [log_likelihood(model, tokenizer, text, rest) for text in texts]
    gold = max(range(4), key=likely.__getitem__)
    write(
        tmp_path / "context.jsonl",
        {"context_options": texts, "continuation": rest, "gold": gold},
        {"context_options": texts, "continuation": rest, "gold": (gold + 1) % 4},
    )
    figures = run_tasks(model, tokenizer, find_tasks([str(tmp_path)]))
    assert figures["choice"]["acc"] == 0.75
    assert figures["choice"]["samples"] == 4
    assert figures["choice"]["acc_error"] == pytest.approx(0.25)
    assert figures["context"]["acc"] == 0.5
