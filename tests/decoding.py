"""Small models that decode, for the tests of what is fused."""

from __future__ import annotations

import torch
from helpers import TINY, generator

import flute

VOCABULARY, PROMPT, LENGTH = TINY["vocab_size"], 6, 14
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Of logits, by two ways with the same products but other roundings."""


def quantized(kind="llama", dtype=torch.float32, **changes):
    """A quantised model with norms and biases that do something, not prepared yet."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**TINY, "head_dim": 16, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    rng = generator(7)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=rng)
        parameter.data = (drawn * 0.15 if parameter.ndim > 1 else 1 + drawn / 4).to(dtype)
    flute.quantize_model(model, 4, 32, method="nf")
    return model


def ids(batch=1, length=LENGTH):
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator(batch, length))


def logits(model, tokens, mask=None, cache=None, prompt=PROMPT):
    """Of each token after a prompt, one at a time, (batch, tokens, vocabulary)."""
    from transformers import DynamicCache

    if cache is None:  # an empty one is false
        cache = DynamicCache(config=model.config)
    found = []
    with torch.inference_mode():
        for stop in range(prompt, tokens.shape[1] + 1):
            now = tokens[:, :prompt] if stop == prompt else tokens[:, stop - 1 : stop]
            mask_now = None if mask is None else mask[:, :stop]
            out = model(now, attention_mask=mask_now, past_key_values=cache, use_cache=True)
            found.append(out.logits[:, -1:])
    return torch.cat(found[1:], 1)


def assert_close(ours, own, dtype=torch.float32):
    error = (ours - own).double().norm() / own.double().norm()
    assert error < TOLERANCE[dtype], error
