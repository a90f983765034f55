"""The command line as a user meets it: results on stdout, one line on stderr, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import DEMO_MODEL, folder_bytes, save_tiny
from safetensors.torch import load_file

import flute
from flute.cli import COMMANDS, build_parser, main


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The demo model at 3 bits."""
    out = tmp_path_factory.mktemp("cli") / "demo-3bit"
    assert main(["quantize", str(DEMO_MODEL), str(out), "--bits", "3", "--method", "nf"]) == 0
    return out


def run_json(capsys, *argv):
    """Run a command with --json; returns its exit code and what it printed."""
    code = main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_quantize_reports_what_it_did(tmp_path, capsys):
    out = tmp_path / "out"
    code, report = run_json(capsys, "quantize", DEMO_MODEL, out, "--bits", 2, "--method", "nf")
    assert code == 0
    assert report["config"]["num_bits"] == 2
    assert report["weights"] == 4_718_592
    assert report["layers"] == 42
    assert report["dense"] == {"lm_head": "output head"}
    tensors = load_file(out / "model.safetensors")
    assert report["bytes_after"] == sum(t.nbytes for t in tensors.values())
    assert report["bytes_before"] > report["bytes_after"]


def test_quantize_takes_skip_table_group_and_scale_dtype(tmp_path, capsys):
    model = tmp_path / "model"
    save_tiny(model)
    table = tmp_path / "table.json"
    table.write_text("[-1.0, -0.2, 0.3, 1.0]")
    out = tmp_path / "out"
    code, report = run_json(
        capsys, "quantize", model, out, "--bits", 2, "--table", table, "--group-size", "row",
        "--scale-dtype", "float32", "--skip", "*.down_proj", "--skip", "q_proj",
    )  # fmt: skip
    assert code == 0
    assert report["config"]["table"] == "custom"
    assert report["config"]["group_size"] == -1
    assert {name.rpartition(".")[2] for name in report["dense"]} == {
        "lm_head",
        "down_proj",
        "q_proj",
    }
    tensors = load_file(out / "model.safetensors")
    layer = "model.layers.0.self_attn.k_proj"
    assert tensors[f"{layer}.scales"].dtype == torch.float32
    assert tensors[f"{layer}.scales"].shape == (32, 1)
    assert torch.equal(tensors[f"{layer}.table"], torch.tensor([[-1.0, -0.2, 0.3, 1.0]]))
    assert "model.layers.1.mlp.down_proj.weight" in tensors


def test_generate_prints_text_and_is_repeatable(quantized, capsys):
    argv = ["generate", str(quantized), "The king of", "--max-new-tokens", "8"]
    assert main(argv) == 0
    streamed = capsys.readouterr()
    assert streamed.out.startswith("The king of")
    assert "8 tokens" in streamed.err
    code, report = run_json(capsys, *argv)
    assert code == 0
    assert report["text"] == streamed.out.rstrip("\n")
    assert report["new_tokens"] == 8
    sampled = [
        run_json(capsys, *argv, "--temperature", 1.5, "--seed", seed)[1]["text"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_reads_the_prompt_from_standard_input(quantized, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("The king"))
    code, report = run_json(capsys, "generate", quantized, "-", "--max-new-tokens", 2)
    assert code == 0
    assert report["text"].startswith("The king")


def test_eval_compares_models_and_draws(quantized, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    code, report = run_json(
        capsys, "eval", DEMO_MODEL, quantized, "--window", 128, "--max-tokens", 1024, "--plot", plot
    )
    assert code == 0
    dense, small = report["results"]
    assert (dense["bits"], small["bits"]) == (16, 3)
    assert dense["tokens"] == small["tokens"] == 8 * 127
    assert dense["bytes"] > 2 * small["bytes"]
    assert small["excess_loss"] == pytest.approx(small["loss"] - dense["loss"], abs=1e-9)
    assert 0 < small["excess_loss"] < 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_measures_the_distance_from_a_reference(quantized, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    argv = ["eval", quantized, DEMO_MODEL, "--window", 128, "--max-tokens", 1024]
    code, report = run_json(capsys, *argv, "--reference", DEMO_MODEL, "--plot", plot)
    assert code == 0
    assert report["reference"] == str(DEMO_MODEL)
    assert "windows without overlap" in report["protocol"]
    dense, small = report["results"]
    assert dense["name"] == "llama-demo-7m"
    assert "kl" not in dense
    assert small["kl"].keys() == {"mean", "error", "p50", "p90", "p99"}
    assert 0 < small["kl"]["p50"] < small["kl"]["mean"] < small["kl"]["p99"]
    assert 0 < small["kl"]["error"] < small["kl"]["mean"] < 0.5
    assert 0.5 < small["agreement"]["mean"] < 0.95
    assert small["perplexity_error"] == pytest.approx(small["perplexity"] * small["loss_error"])
    assert (dense["bits_per_weight"], round(small["bits_per_weight"], 2)) == (16, 3.25)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*map(str, argv), "--reference", str(DEMO_MODEL)]) == 0
    printed = capsys.readouterr().out
    assert "same top token" in printed
    assert "KL(reference || model)" in printed


def test_eval_asks_tasks_and_refuses_what_it_cannot_ask(quantized, tmp_path, capsys, monkeypatch):
    import flute.integrations.lm_eval as adapter

    task = tmp_path / "opposites.jsonl"
    task.write_text('{"query": "Hot is not", "choices": ["cold", "warm"], "gold": 0}\n')
    asked = []

    def run_tasks(model, tokenizer, tasks, limit):
        asked.append((tasks.local["opposites"], limit))
        return {"opposites": {"acc": 0.75, "acc_error": 0.25, "samples": 4}}

    monkeypatch.setattr(adapter, "check_installed", lambda: None)
    monkeypatch.setattr(adapter, "run_tasks", run_tasks)
    plot = tmp_path / "plot.png"
    argv = ["eval", quantized, "--window", 64, "--max-tokens", 256, "--tasks", task]
    code, report = run_json(capsys, *argv, "--task-limit", 3, "--plot", plot)
    assert code == 0
    assert report["results"][0]["tasks"]["opposites"]["acc"] == 0.75
    assert asked == [([adapter.Question(("Hot is not",), ("cold", "warm"), 0)], 3)]
    assert plot.stat().st_size > 10_000
    assert main([*map(str, argv)]) == 0
    assert "acc 0.750 +- 0.250" in capsys.readouterr().out


def test_eval_needs_the_references_tokens(quantized, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(quantized, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    argv = ["eval", other, "--reference", DEMO_MODEL, "--window", 64, "--max-tokens", 256]
    assert main([*map(str, argv)]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"`{other}`: This model's tokenizer cuts the text into other tokens" in error


def test_inspect_shows_bits_sizes_and_errors(quantized, capsys):
    code, report = run_json(capsys, "inspect", quantized, "--dense", DEMO_MODEL)
    assert code == 0
    assert report["checksums_verified"] == len(load_file(quantized / "model.safetensors"))
    assert len(report["layers"]) == 42
    for layer in report["layers"]:
        N, K = layer["shape"]
        assert layer["bits_per_weight"] == pytest.approx(3 + 16 / 64 + 8 * 32 / (N * K))
        assert 0.02 < layer["error"] < 0.06
    assert main(["inspect", str(quantized)]) == 0
    assert "3.25" in capsys.readouterr().out


def test_inspect_of_a_dense_model_says_what_would_be_quantised(capsys):
    code, report = run_json(capsys, "inspect", DEMO_MODEL)
    assert code == 0
    assert len(report["layers"]) == 42
    assert report["dense"] == {"lm_head": "output head"}


def test_inspect_finds_a_flipped_bit(quantized, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in folder_bytes(quantized).items():
        (copy / name).write_bytes(content)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert main(["inspect", str(copy)]) == 1
    assert "is corrupted: crc32" in capsys.readouterr().err


def test_doctor_names_the_path_of_each_call(capsys):
    code, report = run_json(capsys, "doctor")
    assert code == 0
    assert report["machine"]["flute"] == flute.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert {row["device"] for row in report["paths"]} >= {"cpu"}
    assert all("PyTorch" in row["path"] for row in report["paths"] if row["device"] == "cpu")
    assert main(["doctor"]) == 0


def test_doctor_reports_the_originals_package(monkeypatch, capsys):
    from flute.cli import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: "0.4.2" if p == "flute-kernel" else real(p))
    code, report = run_json(capsys, "doctor")
    assert code == 1
    assert "pip uninstall flute-kernel" in report["problems"][0]


def test_every_command_teaches_by_example(capsys):
    for command in COMMANDS:
        name = command.__doc__.split("`flute ")[1].split("`")[0]
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "examples:" in text
        assert f"  flute {name}" in text
        assert "--json" in text or name == "serve"  # whose results are answers to requests


def test_the_installed_command_and_version():
    run = subprocess.run(
        [sys.executable, "-c", "from flute.cli import main; main(['--version'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == f"flute {flute.__version__}"
