"""The plugin in the real vLLM: its layers, its loaders, its engine, on a CPU."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, edit_json, edit_tensors, python, random_weight
from safetensors.torch import load_file, save_file

import flute
from flute.concat import concat_weights
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig, PackedWeight, QuantSpec
from flute.model import QuantizeOptions
from flute.ops import lut_gemm
from flute.pack import pack_codes
from flute.reference import dequantize_packed
from flute.stream import quantize_checkpoint

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

PROMPTS = ["The king of the country", "Once upon a time", "In 1943 , the ship"]
ENGINE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], max_model_len=128, max_num_seqs=4, **json.loads(sys.argv[2]))
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    asked = {}
    if len(sys.argv) > 5:
        from vllm.lora.request import LoRARequest

        asked = {"lora_request": LoRARequest("adapter", 1, sys.argv[5])}
    outputs = llm.generate(json.loads(sys.argv[3]), greedy, **asked)
    with open(sys.argv[4], "w") as file:
        json.dump([list(output.outputs[0].token_ids) for output in outputs], file)

if __name__ == "__main__":
    main()
"""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "flute",
}


# ---- layers


@pytest.fixture
def ranks(monkeypatch):
    """Make vLLM's layers believe in a rank of several; the function returned says which.

    They keep the order of storage, so that tests can look at their codes.
    """
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    monkeypatch.setenv("FLUTE_CPU_VARIANT", "none")

    def be(rank, size):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        yield be


def quantization(spec, **changes):
    from flute.integrations.vllm_config import FluteQuantizationConfig

    config = CheckpointConfig(spec.num_bits, spec.group_size, **changes)
    made = FluteQuantizationConfig.from_config(config.to_dict())
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return made


def packed(weight):
    codes = pack_codes(weight.codes, weight.spec.num_bits)
    return PackedWeight(codes, weight.scales, weight.table, weight.spec, *weight.shape)


def rows_of(weight, rows):
    per_row = weight.has_row_tables
    return weight._replace(
        packed=weight.packed[rows],
        scales=weight.scales[rows],
        table=weight.table[rows] if per_row else weight.table,
        N=len(range(*rows.indices(weight.N))),
    )


def fill(layer, weights, ids):
    for weight, i in zip(weights, ids, strict=True):
        for name, tensor in (
            ("codes", weight.packed),
            ("scales", weight.scales),
            ("table", weight.table),
        ):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *([] if i is None else [i]))
    layer.quant_method.process_weights_after_loading(layer)


def check(layer, expected, K):
    """The layer holds the weight bit for bit, and multiplies by it."""
    method = layer.quant_method
    loaded = (layer.codes.data, layer.scales.data, layer.table.data)
    assert torch.equal(loaded[0], expected.packed)
    assert torch.equal(loaded[1], expected.scales)
    found = PackedWeight(*loaded, method.spec, len(loaded[0]), K, method.table_ends)
    dense = dequantize_packed(expected, torch.float32)
    assert torch.equal(dequantize_packed(found, torch.float32), dense)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    weight = (expected.packed, expected.scales, expected.table, method.spec)
    out = method.apply(layer, x)
    assert torch.equal(out, lut_gemm(x, *weight, table_ends=expected.table_ends))


SPECS = [
    QuantSpec(2, 32),
    QuantSpec(3, 64),
    QuantSpec(4, 128),
    QuantSpec(3, -1),
    QuantSpec(4, 256),
]


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_loaders_give_each_rank_its_slice(ranks, size, spec, per_row):
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )

    scope = {"table_scope": "row" if per_row else "tensor"}
    K, heads, kv_heads, head_size = 256, 8, 2, 16
    q, k, v = (
        packed(random_weight(n * head_size, K, spec, per_row=per_row, seed=i))
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    gate, up = (packed(random_weight(128, K, spec, per_row=per_row, seed=i)) for i in (3, 4))
    down = packed(random_weight(48, 2048, spec, per_row=per_row, seed=5))
    for rank in range(size):
        ranks(rank, size)
        common = {"bias": False, "quant_config": quantization(spec, **scope)}
        qkv = QKVParallelLinear(K, head_size, heads, kv_heads, prefix="l.qkv_proj", **common)
        fill(qkv, (q, k, v), ("q", "k", "v"))
        mine = heads // size * head_size
        kv = max(1, kv_heads // size) * head_size
        replica = rank // max(1, size // kv_heads)
        cut = [slice(rank * mine, (rank + 1) * mine)]
        cut += [slice(replica * kv, (replica + 1) * kv)] * 2
        parts = [rows_of(w, s) for w, s in zip((q, k, v), cut, strict=True)]
        check(qkv, concat_weights(parts), K)

        both = MergedColumnParallelLinear(K, [128, 128], prefix="l.gate_up_proj", **common)
        fill(both, (gate, up), (0, 1))
        rows = slice(rank * 128 // size, (rank + 1) * 128 // size)
        check(both, concat_weights([rows_of(gate, rows), rows_of(up, rows)]), K)

        if 2048 % (size * max(32, spec.group_size)) == 0:
            row = RowParallelLinear(2048, 48, prefix="l.down_proj", **common)
            fill(row, (down,), (None,))
            words, groups = (t.shape[1] // size for t in (down.packed, down.scales))
            groups = groups or 1
            first = 0 if spec.group_size == -1 else rank * groups
            expected = down._replace(
                packed=down.packed[:, rank * words : (rank + 1) * words],
                scales=down.scales[:, first : first + groups],
                K=2048 // size,
            )
            check(row, expected, 2048 // size)


def test_layers_merged_on_disk_are_cut_too(ranks):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    spec = QuantSpec(3, 64)
    whole = packed(random_weight(128, 256, spec))
    ranks(1, 2)
    config = quantization(spec)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
    layer = MergedColumnParallelLinear(
        256, [64, 64], bias=False, quant_config=config, prefix="l.gate_up_proj"
    )
    fill(layer, (whole,), (None,))
    parts = [rows_of(whole, slice(32, 64)), rows_of(whole, slice(96, 128))]
    check(layer, concat_weights(parts), 256)


def test_kernel_order_of_merged_layers(ranks, monkeypatch):
    """As on a GPU, but for the compiling; the op takes the order back on a CPU."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from flute.integrations import vllm_order

    monkeypatch.setattr(vllm_order, "takes_kernels", lambda *_: True)
    monkeypatch.setattr(
        "flute.integrations.vllm_linear.in_device_order", vllm_order.in_kernel_order
    )
    compiled = []
    monkeypatch.setattr(
        vllm_order, "compile_kernels", lambda problems, *_: compiled.append(problems)
    )
    ranks(0, 1)
    spec = QuantSpec(3, 64)
    gate, up = (packed(random_weight(64, 128, spec, seed=i)) for i in (0, 1))
    layer = MergedColumnParallelLinear(
        128,
        [64, 64],
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=quantization(spec),
        prefix="l.gate_up_proj",
    )
    fill(layer, (gate, up), (0, 1))
    assert [(p.n, p.k, p.num_bits) for ((p, _),) in compiled] == [(128, 128, 3)]
    assert compiled[0][0][1] == (64, 128)
    assert layer.quant_method.out_features == 128
    assert layer.quant_method.table_ends == (64, 128)
    assert layer.codes.ndim == 3
    whole = concat_weights([gate, up])
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16)
    bias = torch.randn(128, dtype=torch.bfloat16)
    weight = (whole.packed, whole.scales, whole.table, spec)
    expected = lut_gemm(x, *weight, bias, table_ends=whole.table_ends)
    assert torch.equal(layer.quant_method.apply(layer, x, bias), expected)


def test_merged_layers_take_the_kernels_of_a_cpu(ranks, monkeypatch):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    ranks(0, 1)
    spec = QuantSpec(3, 64)
    gate, up = (packed(random_weight(64, 128, spec, seed=i)) for i in (0, 1))
    layer = MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=quantization(spec), prefix="l.gate_up_proj"
    )
    fill(layer, (gate, up), (0, 1))
    assert layer.codes.dtype == torch.uint8
    assert layer.quant_method.out_features == 128
    whole = concat_weights([gate, up])
    x = torch.randn(3, 128)
    weight = (whole.packed, whole.scales, whole.table, spec)
    expected = lut_gemm(x, *weight, table_ends=whole.table_ends)
    error = (layer.quant_method.apply(layer, x) - expected).norm() / expected.norm()
    assert 0 < error < 5e-4


def test_an_uneven_shard_is_refused_by_name(ranks):
    from vllm.model_executor.layers.linear import RowParallelLinear

    ranks(0, 4)
    with pytest.raises(UnsupportedProblemError, match=r"`l\.0\.down_proj`: a tensor parallel size"):
        RowParallelLinear(
            256,
            64,
            bias=False,
            quant_config=quantization(QuantSpec(4, 128)),
            prefix="l.0.down_proj",
        )


def test_a_missing_or_foreign_tensor_is_named(ranks):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    ranks(0, 1)
    spec = QuantSpec(4, 64)
    gate = packed(random_weight(64, 128, spec))

    def layer():
        return MergedColumnParallelLinear(
            128, [64, 64], bias=False, quant_config=quantization(spec), prefix="l.gate_up_proj"
        )

    with pytest.raises(CheckpointError, match=r"lacks `l\.up_proj\.codes`"):
        fill(layer(), (gate,), (0,))
    for name, changed in (
        ("codes", gate._replace(packed=gate.packed.long())),
        ("codes", gate._replace(packed=gate.packed[:, :-1])),
        ("scales", gate._replace(scales=gate.scales.half())),
        ("table", gate._replace(table=gate.table[:, :8])),
    ):
        with pytest.raises(FormatError, match=rf"`l\.up_proj\.{name}` is .* do not belong"):
            fill(layer(), (gate, changed), (0, 1))


def test_what_is_dense_stays_vllm_s_own(ranks):
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    ranks(0, 1)
    config = quantization(QuantSpec(), modules_to_not_convert=("l.skipped",))
    for name in ("l.skipped", "l.mlp.gate"):
        layer = ReplicatedLinear(64, 8, quant_config=config, prefix=name)
        assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(4, 4), "lm_head") is None


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


# ---- the config


def test_configs_that_cannot_be_served_say_so_in_a_line():
    from flute.integrations.vllm_config import FluteQuantizationConfig

    config = CheckpointConfig().to_dict()
    with pytest.raises(FormatError, match="format version 99; this package reads up to 1"):
        FluteQuantizationConfig.from_config({**config, "format_version": 99})
    with pytest.raises(UnsupportedProblemError, match=r"The model is dense.*flute quantize MODEL"):
        FluteQuantizationConfig.from_config({"quant_method": "flute", "group_size": 64})
    with pytest.raises(UnsupportedProblemError, match="set FLUTE_BITS=4"):
        FluteQuantizationConfig().maybe_update_config(str(DEMO_MODEL))
    with pytest.raises(UnsupportedProblemError, match="set FLUTE_BITS=4"):
        FluteQuantizationConfig().get_quant_method(torch.nn.Identity(), "a")


def test_a_checkpoint_of_the_original_is_not_called_dense(tmp_path):
    from flute.integrations.vllm_config import FluteQuantizationConfig

    (tmp_path / "flute_config.json").write_text("{}")
    with pytest.raises(UnsupportedProblemError, match="Run `flute convert"):
        FluteQuantizationConfig().maybe_update_config(str(tmp_path))


def test_names_follow_vllm_s_renaming():
    config = quantization(
        QuantSpec(),
        modules_to_not_convert=("a.head",),
        overrides={"a.x": {"group_size": 32}},
    )
    config.apply_vllm_mapper(
        SimpleNamespace(apply_list=lambda names: [n.replace("a.", "b.") for n in names])
    )
    assert config.checkpoint.modules_to_not_convert == ("b.head",)
    assert config.checkpoint.overrides == {"b.x": {"group_size": 32}}
    assert config.checkpoint.quantized_head == ""
    config = quantization(QuantSpec(), quantized_head="a.head")
    config.apply_vllm_mapper(SimpleNamespace(apply_list=lambda names: ["b.head"] * len(names)))
    assert config.checkpoint.quantized_head == "b.head"


# ---- the engine


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folders = {}
    for num_bits in (4, 3):
        folders[num_bits] = tmp_path_factory.mktemp("vllm") / f"{num_bits}bit"
        options = QuantizeOptions(num_bits, 64, method="nf")
        quantize_checkpoint(DEMO_MODEL, folders[num_bits], options)
    return folders


def serve(folder, tmp_path, environment=None, adapter=None, **options):
    """Greedy tokens of the prompts, or what the engine printed when it failed."""
    out = tmp_path / "tokens.json"
    (tmp_path / "engine.py").write_text(ENGINE)
    code = f"import runpy; runpy.run_path({str(tmp_path / 'engine.py')!r}, run_name='__main__')"
    arguments = [folder, json.dumps(options), json.dumps(PROMPTS), out]
    arguments += [adapter] if adapter else []
    process = python(code, *arguments, **ENVIRONMENT, **(environment or {}))
    printed, _ = process.communicate(timeout=500)
    return json.loads(out.read_text()) if out.exists() else printed


def transformers_tokens(folder, change=lambda model: None):
    from transformers import AutoTokenizer

    model = flute.from_pretrained(folder, dtype=torch.float32).eval()
    change(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        tokens.append(out[0, ids.shape[1] :].tolist())
    return tokens


@pytest.mark.parametrize(
    ("num_bits", "options"),
    [
        (4, {"enforce_eager": True}),
        (3, {}),
        (4, {"enforce_eager": True, "tensor_parallel_size": 2}),
        (4, {"enforce_eager": True, "max_num_batched_tokens": 32, "enable_prefix_caching": True}),
        (4, {"enforce_eager": True, "speculative_config": NGRAM}),
    ],
    ids=["eager", "compiled", "two ranks", "chunked prefill", "speculative"],
)
def test_greedy_text_is_that_of_transformers(quantised, tmp_path, num_bits, options):
    """In float32: in bfloat16 the two round differently, and one of the texts has a near tie."""
    served = serve(quantised[num_bits], tmp_path, dtype="float32", **options)
    assert served == transformers_tokens(quantised[num_bits])


def test_greedy_text_by_the_kernels_of_a_cpu_is_that_of_transformers(
    quantised, tmp_path, monkeypatch
):
    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    served = serve(quantised[4], tmp_path, dtype="float32")
    assert served == transformers_tokens(quantised[4])


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory):
    """The demo model, whose head is tied, and the same untied, both with a head of 4 bits."""
    folder = tmp_path_factory.mktemp("heads")
    untied = shutil.copytree(DEMO_MODEL, folder / "dense-untied")
    embedding = load_file(untied / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(untied, {"lm_head.weight": embedding.flip(1)})
    edit_json(untied / "config.json", tie_word_embeddings=False)
    options = QuantizeOptions(3, 64, method="nf", head_bits=4, head_group_size=32)
    for name, source in (("tied", DEMO_MODEL), ("untied", untied)):
        quantize_checkpoint(source, folder / name, options)
    return folder


HEADS = [
    ("tied", {"enforce_eager": True}),
    ("untied", {}),
    ("tied", {"enforce_eager": True, "tensor_parallel_size": 2}),
    ("tied", {"enforce_eager": True, "speculative_config": NGRAM}),
]


@pytest.mark.parametrize(
    ("name", "options"), HEADS, ids=["tied", "untied, compiled", "two ranks", "speculative"]
)
def test_greedy_text_by_a_quantised_head_is_that_of_transformers(
    with_heads, tmp_path, name, options
):
    served = serve(with_heads / name, tmp_path, dtype="float32", **options)
    assert served == transformers_tokens(with_heads / name)


def test_a_quantised_head_by_the_kernels_of_a_cpu(with_heads, tmp_path, monkeypatch):
    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    served = serve(with_heads / "untied", tmp_path, dtype="float32")
    assert served == transformers_tokens(with_heads / "untied")


def test_a_tied_head_is_quantised_while_the_model_loads(with_heads, tmp_path):
    request = {"FLUTE_BITS": "3", "FLUTE_METHOD": "nf"}
    request |= {"FLUTE_HEAD_BITS": "4", "FLUTE_HEAD_GROUP_SIZE": "32"}
    options = {"dtype": "float32", "enforce_eager": True, "quantization": "flute"}
    served = serve(DEMO_MODEL, tmp_path, request, **options)
    assert served == transformers_tokens(with_heads / "tied")
    (tmp_path / "tokens.json").unlink()
    served = serve(with_heads / "dense-untied", tmp_path, request, **options)
    assert served == transformers_tokens(with_heads / "untied")


def test_a_checkpoint_without_its_head_is_refused(with_heads, tmp_path):
    folder = shutil.copytree(with_heads / "tied", tmp_path / "headless")
    for file in folder.glob("*.index.json"):
        file.unlink()
    edit_tensors(folder, dict.fromkeys(("lm_head.codes", "lm_head.scales", "lm_head.table")))
    printed = serve(folder, tmp_path, enforce_eager=True)
    assert "The checkpoint lacks `lm_head.codes`" in printed
    assert "Loading safetensors" not in printed


class Adapted(torch.nn.Module):
    """A layer with a LoRA adapter, as its paper has it."""

    def __init__(self, layer, down, up, scale):
        super().__init__()
        self.layer, self.down, self.up, self.scale = layer, down, up, scale

    def forward(self, x):
        return self.layer(x) + self.scale * (x @ self.down.T @ self.up.T)


def test_lora_adapters_go_on_top(quantised, with_heads, tmp_path):
    """Of merged layers (q and v, not k) and of a row-parallel one."""
    config = json.loads((quantised[4] / "config.json").read_text())
    hidden, rank = config["hidden_size"], 8
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i in range(config["num_hidden_layers"]):
        for name, (N, K) in shapes.items():
            for part, shape in (("A", (rank, K)), ("B", (N, rank))):
                key = f"base_model.model.model.layers.{i}.{name}.lora_{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.02
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    names = [name.partition(".")[2] for name in shapes]
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"bias": "none"}))

    def adapt(model):
        for key in [k for k in tensors if "lora_A" in k]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            model.set_submodule(name, Adapted(model.get_submodule(name), tensors[key], up, 2.0))

    options = {"dtype": "float32", "enforce_eager": True, "enable_lora": True}
    for folder in (quantised[4], with_heads / "tied"):
        served = serve(folder, tmp_path, adapter=adapter, max_lora_rank=rank, **options)
        assert served == transformers_tokens(folder, adapt)
        assert served != transformers_tokens(folder)
        (tmp_path / "tokens.json").unlink()


def test_a_checkpoint_without_a_tensor_is_refused(quantised, tmp_path):
    folder = shutil.copytree(quantised[4], tmp_path / "broken")
    for file in folder.glob("*.index.json"):
        file.unlink()
    edit_tensors(folder, {"model.layers.3.self_attn.k_proj.scales": None})
    printed = serve(folder, tmp_path, enforce_eager=True)
    assert "The checkpoint lacks `model.layers.3.self_attn.k_proj.scales`" in printed
    assert "Loading safetensors" not in printed


def test_configs_are_refused_before_the_engine_starts(quantised, tmp_path):
    folder = shutil.copytree(quantised[4], tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**config, "format_version": 99})
    assert "format version 99; this package reads up to 1" in serve(folder, tmp_path)
    printed = serve(DEMO_MODEL, tmp_path, quantization="flute")
    line = next(line for line in printed.splitlines() if "The model is dense" in line)
    assert "FLUTE_BITS=4" in line
    assert "flute quantize MODEL OUT" in line
    assert "Loading weights" not in printed


def test_a_dense_model_is_quantised_while_it_loads(quantised, tmp_path):
    """By the environment and by --hf-overrides: the text is that of the quantised checkpoint."""
    expected = transformers_tokens(quantised[4])
    common = {"dtype": "float32", "enforce_eager": True, "quantization": "flute"}
    by_environment = {"FLUTE_BITS": "4", "FLUTE_METHOD": "nf"}
    assert serve(DEMO_MODEL, tmp_path, by_environment, **common) == expected
    (tmp_path / "tokens.json").unlink()
    request = {"quant_method": "flute", "bits": 4, "group_size": 64, "method": "nf"}
    overrides = {"hf_overrides": {"quantization_config": request}}
    assert serve(DEMO_MODEL, tmp_path, **common, **overrides) == expected


@pytest.mark.parametrize("method", ["nf", "mse"])
def test_a_layer_quantised_while_it_loads_is_that_of_the_checkpoint(ranks, method):
    """Where a method fits a table, each of several ranks fits it to its part."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    from flute.integrations.vllm_config import FluteQuantizationConfig

    request = {"quant_method": "flute", "bits": 3, "group_size": 64, "method": method}
    config = FluteQuantizationConfig.from_config(request)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    dense = [torch.randn(64, 256, dtype=torch.bfloat16) for _ in range(3)]
    whole = [packed(flute.quantize(w, 3, 64, method=method)) for w in dense]

    def half(i, dim):
        """What rank 1 of 2 has of a weight."""
        part = dense[i].chunk(2, dim)[1]
        if method == "mse":
            return packed(flute.quantize(part, 3, 64, method=method))
        if dim == 0:
            return rows_of(whole[i], slice(32, 64))
        columns = {"packed": whole[i].packed[:, 12:], "scales": whole[i].scales[:, 2:]}
        return whole[i]._replace(**columns, K=128)

    ranks(0, 1)
    alone = RowParallelLinear(
        256, 64, prefix="l.o_proj", bias=False, quant_config=config, params_dtype=torch.bfloat16
    )
    alone.weight.weight_loader(alone.weight, dense[2])
    check(alone, whole[2], 256)
    ranks(1, 2)
    common = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
    both = MergedColumnParallelLinear(256, [64, 64], prefix="l.gate_up_proj", **common)
    assert both.weight.device.type == "meta"
    for i in range(2):
        both.weight.weight_loader(both.weight, dense[i], i)
    check(both, concat_weights([half(i, 0) for i in range(2)]), 256)
    row = RowParallelLinear(256, 64, prefix="l.down_proj", **common)
    row.weight.weight_loader(row.weight, dense[2])
    check(row, half(2, 1), 128)
    row.quant_method.process_weights_after_loading(row)  # vLLM calls it again at the end
    check(row, half(2, 1), 128)
    ranks(0, 8)
    with pytest.raises(
        UnsupportedProblemError, match=r"`l\.down_proj`: a tensor parallel size of 8"
    ):
        RowParallelLinear(256, 64, prefix="l.down_proj", **common)


def test_a_dense_weight_that_is_missing_or_wrong_is_named(ranks):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from flute.integrations.vllm_config import FluteQuantizationConfig

    config = FluteQuantizationConfig.from_config({"quant_method": "flute", "bits": 4})
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    ranks(0, 1)

    def layer():
        return MergedColumnParallelLinear(
            256, [64, 64], bias=False, quant_config=config, prefix="l.gate_up_proj"
        )

    made = layer()
    made.weight.weight_loader(made.weight, torch.randn(64, 256), 0)
    with pytest.raises(CheckpointError, match=r"lacks `l\.up_proj\.weight`"):
        made.quant_method.process_weights_after_loading(made)
    made = layer()
    made.weight.weight_loader(made.weight, torch.randn(64, 256), 0)
    with pytest.raises(FormatError, match=r"`l\.up_proj\.weight`.*NaN"):
        made.weight.weight_loader(made.weight, torch.full((64, 256), float("nan")), 1)
