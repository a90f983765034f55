"""What vLLM's layers stand for and how their rows are cut: arithmetic, messages, the command.

None of it needs vLLM.
"""

from __future__ import annotations

import sys
import tomllib
from math import lcm

import pytest
import torch
from helpers import ROOT, random_weight

from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig, PackedWeight, QuantSpec
from flute.integrations import vllm as plugin
from flute.integrations.vllm_layers import (
    check_tensor_names,
    cut_rows,
    environment_request,
    is_quantized_head,
    parts_of,
    request_of,
    spec_of_parts,
    stays_dense,
)
from flute.pack import pack_codes
from flute.reference import dequantize_packed

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ROW_PARALLEL = {  # input features of the output projection and of the down projection
    "llama-3-8b": (4096, 14336),
    "llama-3-70b": (8192, 28672),
    "llama-3-405b": (16384, 53248),
    "gemma-2-9b": (4096, 14336),
    "gemma-2-27b": (4096, 36864),
    "qwen-3-8b": (4096, 12288),
    "qwen-3-32b": (8192, 25600),
    "llama-2-7b": (4096, 11008),
}


@pytest.mark.parametrize("model", ROW_PARALLEL)
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_each_rank_s_shard_is_the_slice_of_the_whole(model, num_bits):
    for K in ROW_PARALLEL[model]:
        for group_size in (32, 64, 128, 256, -1):
            spec = QuantSpec(num_bits, group_size)
            if group_size > 0 and K % group_size:
                continue
            weight = random_weight(2, K, spec)
            packed = pack_codes(weight.codes, num_bits)
            dense = dequantize_packed(
                PackedWeight(packed, weight.scales, weight.table, spec, 2, K), torch.float32
            )
            for ranks in (1, 2, 4, 8):
                if K % (ranks * lcm(32, max(group_size, 1))):
                    with pytest.raises(UnsupportedProblemError, match="`down`: a tensor"):
                        cut_rows("down", spec, K, ranks)
                    continue
                part = cut_rows("down", spec, K, ranks)
                assert part.K * ranks == K
                for rank in range(ranks):
                    columns = slice(rank * part.K, (rank + 1) * part.K)
                    codes = packed[:, rank * part.words : (rank + 1) * part.words]
                    first = 0 if group_size == -1 else rank * part.groups
                    scales = weight.scales[:, first : first + part.groups]
                    assert torch.equal(codes, pack_codes(weight.codes[:, columns], num_bits))
                    shard = PackedWeight(codes, scales, weight.table, spec, 2, part.K)
                    assert torch.equal(dequantize_packed(shard, torch.float32), dense[:, columns])


def test_an_uneven_shard_is_refused_by_name_with_what_would_do():
    with pytest.raises(UnsupportedProblemError) as error:
        cut_rows("model.layers.0.mlp.down_proj", QuantSpec(4, 128), 11008, 4)
    assert str(error.value) == (
        "`model.layers.0.mlp.down_proj`: a tensor parallel size of 4 cuts its K=11008 input "
        "features into parts of 2752; expected a multiple of 128, its group. Use a tensor "
        "parallel size of 1 or 2, or a checkpoint quantised with --group-size 32 or 64 or -1."
    )
    with pytest.raises(UnsupportedProblemError, match="of 32, whole words of codes"):
        cut_rows("down", QuantSpec(3, -1), 32 * 3, 2)


def test_a_whole_layer_may_have_rows_of_any_length():
    assert cut_rows("odd", QuantSpec(3, -1), 50, 1) == (50, 5, 1)
    with pytest.raises(FormatError, match="K=50 is not a multiple of group_size=64"):
        cut_rows("odd", QuantSpec(3, 64), 50, 1)


def test_merged_layers_stand_for_their_parts():
    config = CheckpointConfig(modules_to_not_convert=("lm_head", "h.1.qkv_proj"))
    parts = tuple(f"h.0.{p}" for p in MERGED["qkv_proj"])
    assert parts_of("h.0.qkv_proj", config, MERGED) == parts
    assert parts_of("h.0.o_proj", config, MERGED) == ("h.0.o_proj",)
    assert parts_of("o_proj", config, MERGED) == ("o_proj",)
    assert parts_of("h.1.qkv_proj", config, MERGED) == ("h.1.qkv_proj",)  # merged on disk


def test_specs_of_merged_layers():
    config = CheckpointConfig(
        3,
        128,
        modules_to_not_convert=("lm_head", "a.gate_proj", "a.up_proj", "b.up_proj"),
        overrides={"c.q_proj": {"num_bits": 4}, "d.down_proj": {"group_size": 64}},
    )

    def spec(name):
        return spec_of_parts(parts_of(name, config, MERGED), config)

    assert spec("a.qkv_proj") == QuantSpec(3, 128)
    assert spec("d.down_proj") == QuantSpec(3, 64)
    assert spec("a.gate_up_proj") is None
    assert spec("lm_head") is None
    assert spec("a.mlp.gate") is None  # a router
    with pytest.raises(UnsupportedProblemError, match=r"`b\.up_proj` is dense and `b\.gate_proj`"):
        spec("b.gate_up_proj")
    with pytest.raises(UnsupportedProblemError, match=r"`c\.q_proj` has 4 bits .* `c\.k_proj` 3"):
        spec("c.qkv_proj")


def test_the_head_is_found_below_other_components():
    config = CheckpointConfig(quantized_head="lm_head")
    for name in ("lm_head", "language_model.lm_head", ".lm_head"):
        assert is_quantized_head(name, config)
    for name in ("head", "film_head", "model.layers.9.shared_head.head", "lm_head.inner"):
        assert not is_quantized_head(name, config)
    assert not is_quantized_head("lm_head", CheckpointConfig())


def test_a_layer_without_one_of_its_tensors_is_named():
    names = ["h.0.q_proj.codes", "h.0.q_proj.scales", "h.0.q_proj.table", "norm.weight"]
    check_tensor_names(names)
    for i, missing in enumerate(names[:3]):
        with pytest.raises(CheckpointError, match=f"lacks `{missing}`"):
            check_tensor_names(names[:i] + names[i + 1 :])


# ---- dense models


def test_what_a_dense_model_is_quantised_to(monkeypatch):
    assert environment_request() == {}
    with pytest.raises(UnsupportedProblemError, match=r"The model is dense.*set FLUTE_BITS=4"):
        request_of({})
    monkeypatch.setenv("FLUTE_BITS", "3")
    monkeypatch.setenv("FLUTE_GROUP_SIZE", "128")
    monkeypatch.setenv("FLUTE_TABLE", "int")
    options = request_of(environment_request())
    assert (options.num_bits, options.group_size, options.table) == (3, 128, "int")
    assert options.method == "mse"
    monkeypatch.setenv("FLUTE_BITS", "four")
    with pytest.raises(FormatError, match=r"FLUTE_BITS='four'; expected a whole number"):
        environment_request()
    monkeypatch.setenv("FLUTE_BITS", "3")
    monkeypatch.setenv("FLUTE_HEAD_BITS", "4")
    monkeypatch.setenv("FLUTE_HEAD_GROUP_SIZE", "32")
    options = request_of(environment_request())
    assert (options.head_bits, options.head_group_size) == (4, 32)
    monkeypatch.setenv("FLUTE_HEAD_BITS", "4.5")
    with pytest.raises(FormatError, match=r"FLUTE_HEAD_BITS='4.5'; expected a whole number"):
        environment_request()
    options = request_of({"quant_method": "flute", "bits": 2, "modules_to_not_convert": ["o_proj"]})
    assert (options.num_bits, options.skip) == (2, ("o_proj",))
    for request, message in (
        ({"bits": 5}, "`num_bits` is 5"),
        ({"bits": 4, "gruop": 3}, r"keys \['gruop'\]"),
        ({"bits": 4, "method": "gptq"}, "needs calibration text, which vLLM has not"),
    ):
        with pytest.raises(FormatError, match=message):
            request_of(request)


def test_what_stays_dense_in_a_model_quantised_while_it_loads():
    parts = tuple(f"h.0.{p}" for p in MERGED["qkv_proj"])
    assert not stays_dense(parts, ["*.o_proj"])
    assert stays_dense(parts, ["*.0.*"])
    assert stays_dense(["h.0.mlp.gate"], [])
    with pytest.raises(UnsupportedProblemError, match=r"names `h\.0\.k_proj` only"):
        stays_dense(parts, ["k_proj"])


# ---- the plugin without vLLM


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)


def test_registering_without_vllm_does_nothing(no_vllm):
    plugin.register()
    plugin.register()


def test_a_vllm_that_does_not_fit_is_a_warning(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "flute.integrations.vllm_config", None)
    with pytest.warns(UserWarning, match="FLUTE could not register with vLLM"):
        plugin.register()


def test_the_entry_point_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    assert points == {"flute": "flute.integrations.vllm:register"}


def test_the_command_without_vllm_says_so(no_vllm, capsys):
    assert plugin.main(["vllm.entrypoints.openai.api_server", "--model", "m"]) == 1
    error = capsys.readouterr().err
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["vllm"]
    assert f"pip install '{wanted}'" in error
    assert len(error.strip().splitlines()) == 1


def test_the_command_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        plugin.main(["--help"])
    assert "--tensor-parallel-size 2 --quantization flute" in capsys.readouterr().out


def test_the_command_runs_a_module_with_its_arguments(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "find_spec", lambda name: object() if name == "vllm" else None)
    with pytest.raises(SystemExit, match="2"):
        plugin.main(["vllm.no_such_module"])
    (tmp_path / "stand_in.py").write_text(
        "import sys\nassert __name__ == '__main__'\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugin, "find_spec", lambda name: object())
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(sys, "argv", ["before"])
    words = ["--model", "out", "--tensor-parallel-size", "2", "--quantization", "flute"]
    assert plugin.main(["stand_in", *words]) == 0
    assert (tmp_path / "seen").read_text().split() == words
