"""Wrong input on the command line: one line that says what to do, and no half-made OUT."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings

import pytest
import torch
from helpers import DEMO_MODEL, edit_json, edit_tensors, folder_bytes, save_tiny

from flute.cli import loading, main


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The demo model at 3 bits."""
    out = tmp_path_factory.mktemp("cli") / "demo-3bit"
    assert main(["quantize", str(DEMO_MODEL), str(out), "--bits", "3", "--method", "nf"]) == 0
    return out


def refused(capsys, *argv, code=1):
    """Run a command that fails; returns the one line that it told."""
    capsys.readouterr()
    assert main([*map(str, argv)]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    return lines[-1]


FAILURES = {
    "missing folder": (["quantize", "{tmp}/none", "{tmp}/out"], "is not a folder"),
    "unreachable hub model": (
        ["quantize", "no/such-model", "{tmp}/out"],
        "cannot be had from the Hub",
    ),
    "occupied output": (["quantize", "{demo}", "{tmp}"], "exists and is not empty"),
    "quantised twice": (["quantize", "{quantized}", "{tmp}/out"], "is quantised already"),
    "bad table": (["quantize", "{demo}", "{tmp}/out", "--table", "[1,2]"], "expected one of"),
    "contradicting table": (
        ["quantize", "{demo}", "{tmp}/out", "--method", "nf", "--table", "int"],
        "always uses the nf table",
    ),
    "no device": (
        ["quantize", "{demo}", "{tmp}/out", "--device", "cuda:99"],
        "`flute doctor` shows the GPUs that torch sees",
    ),
    "unknown device": (
        ["quantize", "{demo}", "{tmp}/out", "--device", "gpu"],
        "torch knows none of this name. Use cpu or cuda",
    ),
    "no name": (["quantize", "", "{tmp}/out"], "The model's name is empty"),
    "table of no numbers": (
        ["quantize", "{demo}", "{tmp}/out", "--table", "{tmp}/text.npy"],
        "it is no .npy file; write one by numpy.save",
    ),
    "no text": (["eval", "{quantized}", "--text", "{tmp}/none.txt"], "is no text file"),
    "window beyond context": (
        ["eval", "{quantized}", "--window", "4096"],
        "context is 2048 tokens",
    ),
    "empty text": (["eval", "{quantized}", "--text", "{tmp}/empty.txt"], "The text has 0 tokens"),
    "no task": (["eval", "{quantized}", "--tasks", "{tmp}/none.jsonl"], "is no task file"),
    "plot to nowhere": (["eval", "{quantized}", "--plot", "{tmp}/no/p.png"], "is not a folder"),
    "plot of no kind": (["eval", "{quantized}", "--plot", "{tmp}/p.xyz"], "has suffix '.xyz'"),
    "window of nothing": (["eval", "{quantized}", "--window", "0"], "`--window` is 0; expected"),
    "no tokens of the text": (
        ["eval", "{quantized}", "--max-tokens", "0"],
        "`--max-tokens` is 0; expected at least 2",
    ),
    "no questions": (
        ["eval", "{quantized}", "--tasks", "x.jsonl", "--task-limit", "0"],
        "`--task-limit` is 0; expected at least 1",
    ),
    "no tokens": (["generate", "{quantized}", "x", "--max-new-tokens", "0"], "expected at least 1"),
    "empty prompt": (["generate", "{quantized}", ""], "The prompt is empty"),
    "negative temperature": (
        ["generate", "{quantized}", "x", "--temperature", "-1"],
        "expected 0 or",
    ),
    "endless temperature": (
        ["generate", "{quantized}", "x", "--temperature", "inf"],
        "`--temperature` is inf; expected 0 or more",
    ),
    "no number as temperature": (
        ["generate", "{quantized}", "x", "--temperature", "nan"],
        "`--temperature` is nan; expected 0 or more",
    ),
    "dense without need": (["inspect", "{demo}", "--dense", "{demo}"], "is not quantised"),
    "convert of ours": (["convert", "{quantized}", "{tmp}/out"], "is a FLUTE checkpoint already"),
    "convert of dense": (["convert", "{demo}", "{tmp}/out"], "is not quantised"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line_and_exit_code_1(case, quantized, tmp_path, capsys):
    (tmp_path / "something").write_text("here")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.npy").write_text("0.1 0.2")
    argv, message = FAILURES[case]
    places = {"tmp": tmp_path, "demo": DEMO_MODEL, "quantized": quantized}
    assert message in refused(capsys, *(word.format(**places) for word in argv))
    assert not (tmp_path / "out").exists()


def test_generate_without_tokenizer_says_what_to_copy(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "hello"]) == 1
    assert "Copy the tokenizer's files" in capsys.readouterr().err


def test_a_newer_format_is_refused(quantized, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in folder_bytes(quantized).items():
        (copy / name).write_bytes(content)
    config = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_json(copy / "config.json", quantization_config={**config, "format_version": 2})
    for argv in (["inspect", copy], ["generate", copy, "hello"], ["eval", copy]):
        assert main([*map(str, argv)]) == 1
        assert "format version 2; this package reads up to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: COMMAND. `flute --help` shows"),
        ("quantize", "are required: model, out. `flute quantize --help` shows what it takes"),
        ("nonsense", "invalid choice: 'nonsense' (choose from 'quantize', 'generate'"),
        ("quantize a b --bits 5", "5 is not one of (2, 3, 4), nor between them"),
        ("quantize a b --bits four", "'four' is no number; expected 2, 3, 4 or 3.25"),
        ("quantize a b --bits inf", "'inf' is no number; expected 2, 3, 4 or 3.25"),
        ("quantize a b --group-size x", "'x' is no group size; expected 32, 64, 128, 256 or row"),
        ("quantize a b --group-size 48", "'48' is no group size; expected 32, 64, 128, 256 or row"),
        ("quantize a b --head-group-size 0", "'0' is no group size; expected 32, 64, 128, 256"),
        ("tune a --group-size x", "'x' is no group size; expected 32, 64, 128, 256 or row"),
        (f"quantize a b --seed {1 << 63}", "is no seed; expected a number of 64 bits"),
        (f"generate a b --seed {1 << 63}", "is no seed; expected a number of 64 bits"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv.split())
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("flute.stream.quantize_checkpoint", interrupt)
    assert main(["quantize", "a", "b"]) == 130
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-(1 << 63), -1, (1 << 63) - 1])
def test_every_seed_of_64_bits_is_taken(seed, quantized, capsys):
    argv = ["generate", quantized, "hi", "--temperature", 1, "--max-new-tokens", 1]
    assert main([*map(str, argv), "--seed", str(seed)]) == 0
    assert "1 tokens" in capsys.readouterr().err


def test_a_missing_model_is_found_before_another_is_measured(quantized, tmp_path, capsys):
    """And without asking the Hub, whose retries take most of a minute."""
    argv = ["eval", quantized, tmp_path / "none", "--window", 64, "--max-tokens", 256]
    assert "none` is not a folder; expected a model checkpoint" in refused(capsys, *argv)
    argv = ["eval", quantized, "--reference", "nothing-here", "--max-tokens", 256]
    assert "`nothing-here` is not a folder" in refused(capsys, *argv)
    assert "`nothing-here` is not a folder" in refused(
        capsys, "quantize", "nothing-here", tmp_path / "out", "--method", "gptq",
        "--calibration", DEMO_MODEL / "config.json",
    )  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A model of 96 tokens, with the demo model's tokenizer, which knows more."""
    save_tiny(tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_that_lacks_weights_is_not_filled_with_random_ones(
    tiny, quantized, tmp_path, capsys
):
    edit_tensors(tiny, {"model.layers.0.mlp.up_proj.weight": None})
    line = refused(capsys, "generate", tiny, "hello")
    assert "lacks 1 parameters of LlamaForCausalLM, such as `model.layers.0.mlp.up_proj" in line
    shutil.copytree(quantized, tmp_path / "lost")
    edit_json(tmp_path / "lost" / "config.json", quantization_config=...)
    line = refused(capsys, "generate", tmp_path / "lost", "hello")
    assert "lost` holds `model.layers.0.mlp.down_proj.codes` (42 quantised layers), and its" in line
    assert "no `quantization_config`: it is another model's. Restore the checkpoint's own." in line


def test_a_checkpoint_that_needs_another_library(tiny, capsys):
    edit_json(tiny / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    line = refused(capsys, "generate", tiny, "hello")
    assert re.search(r"tiny` cannot be loaded: .*(optimum|gptqmodel)", line)


def test_a_tokenizer_of_another_model(tiny, capsys):
    line = refused(capsys, "generate", tiny, "Once upon a time")
    assert "the model knows 96 tokens: they do not belong together" in line


def test_more_tokens_than_the_context_holds(quantized, capsys):
    line = refused(capsys, "generate", quantized, "hi " * 2500)
    assert re.search(r"The prompt has \d+ tokens; the model's context is 2048\. Shorten", line)
    argv = ["generate", quantized, "hi " * 1000, "--max-new-tokens", 4000, "--json"]
    assert main([*map(str, argv)]) == 0
    printed = capsys.readouterr()
    room = int(re.search(r"context is 2048 tokens: at most (\d+) follow", printed.err)[1])
    assert 0 < json.loads(printed.out)["new_tokens"] <= room < 2048 - 1000


def test_a_prompt_that_is_no_text(quantized, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    line = refused(capsys, "generate", quantized, "-")
    assert "The prompt on standard input is no text: 'utf-8' codec can't decode byte 0xff" in line


def test_a_config_that_transformers_refuses(tiny, tmp_path, capsys):
    edit_json(tiny / "config.json", hidden_size="many")
    line = refused(capsys, "quantize", tiny, tmp_path / "out")
    assert "'hidden_size' expected int, got str (value: 'many'). Upgrade transformers" in line


def test_inspect_of_files_and_a_config_that_do_not_belong_together(quantized, tmp_path, capsys):
    out = tmp_path / "other"
    shutil.copytree(quantized, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_json(out / "config.json", quantization_config={**config, "num_bits": 4})
    line = refused(capsys, "inspect", out)
    assert re.search(r"proj\.codes` has shape \(\d+, \d+\); expected \(\d+, \d+\) for scales", line)
    assert "The files and their config.json do not belong together." in line


def test_inspect_beside_another_model(quantized, tiny, capsys):
    line = refused(capsys, "inspect", quantized, "--dense", tiny)
    assert "_proj.weight` has shape (64, 128) in" in line
    assert line.endswith("it is another model.")


@pytest.mark.parametrize("more", [(), ("--reference", DEMO_MODEL)])
def test_a_plot_that_cannot_be_written_loses_no_results(
    quantized, tmp_path, capsys, monkeypatch, more
):
    (tmp_path / "folder.png").mkdir()
    argv = ["eval", quantized, "--window", 64, "--max-tokens", 256, *more, "--plot"]
    line = refused(capsys, *argv, tmp_path / "folder.png")
    assert "folder.png` cannot be written. Choose another file." in line

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main([*map(str, argv), str(tmp_path / "plot.png")]) == 1
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "plot.png` cannot be written: No space left on device." in printed.err


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory. "),
        (MemoryError(), "Out of memory. "),
    ],
)
def test_out_of_memory_says_what_to_try(quantized, capsys, monkeypatch, failure, told):
    def fail(*args):
        raise failure

    monkeypatch.setattr("flute.evaluate.perplexity", fail)
    line = refused(capsys, "eval", quantized, "--window", 64, "--max-tokens", 256)
    assert line.startswith(f"error: {told}Take a smaller model or fewer tokens at once")


def test_bugs_keep_their_traceback(quantized, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("flute.evaluate.perplexity", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        main(["eval", str(quantized), "--window", "64", "--max-tokens", "256"])


def test_a_warning_is_one_line_in_every_command(quantized, capsys, monkeypatch):
    load = loading.load_tokenizer

    def load_and_warn(path):
        warnings.warn("something is slow", stacklevel=2)
        return load(path)

    monkeypatch.setattr(loading, "load_tokenizer", load_and_warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = None  # another command, run before, may have set its own
        assert main(["generate", str(quantized), "a", "--max-new-tokens", "1"]) == 0
    assert "warning: something is slow\n" in capsys.readouterr().err


def test_doctor_tells_of_a_wrong_variant_instead_of_failing(capsys, monkeypatch):
    from flute.cpu import library

    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    if library.why_not():
        pytest.skip(library.why_not())
    monkeypatch.setenv("FLUTE_CPU_VARIANT", "nonsense")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (problem,) = report["problems"]
    assert "FLUTE_CPU_VARIANT='nonsense'; expected one of ('none', " in problem
    assert report["machine"]["cpu kernels"] == "see the problems"


def test_doctor_tells_of_a_cache_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert main(["doctor", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "compiled in every process. Set FLUTE_CACHE_DIR to a folder that can" in problem
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["kernel cache"] == str(tmp_path / "cache")
