"""The plugin's output head in the real vLLM, by its own loaders, on a CPU."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import random_weight
from vllm_weights import check, fill, packed, quantization, rows_of

import flute
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import QuantSpec

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture
def head_ranks(ranks, monkeypatch):
    """As `ranks`, for vLLM's output head."""
    from vllm.model_executor.layers import vocab_parallel_embedding as embedding

    def be(rank, size):
        ranks(rank, size)
        monkeypatch.setattr(embedding, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(embedding, "get_tensor_model_parallel_world_size", lambda: size)

    return be


def head_of(config, vocabulary, K, name="lm_head"):
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return ParallelLMHead(
        vocabulary, K, params_dtype=torch.bfloat16, quant_config=config, prefix=name
    )


def padded(weight, rows, N):
    """Some rows of a weight, with zeros below up to N."""
    part = rows_of(weight, rows)
    pad = (0, 0, 0, N - part.N)
    more = {
        "packed": torch.nn.functional.pad(part.packed, pad),
        "scales": torch.nn.functional.pad(part.scales, pad),
    }
    if part.has_row_tables:
        more["table"] = torch.nn.functional.pad(part.table, pad)
    return part._replace(**more, N=N)


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("vocabulary", [256, 250, 1000])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_rank_has_its_part_of_the_padded_vocabulary(head_ranks, size, vocabulary, per_row):
    spec, K = QuantSpec(3, 32), 64
    whole = packed(random_weight(vocabulary, K, spec, per_row=per_row))
    scope = {"table_scope": "row" if per_row else "tensor"}
    config = quantization(spec, quantized_head="lm_head", **scope)
    own = -(-vocabulary // 64) * 64 // size
    for rank in range(size):
        head_ranks(rank, size)
        head = head_of(config, vocabulary, K)
        fill(head, (whole,), (None,))
        rows = slice(min(rank * own, vocabulary), min((rank + 1) * own, vocabulary))
        check(head, padded(whole, rows, own), K)
        assert head.weight.shape == (0, K)  # where vLLM looks for dtype and device


def test_only_the_head_that_the_config_names_is_quantised(head_ranks):
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    head_ranks(0, 1)
    own = {"overrides": {"lm_head": {"num_bits": 2, "group_size": 32}}}
    named = quantization(QuantSpec(4, 64), quantized_head="lm_head", **own)
    inner = head_of(named, 64, 64, "language_model.lm_head").quant_method
    assert (inner.spec, inner.parts) == (QuantSpec(2, 32), ("lm_head",))
    for config, name in (
        (named, "model.layers.9.shared_head.head"),
        (quantization(QuantSpec(4, 64)), "lm_head"),
    ):
        assert isinstance(head_of(config, 64, 64, name).quant_method, UnquantizedEmbeddingMethod)
    embedding = VocabParallelEmbedding(64, 64, quant_config=named, prefix="model.embed_tokens")
    assert isinstance(embedding.quant_method, UnquantizedEmbeddingMethod)
    with pytest.raises(UnsupportedProblemError, match='Set "tie_word_embeddings" to false'):
        head_of(named, 64, 64).tie_weights(embedding)


def test_a_head_without_its_tensors_or_with_others_is_named(head_ranks):
    head_ranks(0, 1)
    spec = QuantSpec(4, 64)
    config = quantization(spec, quantized_head="lm_head")
    whole = packed(random_weight(64, 128, spec))
    head = head_of(config, 64, 128)
    head.codes.weight_loader(head.codes, whole.packed)
    with pytest.raises(CheckpointError, match=r"lacks `lm_head\.scales`"):
        head.quant_method.process_weights_after_loading(head)
    with pytest.raises(FormatError, match=r"`lm_head\.codes` is .* do not belong"):
        fill(head_of(config, 64, 128), (whole._replace(packed=whole.packed[:, 1:]),), (None,))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_a_head_quantised_while_it_loads(head_ranks, tied, size):
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from flute.integrations.vllm_config import FluteQuantizationConfig

    request = {"quant_method": "flute", "bits": 2, "group_size": 64, "method": "nf"}
    request |= {"head_bits": 4, "head_group_size": 32}
    config = FluteQuantizationConfig.from_config(request)
    vocabulary, K = 250, 128
    dense = torch.randn(vocabulary, K, dtype=torch.bfloat16)
    whole = packed(flute.quantize(dense, 4, 32, method="nf"))
    for rank in range(size):
        head_ranks(rank, size)
        head = head_of(config, vocabulary, K)
        loaded = head
        if tied:
            kind = {"params_dtype": torch.bfloat16, "quant_config": config}
            loaded = VocabParallelEmbedding(vocabulary, K, prefix="model.embed_tokens", **kind)
            assert head.tie_weights(loaded) is head
        loaded.weight.weight_loader(loaded.weight, dense)
        head.quant_method.process_weights_after_loading(head)
        own = 256 // size
        rows = slice(rank * own, min((rank + 1) * own, vocabulary))
        check(head, padded(whole, rows, own), K)
        assert "weight" not in dict(head.named_parameters())
        assert not tied or torch.equal(loaded.weight[: rows.stop - rows.start], dense[rows])
    empty = head_of(config, vocabulary, K)
    with pytest.raises(CheckpointError, match=r"lacks `lm_head\.weight`"):
        empty.quant_method.process_weights_after_loading(empty)
