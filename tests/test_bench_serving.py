"""The serving benchmarks: their random models, what they keep, and the engine without vLLM."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, ROOT, python, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
serving_models = pytest.importorskip("serving_models")
profile_decode = pytest.importorskip("profile_decode")

from flute.format import CheckpointConfig, QuantSpec  # noqa: E402
from flute.linear import LutLinear  # noqa: E402
from flute.model import QuantizeOptions  # noqa: E402
from flute.stream import quantize_checkpoint  # noqa: E402

BENCH = (
    "import runpy, sys; sys.path.insert(0, 'benchmarks'); sys.argv[0] = 'bench'; "
    "runpy.run_path('benchmarks/bench_serving.py', None, '__main__')"
)


def bench(*arguments):
    return run_python(BENCH, *arguments)


@pytest.mark.parametrize("variant", ["w4", "w3", "w2"])
def test_folders_say_how_they_are_quantised(tmp_path, variant):
    serving_models.write_folder(tmp_path, variant, "tiny", 1, DEMO_MODEL)
    config = json.loads((tmp_path / "config.json").read_text())
    found = CheckpointConfig.from_dict(config["quantization_config"])
    assert (found.num_bits, found.group_size) == (int(variant[1]), 128)
    assert found.modules_to_not_convert == ("lm_head",)
    assert config["num_hidden_layers"] == 1
    assert (tmp_path / "tokenizer.json").exists()


def test_variants_with_a_quantised_head(tmp_path):
    serving_models.write_folder(tmp_path, "w2h", "tiny", 1, DEMO_MODEL)
    config = json.loads((tmp_path / "config.json").read_text())
    found = CheckpointConfig.from_dict(config["quantization_config"])
    assert found.quantized_head == "lm_head"
    assert found.spec_of("lm_head") == QuantSpec(4, 64)
    assert found.spec_of("model.layers.0.mlp.up_proj") == QuantSpec(2, 128)
    model = serving_models.random_model("w2h", "tiny", 1, torch.device("cpu"))
    assert model.lm_head.spec == QuantSpec(4, 64)
    assert model.lm_head.out_features == 8192


def test_random_models_are_quantised_but_for_the_head():
    model = serving_models.random_model("w3", "tiny", 1, torch.device("cpu"))
    layers = [m for m in model.modules() if isinstance(m, (LutLinear, torch.nn.Linear))]
    assert [type(m) for m in layers].count(LutLinear) == len(layers) - 1 == 7
    assert type(model.lm_head) is torch.nn.Linear
    out = model(torch.tensor([[5, 6, 7]])).logits
    assert bool(torch.isfinite(out).all())


def test_transformers_engine_keeps_a_record_per_setting(tmp_path):
    out = tmp_path / "records.json"
    arguments = ["run", "--engine", "transformers", "--model", "tiny", "--layers", "1"]
    arguments += ["--variants", "fp16", "w4", "--concurrency", "2", "--input-tokens", "8"]
    arguments += ["--output-tokens", "4", "--long-prompt", "16", "--rounds", "1"]
    arguments += ["--backend", "none", "--device", "cpu"]
    arguments += ["--work", str(tmp_path), "--out", str(out)]
    bench(*arguments)
    records = json.loads(out.read_text())["records"]
    assert [(r["variant"], r["concurrency"], r["input_tokens"]) for r in records] == [
        ("fp16", 2, 8),
        ("fp16", 1, 16),
        ("w4", 2, 8),
        ("w4", 1, 16),
    ]
    first = records[0]
    assert first["output_throughput"] > 0
    assert first["median_ttft_ms"] > 0
    # Two sequences of three tokens each, after the first; not of the sign, which load can turn.
    token = 1e3 * 2 / first["decode_throughput"]
    assert first["median_tpot_ms"] == pytest.approx(token, rel=0.05)


def test_your_own_models_are_measured_as_they_are(tmp_path):
    quantize_checkpoint(DEMO_MODEL, tmp_path / "w3", QuantizeOptions(3, 64, method="nf"))
    out = tmp_path / "records.json"
    arguments = ["--engine", "transformers", "--model", DEMO_MODEL, tmp_path / "w3"]
    arguments += ["--concurrency", "1", "--input-tokens", "8", "--output-tokens", "4", "--rounds"]
    arguments += ["1", "--long-prompt", "0", "--backend", "none", "--device", "cpu"]
    arguments += ["--work", tmp_path / "work", "--out", out]
    printed = bench(*arguments)
    records = json.loads(out.read_text())["records"]
    assert [(r["variant"], r["shape"]) for r in records] == [
        ("llama-demo-7m", "folder"),
        ("w3", "folder"),
    ]
    assert "w3: model made in" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-folder"], "no config.json there; expected a folder, or llama-3-8b"),
        (["--model", "tiny", "llama-3-8b"], "expected one name of shapes, or folders"),
        (["--model", DEMO_MODEL, DEMO_MODEL], "two folders are named llama-demo-7m"),
        (["--model", DEMO_MODEL, "--layers", "1"], "not a folder's model"),
        (["--variants", "w5"], "expected some of fp16, w4, w3, w2, gptq, w4h"),
        (["--variants", "w4@FLUTE_VLLM_PDL"], "`@FLUTE_VLLM_PDL` is not @VARIABLE=VALUE"),
        (["--engine", "transformers", "--variants", "w4@A=1"], "set the variables for it"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_a_line(arguments, message):
    process = python(BENCH, *arguments)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert message in printed.splitlines()[-1]


def test_a_variant_s_server_has_its_environment(tmp_path, monkeypatch):
    import bench_serving
    import serving_vllm

    variants = ["w4h", "w4h@FLUTE_VLLM_PDL=0,A=b=c"]
    arguments = ["start", "--model", "tiny", "--variants", *variants, "--work", str(tmp_path)]
    started = []
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    monkeypatch.setattr(
        serving_vllm.subprocess,
        "Popen",
        lambda command, env, **_: started.append((command, env)) or SimpleNamespace(pid=1),
    )
    monkeypatch.setattr(serving_vllm, "wait", lambda work, seconds: None)
    monkeypatch.delenv("FLUTE_VLLM_PDL", raising=False)
    bench_serving.main()
    (first, plain), (second, changed) = started
    assert "FLUTE_VLLM_PDL" not in plain
    assert (changed["FLUTE_VLLM_PDL"], changed["A"]) == ("0", "b=c")
    assert first[first.index("--model") + 1] == second[second.index("--model") + 1]
    servers = json.loads((tmp_path / "servers.json").read_text())
    assert [server["port"] for server in servers.values()] == [8100, 8101]
    assert list(servers) == variants


GIB = 2**30


def test_peers_say_which_layers_are_quantised(tmp_path):
    """vLLM asks the files where config.json does not say, and finds none: all would be dense."""
    serving_models.write_folder(tmp_path, "gptq", "tiny", 1, DEMO_MODEL)
    given = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    named = given["modules_in_block_to_quantize"]
    model = serving_models.random_model("fp16", "tiny", 1, torch.device("cpu"))
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(named) == 7
    assert [n for n in linears if not any(part in n for part in named)] == ["lm_head"]
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils import gptq_utils

    config = AutoGPTQConfig.from_config(given)
    config.maybe_update_config(str(tmp_path))
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    for layer in layers:
        prefix = f"model.layers.0.{layer}"
        found = config.modules_in_block_to_quantize
        assert gptq_utils.is_layer_gptq_quantized(prefix, found, fused), layer


def test_bytes_of_a_variant_are_those_of_its_tensors():
    for variant in ("fp16", "w3", "w2h"):
        model = serving_models.random_model(variant, "tiny", 1, torch.device("cpu"))
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        ends = ("codes", "scales", "weight")
        tensors = [t for n, t in named.items() if n.endswith(ends) and t.ndim == 2]
        size = sum(t.numel() * t.element_size() for t in tensors)
        assert serving_models.weight_bytes(variant, "tiny", 1) == size
    # What vLLM 0.26 said on an H200.
    assert serving_models.weight_bytes("fp16", "llama-3-8b") / GIB == pytest.approx(14.96, abs=0.01)
    assert serving_models.weight_bytes("w4", "llama-3-8b") / GIB == pytest.approx(5.33, abs=0.03)


def test_a_model_that_was_not_quantised_is_noticed():
    for variant in serving_models.VARIANTS:
        for layers in (1, None):
            own = serving_models.weight_bytes(variant, "llama-3-8b", layers)
            dense = serving_models.weight_bytes("fp16", "llama-3-8b", layers)
            found = [
                serving_models.is_served_dense(variant, "llama-3-8b", layers, loaded)
                for loaded in (1.01 * own, 0.99 * dense)
            ]
            assert found == [False, variant != "fp16"], (variant, layers)


@pytest.mark.parametrize(
    ("lines", "gib"),
    [
        ("INFO: Resolved architecture: LlamaForCausalLM", None),
        ("world_size=1 rank=0\nModel loading took 5.33 GiB and 10.403216 seconds", 5.33),
        ("world_size=2 rank=0\nworld_size=2 rank=1\nModel loading took 7.5 GiB memory and", 15.0),
        ("world_size=2 rank=0\n" + "Model loading took 7.5 GiB and 2 seconds\n" * 2, 15.0),
    ],
)
def test_what_a_model_takes_is_read_in_its_server_s_log(tmp_path, lines, gib):
    import serving_vllm

    (tmp_path / "w4.log").write_text(lines)
    found = serving_vllm.loaded_bytes(tmp_path, "w4")
    assert found == (None if gib is None else pytest.approx(gib * GIB))


def test_a_variant_that_vllm_serves_dense_is_left_out(tmp_path, monkeypatch, capsys):
    import bench_serving
    import serving_vllm

    for variant, gib in (("fp16", 14.96), ("gptq", 14.96), ("w4", 5.33)):
        (tmp_path / f"{variant}.log").write_text(f"Model loading took {gib} GiB and 2 seconds")
    server = {"port": 8100, "max_length": 4096}
    monkeypatch.setattr(serving_vllm, "running", lambda work: dict.fromkeys(variants, server))
    monkeypatch.setattr(serving_vllm, "is_up", lambda port: True)
    monkeypatch.setattr(serving_vllm, "measure", lambda *_, **__: {"output_throughput": 1.0})
    variants = ["fp16", "gptq", "w4"]
    arguments = ["measure", "--concurrency", "1", "--long-prompt", "0", "--variants", *variants]
    arguments += ["--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    bench_serving.main()
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert [(r["variant"], r["model_gib"]) for r in records] == [("fp16", 14.96), ("w4", 5.33)]
    printed = capsys.readouterr().out
    assert "gptq: its model takes 14.96 GiB, as much as a dense one: vLLM did not" in printed


SERVER = """
import time
print("Loading weights, slowly", flush=True)
time.sleep(300)
"""


def test_a_start_that_is_cut_off_shows_the_logs_and_leaves_no_server(tmp_path):
    for name, text in (("entrypoints/openai/api_server", SERVER), ("benchmarks/serve", "")):
        file = tmp_path / "site" / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    work = tmp_path / "work"
    arguments = ["start", "--model", "tiny", "--variants", "fp16", "w4", "--work", work]
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    process = python(BENCH, *arguments, PYTHONPATH=path)
    logs = [work / "fp16.log", work / "w4.log"]
    deadline = time.monotonic() + 100
    while not all(log.exists() and "slowly" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.1)
    servers = json.loads((work / "servers.json").read_text())
    time.sleep(1)  # it waits for them
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    for variant in ("fp16", "w4"):
        assert f"{variant}: no answer in" in printed
        with pytest.raises(ProcessLookupError):
            os.kill(servers[variant]["pid"], 0)
    assert printed.count("Loading weights, slowly") == 2
    assert "ended by SIGTERM" in printed
    assert json.loads((work / "servers.json").read_text()) == {}


def test_help_shows_how_to_measure_your_own_model():
    printed = bench("--help")
    assert "python benchmarks/bench_serving.py --model MODEL OUT --out serving.json" in printed


@pytest.mark.parametrize("dense", [[], ["--dense"]], ids=["packed", "dense"])
def test_loading_is_measured(tmp_path, dense):
    out = tmp_path / "load.json"
    arguments = ["--shape", "tiny", "--layers", "2", "--device", "cpu", *dense]
    arguments += ["--work", str(tmp_path / "shards"), "--out", str(out)]
    code = "import runpy, sys; sys.path.insert(0, 'benchmarks'); "
    run_python(code + "runpy.run_path('benchmarks/bench_load.py', None, '__main__')", *arguments)
    record = json.loads(out.read_text())
    packed = 2 * (3 * 256 * 768 + 3 * 256 * 256) / 2  # q, o and two half-size k and v make three
    assert packed < record["parameter_bytes"] - 2 * 2 * 8192 * 256 < 2 * packed
    assert record["seconds"] > 0


def test_time_of_a_token_is_shared_out(tmp_path):
    """Kernels that overlap count once; times and gaps add up to the whole."""
    events = [
        {"cat": "kernel", "name": "void lut_gemm<4>(x)", "ts": 10.0, "dur": 5.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 90.0},
        {"cat": "kernel", "name": "norm", "ts": 14.0, "dur": 3.0},
        {"cat": "kernel", "name": "void lut_gemm<3>(x)", "ts": 19.0, "dur": 1.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 25.0, "dur": 2.0},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    rows = profile_decode.shares(profile_decode.read_trace(tmp_path / "trace.json"), 1)
    assert rows == [("lut_gemm", 2.0, 6.0, 2.0), ("Memcpy", 1.0, 2.0, 5.0), ("norm", 1.0, 2.0, 0.0)]
    assert sum(row.time + row.gap for row in rows) == 27.0 - 10.0
