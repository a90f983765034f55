"""Decoder blocks fused on a CPU: what they compute, when they do, and what they leave alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from decoding import LENGTH, PROMPT, assert_close, ids, logits, quantized
from helpers import DTYPES, generator
from torch import nn

import flute
from flute import fused
from flute.cpu import library as cpu
from flute.fused import FusedBlock

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def both(kind="llama", dtype=torch.float32, **changes):
    """The model with its own blocks, and with fused ones."""
    own = quantized(kind, dtype, **changes)
    ours = copy.deepcopy(own)
    flute.prepare(own, fused=False)
    flute.prepare(ours, fused=False)
    assert fused.fuse(ours) == len(ours.model.layers)
    assert not any(isinstance(block, FusedBlock) for block in own.modules())
    assert all(isinstance(block, FusedBlock) for block in ours.model.layers)
    return own, ours


@pytest.fixture
def steps(monkeypatch):
    """Count the steps that go by the library."""
    count = []

    class Counted(fused.Step):
        __slots__ = ()

        def __init__(self, *args):
            count.append(1)
            super().__init__(*args)

    monkeypatch.setattr(fused, "Step", Counted)
    return count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", fused.ARCHITECTURES)
def test_tokens_are_those_of_the_models_own_blocks(kind, dtype, steps):
    own, ours = both(kind, dtype)
    steps.clear()
    tokens = ids(3)
    mask = torch.ones_like(tokens)
    mask[1, :2] = mask[2, :5] = 0
    for given in (None, mask):
        assert_close(logits(ours, tokens, given), logits(own, tokens, given), dtype)
    assert len(steps) == 2 * 2 * (LENGTH - PROMPT)  # masks, blocks, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_caches_and_windows(attention, steps):
    own, ours = both("mistral", sliding_window=4)
    for model in (own, ours):
        model.set_attn_implementation(attention)
    tokens = ids(2)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    for make in (
        lambda model: transformers.DynamicCache(config=model.config),
        lambda model: transformers.DynamicCache(),
        lambda model: transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 3),
    ):
        for given in (None, mask):
            steps.clear()
            found = logits(ours, tokens, given, make(ours))
            assert len(steps) == 2 * (LENGTH - PROMPT)
            assert_close(found, logits(own, tokens, given, make(own)))


def test_generated_text_is_the_same(steps):
    own, ours = both()
    with torch.inference_mode():
        texts = [model.generate(ids(), max_new_tokens=20, do_sample=False) for model in (own, ours)]
    assert steps
    assert torch.equal(*texts)


def test_without_a_cache(steps):
    own, ours = both()
    steps.clear()
    with torch.no_grad():
        a, b = (model(ids(2, 1), use_cache=False).logits for model in (ours, own))
    assert len(steps) == 2
    assert_close(a, b)


def test_bits_depend_on_neither_variant_nor_threads(monkeypatch):
    _, ours = both(dtype=torch.bfloat16, num_attention_heads=8, num_key_value_heads=2)
    tokens = ids(4, 40)
    expected = logits(ours, tokens, prompt=1)  # of longer ones products go by torch
    threads = torch.get_num_threads()
    try:
        for variant in cpu._found().usable:
            monkeypatch.setenv("FLUTE_CPU_VARIANT", variant)
            for number in (1, 2):
                torch.set_num_threads(number)
                cache = transformers.DynamicCache(config=ours.config)
                assert torch.equal(logits(ours, tokens, cache=cache, prompt=1), expected), variant
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    _, ours = both()
    block, x = ours.model.layers[0], torch.randn(2, 1, 64, generator=generator(1))
    x[1, 0, 3] = bad
    with torch.inference_mode():
        angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
        out = block(x, position_embeddings=angles)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


class Watched:
    """Ways of asking a block for more than its result: each must find its own forward."""

    @staticmethod
    def gradient(ours, x, angles):
        x.requires_grad_()
        ours(x, position_embeddings=angles).sum().backward()
        assert x.grad.abs().sum() > 0

    @staticmethod
    @torch.no_grad()
    def hook(ours, x, angles):
        seen = []
        ours.mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args))
        ours(x, position_embeddings=angles)
        assert seen

    @staticmethod
    @torch.no_grad()
    def replaced(ours, x, angles):
        ours.self_attn.o_proj = nn.Linear(64, 64)
        out = ours(x, position_embeddings=angles)
        ours.self_attn.o_proj.weight.zero_()
        assert not torch.equal(out, ours(x, position_embeddings=angles))

    @staticmethod
    @torch.no_grad()
    def forward(ours, x, angles):
        ours.mlp.forward = torch.zeros_like
        ours(x, position_embeddings=angles)

    @staticmethod
    @torch.no_grad()
    def dropout(ours, x, angles):
        ours.self_attn.attention_dropout = 0.5
        ours.train()(x, position_embeddings=angles)

    @staticmethod
    @torch.no_grad()
    def autocast(ours, x, angles):
        with torch.autocast("cpu", torch.bfloat16):
            ours(x, position_embeddings=angles)

    @staticmethod
    @torch.no_grad()
    def prompt(ours, x, angles):
        ours(x.expand(1, 3, 64), position_embeddings=angles)

    @staticmethod
    @torch.no_grad()
    def many(ours, x, angles):
        ours(x.expand(cpu.MAX_M + 1, 1, 64).contiguous(), position_embeddings=angles)


@pytest.mark.parametrize("way", [name for name in vars(Watched) if name[0] != "_"])
def test_who_asks_for_more_gets_the_blocks_own_forward(way, steps):
    _, ours = both()
    steps.clear()
    block, x = ours.model.layers[0], torch.randn(1, 1, 64, generator=generator(2))
    angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
    getattr(Watched, way)(block, x, angles)
    assert not steps


def test_blocks_called_in_any_order(steps):
    own, ours = both(num_hidden_layers=3)
    steps.clear()
    x = torch.randn(1, 1, 64, generator=generator(9))
    angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
    with torch.no_grad():
        for order in ((0, 1, 2), (1, 2), (0, 2), (0, 1, 1), (0, 0, 1, 2)):
            a = b = x
            for i in order:
                a = ours.model.layers[i](a, position_embeddings=angles)
                b = own.model.layers[i](b, position_embeddings=angles)
            assert_close(a, b)
        assert len(steps) == 14
        first = ours.model.layers[0](x, position_embeddings=angles)
        seen = []
        ours.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(args))
        ours.model.layers[1](first, position_embeddings=angles)
        assert seen
    assert len(steps) == 15


def test_layers_of_fused_blocks_are_not_watched(steps):
    model = quantized()
    model.model.layers[1].self_attn.o_proj = nn.Linear(64, 64)  # this block is not fused
    flute.prepare(model, together=True)
    hooked = [bool(block.mlp._forward_pre_hooks) for block in model.model.layers]
    assert hooked == [False, True]
    steps.clear()
    with torch.no_grad():
        model(ids(1, 1))
    assert len(steps) == 1


def test_attentions_can_be_had(steps):
    own, ours = both(attn_implementation="eager")
    with torch.no_grad():
        a, b = (
            model(ids(1, 1), output_attentions=True, output_hidden_states=True)
            for model in (ours, own)
        )
    assert len(a.attentions) == len(b.attentions) == 2
    for mine, theirs in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_close(mine, theirs)


def test_changed_parameters_count(steps):
    own, ours = both()
    tokens = ids()

    def change(model, how):
        block = model.model.layers[1]
        if how == "norm":
            block.input_layernorm.weight = nn.Parameter(torch.rand(64, generator=generator(3)))
        elif how == "norm in place":
            block.post_attention_layernorm.weight.data.mul_(-1)
        elif how == "scales":
            block.mlp.up_proj.scales.data.mul_(2)
        else:
            block.self_attn.v_proj.load_state_dict(block.self_attn.k_proj.state_dict())

    before = logits(ours, tokens)
    for how in ("norm", "norm in place", "scales", "loaded"):
        for model in (own, ours):
            change(model, how)
        steps.clear()
        after = logits(ours, tokens)
        assert not torch.equal(after, before), how
        assert_close(after, logits(own, tokens))
        before = after
    assert fused.fuse(ours) == 2
    steps.clear()
    assert torch.equal(logits(ours, tokens), before)
    assert len(steps) == 2 * (LENGTH - PROMPT)


def test_modules_stay_as_they_are():
    own, ours = both()
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in own.named_modules()]
    state = own.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    block = ours.model.layers[0]
    assert isinstance(block, type(own.model.layers[0]))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(own.model.layers[0])
        x = torch.randn(1, 1, 64, generator=generator(4))
        angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
        with torch.no_grad():
            assert_close(other(x, position_embeddings=angles), block(x, position_embeddings=angles))
    assert fused.fuse(ours) == 2  # again: nothing changes
    ours.to(torch.bfloat16)
    assert block._block is None


def test_compiled_models_take_their_own_forward(steps):
    own, ours = both(num_hidden_layers=1)
    steps.clear()
    compiled = torch.compile(ours.model.layers[0], backend="eager", fullgraph=False)
    x = torch.randn(1, 1, 64, generator=generator(5))
    with torch.no_grad():
        angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
        out = compiled(x, position_embeddings=angles)
        assert_close(out, own.model.layers[0](x, position_embeddings=angles))
    assert not steps


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"head_dim": 24}])
def test_blocks_that_the_library_does_not_take(changes):
    model = quantized(**changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flute.prepare(model)
    assert not any(isinstance(block, FusedBlock) for block in model.modules())
    with torch.no_grad():
        assert model(ids()).logits.isfinite().all()


def test_a_block_with_a_dense_layer_is_left_alone():
    model = quantized()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128, bias=False)
    flute.prepare(model)
    assert [isinstance(block, FusedBlock) for block in model.model.layers] == [True, False]


def test_a_block_that_computes_something_else_is_found_out(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = quantized()
    forward = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(
        modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x + forward(self, x)
    )
    with pytest.warns(UserWarning, match="LlamaDecoderLayer of this version of transformers"):
        flute.prepare(model)
    assert not any(isinstance(block, FusedBlock) for block in model.modules())


def test_a_mask_of_another_length_is_refused():
    _, ours = both()
    block, x = ours.model.layers[0], torch.randn(1, 1, 64, generator=generator(6))
    angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(ValueError, match="`attention_mask` is of 3 tokens, not 1"):
        block(x, position_embeddings=angles, attention_mask=mask)


def test_where_all_is_masked_attention_adds_nothing():
    own, ours = both()
    x = torch.randn(1, 1, 64, generator=generator(8))
    angles = ours.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    kwargs = {"position_embeddings": angles, "attention_mask": mask}
    with torch.no_grad():
        ours, own = (model.model.layers[0](x, **kwargs) for model in (ours, own))
    assert_close(ours, own)
