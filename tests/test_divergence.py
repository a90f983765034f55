"""KL divergence and agreement, against a computation written out here; broken models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import tiny_model

import flute
from flute.divergence import divergence, kl_divergence
from flute.evaluate import EvaluationError, perplexity


def windows_of(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(seed))


def noisy(model, size: float = 0.02):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return other


def test_kl_of_two_coins_is_what_one_computes_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]])
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0, math.log(2)]
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx(expected, abs=1e-7)
    assert kl_divergence(torch.zeros(1, 1), torch.zeros(1, 1)).item() == 0
    assert kl_divergence(q.log(), p.log())[2] == math.inf


def test_small_divergences_keep_their_digits_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    other = logits + 1e-3 * torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    exact = (log_p.exp() * (log_p - log_q)).sum(1)
    assert float(exact.max()) < 1e-6
    fast = kl_divergence(logits.float().log_softmax(1), other.float().log_softmax(1))
    assert torch.allclose(fast.double(), exact, rtol=0.05)


def test_divergence_is_that_of_the_distributions_position_by_position():
    reference = tiny_model(dtype=torch.float32)
    model = noisy(reference)
    windows = windows_of(3, 17)
    result = divergence(model, reference, windows)
    kl = torch.zeros(3, 16)
    agrees = torch.zeros(3, 16)
    for i, row in enumerate(windows):
        for t in range(16):
            with torch.no_grad():
                p, q = (
                    m(input_ids=row[None, : t + 1]).logits[0, -1].double().softmax(0)
                    for m in (reference, model)
                )
            kl[i, t] = sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True))
            agrees[i, t] = float(p.argmax() == q.argmax())
    assert torch.allclose(result.kl, kl, rtol=1e-3, atol=1e-6)
    assert torch.equal(result.agrees.float(), agrees)
    assert 0 < result.agreement < 1
    assert result.agreement == pytest.approx(agrees.mean().item())
    assert result.mean == pytest.approx(kl.mean().item(), rel=1e-3)
    by_window = kl.mean(1)
    assert result.error == pytest.approx(by_window.std().item() / math.sqrt(3), rel=1e-2)
    by_window = agrees.mean(1)
    assert result.agreement_error == pytest.approx(by_window.std().item() / math.sqrt(3))
    ordered = kl.flatten().sort()[0]
    assert result.percentiles[50] == pytest.approx((ordered[23:25].mean()).item(), rel=1e-3)
    assert result.percentiles[50] < result.percentiles[90] < result.percentiles[99]
    own = perplexity(model, windows)
    assert result.perplexity.losses.tolist() == pytest.approx(own.losses.tolist(), rel=1e-5)
    assert result.perplexity.num_tokens == own.num_tokens


def test_a_model_is_at_no_distance_from_itself_and_a_quantised_one_nearer_with_more_bits():
    reference = tiny_model(dtype=torch.float32)
    windows = windows_of(2, 32)
    same = divergence(reference, copy.deepcopy(reference), windows)
    assert same.mean == 0
    assert same.agreement == 1
    found = []
    for bits in (4, 3, 2):
        model = copy.deepcopy(reference)
        flute.quantize_model(model, bits, 32)
        found.append(divergence(model, reference, windows).mean)
    assert 0 < found[0] < found[1] < found[2]


def test_neither_batches_nor_chunks_change_the_result(monkeypatch):
    reference = tiny_model(dtype=torch.float32)
    model = noisy(reference)
    windows = windows_of(5, 16)
    whole = divergence(model, reference, windows)
    counted = []
    monkeypatch.setattr("flute.divergence._TOKENS_PER_BATCH", 32)
    monkeypatch.setattr("flute.divergence._LOGITS_PER_CHUNK", 96 * 7)
    parts = divergence(model, reference, windows, counted.append)
    assert torch.allclose(whole.kl, parts.kl, rtol=1e-3, atol=1e-7)
    assert torch.equal(whole.agrees, parts.agrees)
    assert counted == [32, 32, 16]
    monkeypatch.setattr("flute.divergence._LOGITS_PER_BATCH", 96)
    assert divergence(model, reference, windows).kl.shape == (5, 15)


def test_another_vocabulary_is_refused():
    with pytest.raises(EvaluationError, match="vocabulary has 96 tokens, the reference's 128"):
        divergence(tiny_model(), tiny_model(vocab_size=128), windows_of(1, 8))


def test_windows_must_suit_both_models():
    short = tiny_model(max_position_embeddings=16)
    with pytest.raises(EvaluationError, match="`window` is 32; the model's context is 16"):
        divergence(tiny_model(), short, windows_of(1, 32))


@pytest.mark.parametrize("who", ["model", "reference"])
def test_nan_is_named_and_not_averaged_away(who):
    """One token's embedding is NaN; a masked value that is NaN spoils its window from the start."""
    broken = tiny_model(dtype=torch.float32)
    windows = windows_of(3, 16) % 90
    windows[1, 5] = 95
    with torch.no_grad():
        broken.model.embed_tokens.weight[95] = torch.nan
    pair = (broken, tiny_model(dtype=torch.float32))
    message = f"The {who}'s logits are NaN or Inf at token 0 of window 1"
    with pytest.raises(EvaluationError, match=message):
        divergence(*(pair if who == "model" else pair[::-1]), windows)
    with pytest.raises(EvaluationError, match="NaN or Inf in 1 of 3 windows, the first at 1"):
        perplexity(broken, windows)


def test_a_token_ruled_out_by_the_model_alone_is_an_infinite_divergence():
    reference = tiny_model(dtype=torch.float32, attention_bias=False)
    model = copy.deepcopy(reference)
    forward = model.forward

    def ruled_out(**inputs):
        output = forward(**inputs)
        output.logits[:, :, 7] = -torch.inf
        return output

    model.forward = ruled_out
    with pytest.raises(EvaluationError, match="At token 0 of window 0 the model gives probab"):
        divergence(model, reference, windows_of(1, 8) % 7)
    both = divergence(model, model, windows_of(1, 8) % 7)
    assert both.mean == 0
