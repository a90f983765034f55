"""Models that take a token in one call: what they compute, when, and what the cache holds then."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from decoding import LENGTH, PROMPT, assert_close, ids, logits, quantized
from helpers import DTYPES, generator
from torch import nn

import flute
from flute import fused
from flute.cpu import library as cpu
from flute.cpu.stack import Past
from flute.fused_model import FusedModel, fuse_model

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_kernels")
STEPS = LENGTH - PROMPT
"""Tokens that `logits` takes one by one."""


def full(kind):
    return {"sliding_window": None} if kind == "mistral" else {}


def both(kind="llama", dtype=torch.float32, **changes):
    """The model whose blocks are fused, and the one that takes all of them in a call."""
    blocks = quantized(kind, dtype, **{**full(kind), **changes})
    whole = copy.deepcopy(blocks)
    flute.prepare(blocks, fused=False)
    fused.fuse(blocks)
    flute.prepare(whole)
    assert isinstance(whole.model, FusedModel)
    assert not isinstance(blocks.model, FusedModel)
    return blocks, whole


@pytest.fixture
def taken(monkeypatch):
    """Count the tokens that go by one call."""
    count, decode = [], FusedModel._decode

    def counted(self, **kwargs):
        out = decode(self, **kwargs)
        if out is not None:
            count.append(1)
        return out

    monkeypatch.setattr(FusedModel, "_decode", counted)
    return count


def caches_agree(a, b):
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    assert a.get_seq_length() == b.get_seq_length()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", fused.ARCHITECTURES)
def test_tokens_and_caches_are_those_of_the_blocks(kind, dtype, taken):
    blocks, whole = both(kind, dtype)
    taken.clear()
    tokens = ids(3)
    mask = torch.ones_like(tokens)
    mask[1, :2] = mask[2, :5] = 0
    for given in (None, mask):
        caches = [DynamicCache(config=blocks.config), DynamicCache()]
        expected = logits(blocks, tokens, given, caches[0])
        assert_close(logits(whole, tokens, given, caches[1]), expected, dtype)
        caches_agree(*caches)
    assert len(taken) == 2 * STEPS


def test_generated_text_is_the_same(taken):
    blocks, whole = both()
    taken.clear()
    with torch.inference_mode():
        for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
            texts = [
                model.generate(ids(2), max_new_tokens=9, do_sample=False, pad_token_id=0, **options)
                for model in (blocks, whole)
            ]
            assert torch.equal(*texts)
    assert len(taken) == 3 * 8


def test_bits_depend_on_neither_variant_nor_threads(monkeypatch):
    _, whole = both(dtype=torch.bfloat16, num_attention_heads=8, num_key_value_heads=2)
    tokens = ids(4, 40)
    expected = logits(whole, tokens, prompt=1)
    threads = torch.get_num_threads()
    try:
        for variant in cpu._found().usable:
            monkeypatch.setenv("FLUTE_CPU_VARIANT", variant)
            for number in (1, 2):
                torch.set_num_threads(number)
                assert torch.equal(logits(whole, tokens, prompt=1), expected), variant
    finally:
        torch.set_num_threads(threads)


def test_memory_grows_and_what_was_seen_stays(taken):
    blocks, whole = both()
    tokens = ids(2, 200)
    caches = [DynamicCache(config=blocks.config), DynamicCache(config=blocks.config)]
    taken.clear()
    seen = []

    def watch(module, args, kwargs, out):
        layer = kwargs["past_key_values"].layers[1]
        seen.append((layer.keys, layer.keys.clone()))

    hook = whole.model.register_forward_hook(watch, with_kwargs=True)
    found = logits(whole, tokens, cache=caches[1])
    hook.remove()
    assert_close(found, logits(blocks, tokens, cache=caches[0]))
    caches_agree(*caches)
    assert len(taken) == 200 - PROMPT
    assert all(torch.equal(view, copied) for view, copied in seen)
    assert len({view.untyped_storage().data_ptr() for view, _ in seen[1:]}) < 6


def step(model, cache, token):
    with torch.inference_mode():
        ids = torch.tensor([[token]] * cache.layers[0].keys.shape[0])
        return model(ids, past_key_values=cache, use_cache=True).logits


class Changes:
    """What the owner of a cache may do between two tokens."""

    @staticmethod
    def crop(cache):
        cache.crop(-2)
        return cache

    @staticmethod
    def reorder(cache):
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        return cache

    @staticmethod
    def select(cache):
        cache.batch_select_indices(torch.tensor([1]))
        return cache

    @staticmethod
    def deep(cache):
        return copy.deepcopy(cache)

    @staticmethod
    def shallow(cache):
        return copy.copy(cache)

    @staticmethod
    def swapped(cache):
        cache.layers[0].keys, cache.layers[1].keys = cache.layers[1].keys, cache.layers[0].keys
        return cache

    @staticmethod
    def written(cache):
        with torch.inference_mode():
            cache.layers[1].values.mul_(2)
        return cache

    @staticmethod
    def new_layers(cache):
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        return cache


@pytest.mark.parametrize("how", [name for name in vars(Changes) if name[0] != "_"])
def test_caches_that_their_owner_changes(how, taken):
    found = []
    for model in both():
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids(3, PROMPT), past_key_values=cache, use_cache=True)
        outs = [step(model, cache, token) for token in (1, 2, 3)]
        other = getattr(Changes, how)(cache)
        outs += [step(model, other, token) for token in (4, 5)]
        found.append((outs, other))
    for mine, theirs in zip(found[1][0], found[0][0], strict=True):
        assert_close(mine, theirs)
    caches_agree(found[1][1], found[0][1])
    assert len(taken) == 1 + 5  # and when it was fused


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_two_caches_of_one_past_do_not_write_over_each_other(copied):
    texts = []
    for model in both():
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids(1, PROMPT), past_key_values=cache, use_cache=True)
        step(model, cache, 1)
        other = DynamicCache(config=model.config)
        for to, of in zip(other.layers, cache.layers, strict=True):
            kept = copied(of)
            to.__dict__.update(kept.__dict__)
        a = [step(model, cache, token) for token in (2, 3)]
        b = [step(model, other, token) for token in (4, 5)]
        c = [step(model, cache, token) for token in (6, 7)]
        texts.append(torch.cat(a + b + c))
    assert_close(texts[1], texts[0])


def test_memory_goes_with_its_cache():
    _, whole = both()
    cache = DynamicCache(config=whole.config)
    logits(whole, ids(), cache=cache)
    (growing,) = whole.model._growing.values()
    memory = weakref.ref(growing.past)
    del cache, growing
    gc.collect()
    assert memory() is None


class Others:
    """Calls that are not this one's: the model's own forward must run."""

    @staticmethod
    def gradients(model, ids, cache):
        with torch.enable_grad():
            model(ids, past_key_values=cache)

    @staticmethod
    def hidden_states(model, ids, cache):
        out = model(ids, past_key_values=cache, output_hidden_states=True)
        assert len(out.hidden_states) == 3

    @staticmethod
    def hidden_states_by_config(model, ids, cache):
        model.config.output_hidden_states = True
        assert len(model(ids, past_key_values=cache).hidden_states) == 3

    @staticmethod
    def tuples(model, ids, cache):
        assert isinstance(
            model.model(input_ids=ids, past_key_values=cache, return_dict=False), tuple
        )

    @staticmethod
    def embeddings(model, ids, cache):
        model(inputs_embeds=model.model.embed_tokens(ids), past_key_values=cache)

    @staticmethod
    def training(model, ids, cache):
        model.train()(ids, past_key_values=cache)

    @staticmethod
    def autocast(model, ids, cache):
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, past_key_values=cache)

    @staticmethod
    def no_cache(model, ids, cache):
        model(ids, use_cache=False)

    @staticmethod
    def an_empty_cache(model, ids, cache):
        model(ids, past_key_values=DynamicCache(config=model.config))

    @staticmethod
    def a_static_cache(model, ids, cache):
        static = transformers.StaticCache(config=model.config, max_cache_len=9)
        model(ids, past_key_values=static)

    @staticmethod
    def another_cache(model, ids, cache):
        class Own(DynamicCache):
            pass

        own = Own()
        own.layers = cache.layers
        model(ids, past_key_values=own)

    @staticmethod
    def a_mask_made_ready(model, ids, cache):
        model(ids, attention_mask=torch.zeros(1, 1, 1, PROMPT + 1), past_key_values=cache)

    @staticmethod
    def another_dtype(model, ids, cache):
        cache.layers[0].keys = cache.layers[0].keys.half()
        model(ids, past_key_values=cache)

    @staticmethod
    def a_hook_of_a_block(model, ids, cache):
        seen = []
        model.model.layers[1].register_forward_hook(lambda *args: seen.append(args))
        model(ids, past_key_values=cache)
        assert seen

    @staticmethod
    def a_hook_of_the_norm(model, ids, cache):
        seen = []
        model.model.norm.register_forward_pre_hook(lambda *args: seen.append(args))
        model(ids, past_key_values=cache)
        assert seen

    @staticmethod
    def a_hook_within_a_block(model, ids, cache):
        seen = []
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args))
        model(ids, past_key_values=cache)
        assert seen

    @staticmethod
    def a_forward_of_a_block(model, ids, cache):
        seen = []
        own = model.model.layers[0].forward
        model.model.layers[0].forward = lambda *args, **kwargs: (
            seen.append(1) or own(*args, **kwargs)
        )
        model(ids, past_key_values=cache)
        assert seen

    @staticmethod
    def another_norm(model, ids, cache):
        model.model.norm = nn.LayerNorm(64)
        model(ids, past_key_values=cache)

    @staticmethod
    def fewer_blocks(model, ids, cache):
        model.model.layers = model.model.layers[:1]
        model(ids, past_key_values=cache)

    @staticmethod
    def fewer_blocks_by_config(model, ids, cache):
        model.config.num_hidden_layers = 1
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("way", [name for name in vars(Others) if name[0] != "_"])
def test_what_asks_for_more_gets_the_models_own_forward(way, taken):
    _, whole = both()
    cache = DynamicCache(config=whole.config)
    with torch.no_grad():
        whole(ids(1, PROMPT), past_key_values=cache)
        taken.clear()
        getattr(Others, way)(whole, torch.tensor([[3]]), cache)
    assert not taken


def test_a_compiled_model_runs_its_own_forward(taken):
    blocks, whole = both(num_hidden_layers=1)
    cache, other = (DynamicCache(config=whole.config) for _ in range(2))
    taken.clear()
    compiled = torch.compile(whole.model, backend="eager")
    with torch.no_grad():
        for tokens in (ids(1, PROMPT), ids(1, 1)):
            out = compiled(input_ids=tokens, past_key_values=cache, use_cache=True)
            own = blocks.model(input_ids=tokens, past_key_values=other, use_cache=True)
            assert_close(out.last_hidden_state, own.last_hidden_state)
    assert not taken


def test_hooks_of_the_model_itself_are_called(taken):
    _, whole = both()
    seen = []
    whole.model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
    whole.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args[2]))
    taken.clear()
    logits(whole, ids())
    assert len(taken) == STEPS
    assert len(seen) == 2 * (STEPS + 1)


def test_changed_parameters_count(taken):
    blocks, whole = both()
    tokens = ids()

    def change(model, how):
        block = model.model.layers[1]
        if how == "norm":
            model.model.norm.weight = nn.Parameter(torch.rand(64, generator=generator(3)))
        elif how == "norm in place":
            model.model.norm.weight.data.mul_(-1)
        elif how == "its memory":
            model.model.norm.weight.data = model.model.norm.weight.data * 2
        elif how == "scales":
            block.mlp.up_proj.scales.data.mul_(2)
        elif how == "order":
            model.model.layers[0], model.model.layers[1] = block, model.model.layers[0]
        else:
            block.self_attn.v_proj.load_state_dict(block.self_attn.k_proj.state_dict())

    before = logits(whole, tokens)
    for how in ("norm", "norm in place", "its memory", "scales", "loaded", "order"):
        for model in (blocks, whole):
            change(model, how)
        after = logits(whole, tokens)
        assert not torch.equal(after, before), how
        assert_close(after, logits(blocks, tokens))
        before = after
    flute.prepare(whole)
    taken.clear()
    assert torch.equal(logits(whole, tokens), before)


def test_a_model_that_is_not_finite_stays_so():
    _, whole = both()
    whole.model.embed_tokens.weight.data[5, 3] = float("nan")
    cache = DynamicCache(config=whole.config)
    with torch.inference_mode():
        whole(ids(2, PROMPT), past_key_values=cache)
        out = whole(torch.tensor([[4], [5]]), past_key_values=cache).logits
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 4}, {"layer_types": ["full_attention", "sliding_attention"]}]
)
def test_windows_go_by_the_blocks(changes, taken):
    kind = "mistral" if "sliding_window" in changes else "qwen3"
    if kind == "qwen3":
        changes = {**changes, "use_sliding_window": True, "sliding_window": 4}
    model = quantized(kind, **changes)
    own = copy.deepcopy(model)
    flute.prepare(model)
    flute.prepare(own, fused=False)
    assert not isinstance(model.model, FusedModel)
    for cache in (DynamicCache(), None):
        assert_close(logits(model, ids(2), cache=cache), logits(own, ids(2)))
    assert not taken


def test_modules_stay_as_they_are():
    blocks, whole = both()
    names = [name for name, _ in blocks.named_modules()]
    assert [name for name, _ in whole.named_modules()] == names
    assert isinstance(whole.model, type(blocks.model))
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert type(other.model) is type(blocks.model)
        assert_close(logits(other, ids()), logits(whole, ids()))
    assert fuse_model(whole) == 1  # again: nothing changes
    whole.to(torch.bfloat16)
    assert whole.model._whole is None
    assert logits(whole, ids()).dtype == torch.bfloat16


def test_a_model_with_a_block_that_is_not_fused():
    model = quantized()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128, bias=False)
    flute.prepare(model)
    assert not isinstance(model.model, FusedModel)


def test_a_model_that_computes_something_else_is_found_out(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = quantized()
    own = modeling_llama.LlamaModel.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        return type(out)(last_hidden_state=2 * out.last_hidden_state)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.warns(UserWarning, match="LlamaModel of this version of transformers does not"):
        flute.prepare(model)
    assert type(model.model) is modeling_llama.LlamaModel


def test_past_has_room():
    keys = [torch.randn(2, 3, 5, 16) for _ in range(4)]
    past = Past(keys[:2], keys[2:])
    assert not past.is_full()
    views = past.views()
    assert [torch.equal(a, b) for a, b in zip(views[::2], keys[:2], strict=True)] == [True, True]
    assert [torch.equal(a, b) for a, b in zip(views[1::2], keys[2:], strict=True)] == [True, True]
    past.length = past.memory.shape[4]
    assert past.is_full()
