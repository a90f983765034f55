"""Perplexity: the protocol, against a computation written out here; texts; bad input."""

from __future__ import annotations

import lzma
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, tiny_model
from transformers import AutoTokenizer

from flute.evaluate import (
    TEXTS,
    EvaluationError,
    Perplexity,
    default_window,
    perplexity,
    read_text,
    relative_error,
    to_windows,
)


def test_loss_is_the_mean_negative_log_probability_of_each_token_but_a_windows_first():
    model = tiny_model(dtype=torch.float32)
    windows = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = []
    for row in windows:
        total = 0.0
        for t in range(1, 17):
            with torch.no_grad():
                logits = model(input_ids=row[None, :t]).logits[0, -1].double()
            total -= float(logits[row[t]] - logits.logsumexp(0))
        expected.append(total / 16)
    result = perplexity(model, windows)
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.num_tokens == 48
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)


def test_batches_do_not_change_the_result(monkeypatch):
    model = tiny_model(dtype=torch.float32)
    windows = torch.randint(0, 96, (7, 16), generator=torch.Generator().manual_seed(1))
    whole = perplexity(model, windows).losses
    monkeypatch.setattr("flute.evaluate._TOKENS_PER_BATCH", 32)
    counted = []
    parts = perplexity(model, windows, counted.append).losses
    assert torch.allclose(whole, parts, rtol=1e-6)
    assert counted == [32, 32, 32, 16]


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    ids = torch.arange(25)
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=ids[None])  # noqa: E731
    windows = to_windows("any", tokenizer, 10)
    assert windows.tolist() == [list(range(10)), list(range(10, 20))]
    assert to_windows("any", tokenizer, 5, max_tokens=12).tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]


def test_excess_is_paired_by_window_with_its_standard_error():
    reference = Perplexity(torch.tensor([1.0, 2.0, 3.0]).double(), 8, 0.0)
    other = Perplexity(torch.tensor([1.5, 2.5, 3.8]).double(), 8, 0.0)
    mean, error = other.excess(reference)
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(torch.tensor([0.5, 0.5, 0.8]).std().item() / math.sqrt(3))
    with pytest.raises(EvaluationError, match="2 windows of 8 tokens cannot be paired with 3"):
        Perplexity(torch.ones(2), 8, 0.0).excess(reference)


@pytest.mark.parametrize("name", TEXTS)
def test_shipped_texts_are_plain_english_of_some_length(name):
    text = read_text(name)
    assert len(text) > 200_000
    assert text.count(" the ") > 1000
    assert " @-@ " not in text


def test_the_demo_model_reads_english_far_better_than_shuffled_words():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    words = read_text("wikitext2").split(" ")[:3000]
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0)).tolist()
    plain = perplexity(model, to_windows(" ".join(words), tokenizer, 256, 2048)).perplexity
    shuffled = " ".join(words[i] for i in order)
    mixed = perplexity(model, to_windows(shuffled, tokenizer, 256, 2048)).perplexity
    assert 20 < plain < 70
    assert mixed > 5 * plain


def test_texts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("naïve text")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("naïve text".encode()))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.xz") == "naïve text"
    with pytest.raises(EvaluationError, match="cannot be read as UTF-8"):
        read_text(tmp_path / "bad.txt")
    with pytest.raises(
        EvaluationError, match=r"no text file; expected a path or one of .*wikitext2"
    ):
        read_text(tmp_path / "missing.txt")


def test_bad_windows_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with pytest.raises(EvaluationError, match="`window` is 1; expected at least 2"):
        to_windows("text", tokenizer, 1)
    with pytest.raises(EvaluationError, match="The text has 2 tokens; a window takes 64"):
        to_windows("the king", tokenizer, 64)
    with pytest.raises(EvaluationError, match="2 tokens, of which `--max-tokens` takes 1;"):
        to_windows("the king", tokenizer, 2, max_tokens=1)
    with pytest.raises(EvaluationError, match="The text has 0 tokens"):
        to_windows("", tokenizer, 64)
    model = tiny_model()
    with pytest.raises(EvaluationError, match="`window` is 65; the model's context is 64"):
        perplexity(model, torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(EvaluationError, match="gives id 96; the model knows 96 tokens"):
        perplexity(model, torch.full((1, 8), 96))
    assert default_window(model) == 64


def test_a_broken_model_is_not_given_a_perplexity():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="loss is NaN or Inf"):
        perplexity(model, torch.zeros(1, 8, dtype=torch.long))


def test_relative_error_is_squared_and_relative():
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])) == pytest.approx(
        0.04
    )
    with pytest.raises(ValueError, match=r"has shape \(1, 3\); the dense weight \(1, 2\)"):
        relative_error(torch.ones(1, 2), torch.ones(1, 3))
