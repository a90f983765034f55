"""`flute tune` without a GPU: what would be timed, what is settled on, what is reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import DEMO_MODEL, edit_json, save_tiny

from flute import model_shapes
from flute.batch import BatchPlan
from flute.candidates import candidates
from flute.cli import build_parser, main
from flute.cli.tune import problems_of
from flute.config import Gpu, KernelConfig, Plan, Problem
from flute.model_shapes import MODELS, layer_shapes, shapes_of
from flute.plans import DensePlan, MmaPlan, SplitPlan, default_plan
from flute.tune import Result, plans_to_time, settle, steps

GPU = Gpu(name="NVIDIA H200")
PROBLEM = Problem(4, 128, "float16", "float16", False, 8, 4096, 4096)


def plans(count):
    """Distinct plans of up to 8 tokens."""
    return [Plan(replace(KernelConfig(), stages=i + 1)) for i in range(count)]


def serves(plan, m):
    return not isinstance(plan, Plan) or m <= plan.config.block_tokens


def test_the_heuristics_plan_comes_first_and_every_way_is_tried():
    few, some, many = (plans_to_time(PROBLEM._replace(m=m), GPU) for m in (8, 24, 512))
    assert few[: len(candidates(PROBLEM, GPU))] == candidates(PROBLEM, GPU)
    assert isinstance(some[0], BatchPlan)
    assert set(candidates(PROBLEM._replace(m=24), GPU)) < set(some)
    assert isinstance(many[0], BatchPlan)
    assert DensePlan() in many
    many = plans_to_time(PROBLEM._replace(m=20000), GPU)
    assert many[0] == DensePlan()
    assert SplitPlan(5120) in many
    many = plans_to_time(PROBLEM._replace(m=20000, k=8192), GPU)
    assert many[0] == SplitPlan(2560)
    assert DensePlan() in many
    many = plans_to_time(PROBLEM._replace(m=512), GPU)
    assert plans_to_time(PROBLEM, GPU, top=3) == few[:3]
    (kernel, *others) = plans_to_time(PROBLEM._replace(m=512), GPU, top=1)
    assert kernel == many[0]
    assert {type(plan) for plan in others} == {DensePlan}
    older = replace(GPU, arch="sm_80")
    others = plans_to_time(PROBLEM._replace(m=24), older)
    assert isinstance(others[0], MmaPlan)
    assert others[-2:] == [SplitPlan(16), DensePlan()]
    tiny = replace(GPU, smem_bytes=1000)
    assert plans_to_time(PROBLEM._replace(m=1), tiny) == [DensePlan()]
    assert default_plan(PROBLEM, GPU) == few[0]


def test_the_fastest_plan_wins_unless_the_heuristics_is_as_fast():
    a, b, c = plans(3)
    for times, winner in (
        ({a: 10.0, b: 9.0, c: 9.5}, b),
        ({a: 9.05, b: 9.0}, a),
        ({b: 9.0}, b),
    ):
        settled = settle({8: times}, {8: a}, Counter(), serves)
        assert settled == {8: (winner, times[winner])}


def test_among_equals_the_kernel_in_use_wins():
    a, b, c = plans(3)
    used = Counter({c.config: 2})
    assert settle({8: {a: 20.0, b: 9.0, c: 9.05}}, {8: a}, used, serves) == {8: (c, 9.05)}
    assert used[c.config] == 3


def test_fewer_tokens_never_take_longer():
    a, b = plans(2)
    wide = Plan(replace(KernelConfig(), block_tokens=16))
    timed = {1: {a: 5.0}, 4: {a: 9.0}, 8: {a: 8.0, b: 6.0}, 16: {wide: 7.0}, 64: {DensePlan(): 6.5}}
    settled = settle(timed, {1: a, 4: a, 8: a, 16: wide, 64: DensePlan()}, Counter(), serves)
    assert list(settled) == [1, 4, 8, 16, 64]
    assert settled[1] == (a, 5.0)
    assert settled[4] == settled[8] == (b, 6.0)
    assert settled[16] == (DensePlan(), 6.5)
    times = [us for _, us in settled.values()]
    assert times == sorted(times)
    narrow = settle({8: {b: 8.0}, 16: {wide: 9.0}}, {8: b, 16: wide}, Counter(), serves)
    assert narrow[8] == (b, 8.0)


def test_steps_between_neighbours_are_found():
    (plan,) = plans(1)
    us = {7: 10.0, 8: 10.0, 9: 14.0, 10: 14.0, 16: 10.0}
    results = [Result(PROBLEM._replace(m=m), plan, t, plan, t) for m, t in us.items()]
    ((problem, factor),) = steps(results)
    assert problem.m == 9
    assert factor == pytest.approx(14 / 9 / (10 / 8))


# ---- shapes


def test_shapes_of_llama_by_hand():
    assert layer_shapes(MODELS["llama-3-8b"]) == {
        "qkv": (6144, 4096),
        "q": (4096, 4096),
        "k": (1024, 4096),
        "gate_up": (28672, 4096),
        "gate": (14336, 4096),
        "o": (4096, 4096),
        "down": (4096, 14336),
    }
    sharded = layer_shapes(MODELS["llama-3-70b"], 8)
    assert sharded["qkv"] == (1280, 8192)
    assert sharded["o"] == (8192, 1024)
    assert sharded["down"] == (8192, 3584)
    assert sharded["gate_up"] == (7168, 8192)
    assert layer_shapes(MODELS["gemma-2-9b"])["o"] == (3584, 4096)
    assert layer_shapes(MODELS["qwen-3-32b"])["q"] == (8192, 5120)


@pytest.mark.parametrize("kind", ["llama-3", "qwen-3-8b"])
def test_shapes_agree_with_transformers(kind):
    import transformers
    from torch import nn

    name = next(name for name in MODELS if name.startswith(kind))
    model = MODELS[name]
    config_class = transformers.LlamaConfig if "llama" in name else transformers.Qwen3Config
    config = config_class(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        num_hidden_layers=1,
    )
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    found = {
        name.rpartition(".")[2].removesuffix("_proj"): (m.out_features, m.in_features)
        for name, m in built.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    expected = layer_shapes(model)
    assert found == {**{k: expected[k] for k in ("q", "k", "o", "gate", "down")},
                     "v": expected["k"], "up": expected["gate"]}  # fmt: skip


def test_all_shapes_suit_the_kernels():
    shapes = shapes_of(["all"])
    assert len(shapes) == len(set(shapes)) > 80
    assert all(k % 128 == 0 and n % 16 == 0 for n, k in shapes)
    assert set(shapes_of(["llama-3-8b"])) == set(layer_shapes(MODELS["llama-3-8b"]).values())
    assert (7168, 4096) in shapes_of(["llama-3"], [4])
    assert layer_shapes(model_shapes.Model(64, 96, 3, 1, 32), 2).keys() == {
        "gate",
        "gate_up",
        "down",
    }


# ---- the command


def problems(*argv):
    return problems_of(build_parser().parse_args(["tune", *map(str, argv)]))


def test_problems_of_shapes():
    found = problems(
        "--shape", "64x256", "48x64", "--bits", 4, 2, "--group-size", 64, "row", "--tokens", "1-2",
        "16", "--dtype", "float16", "--scale-dtype", "float32", "--row-tables",
    )  # fmt: skip
    assert Problem(2, 64, "float16", "float32", True, 16, 64, 256) in found
    assert Problem(2, 0, "float16", "float32", True, 2, 64, 256) in found
    assert {p.group_size for p in found if p.k == 64} == {0}  # a group of the whole row
    assert len(found) == len(set(found)) == 3 * 2 * (2 + 1)
    assert {p.m for p in problems("--shape", "64x256")} == {1, 2, 4, 8, 16, 32, 64}
    family = problems("--model-family", "llama-3-70b", "--tp", 8, "--tokens", 1)
    assert {(p.n, p.k) for p in family} == set(layer_shapes(MODELS["llama-3-70b"], 8).values())


def test_problems_of_a_dense_and_of_a_quantised_model(tmp_path):
    dense = problems(DEMO_MODEL, "--bits", 3, "--group-size", 128, "--tokens", 1)
    assert {(p.n, p.k) for p in dense} == {(256, 256), (128, 256), (768, 256), (256, 768)}
    assert {p[:5] for p in dense} == {(3, 128, "bfloat16", "bfloat16", False)}
    out = tmp_path / "out"
    argv = ["quantize", str(DEMO_MODEL), str(out), "--bits", "2", "--method", "nf"]
    assert main([*argv, "--group-size", "32", "--scale-dtype", "float16", "--skip", "*_proj"]) == 1
    assert main([*argv, "--group-size", "32", "--scale-dtype", "float16", "--skip", "k_proj"]) == 0
    quantized = problems(out, "--bits", 4, "--tokens", 8)
    assert {p[:5] for p in quantized} == {(2, 32, "bfloat16", "float16", False)}
    v_proj = Problem(2, 32, "bfloat16", "float16", False, 8, 128, 256)
    assert v_proj in quantized
    (out / "model.safetensors").unlink()  # config.json is enough
    assert problems(out, "--tokens", 8) == quantized
    config = tmp_path / "row"
    save_tiny(config, dtype=torch.float16)
    edit_json(config / "config.json", dtype="float16")
    assert {p.dtype for p in problems(config)} == {"float16"}


FAILURES = {
    "no GPU": (["--shape", "64x64"], "Tuning times kernels on a GPU; cpu has none"),
    "no such GPU": (["--shape", "64x64", "--device", "cuda:99"], "cannot be used"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line(case, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv, message = FAILURES[case]
    assert main(["tune", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_wrong_shapes_and_models_are_named(tmp_path):
    from flute.errors import CheckpointError, FormatError

    with pytest.raises(FormatError, match=r"K=200 with group_size=64: K must be a multiple"):
        problems("--shape", "64x200")
    with pytest.raises(CheckpointError, match=r"config\.json` does not exist"):
        problems(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments MODEL --shape --model-family is required"),
        (["MODEL", "--shape", "64x64"], "not allowed with argument MODEL"),
        (["--shape", "64"], "is no shape; expected NxK"),
        (["--shape", "64x64", "--tokens", "0"], "expected a number from 1, or a range"),
        (["--shape", "64x64", "--tokens", "9-3"], "expected a number from 1, or a range"),
        (["--model-family", "bert"], "'bert' is unknown; expected all, or one of llama-3-8b"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
