"""The quality benchmark: baselines against the libraries or their definition, records, plots."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, tiny_model

sys.path.insert(0, str(ROOT / "benchmarks"))

import baselines
import bench_quality
import plot_quality
import quality_cases
from quality_cases import Case, cases_of, collect_hessians, quantized_copy
from quality_measure import Remembered, draw, make_dense

from flute.divergence import divergence
from flute.evaluate import relative_error
from flute.linear import LutLinear

WEIGHT = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_equals_bitsandbytes_bit_for_bit(group, double):
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(
        WEIGHT, blocksize=group, quant_type="nf4", compress_statistics=double
    )
    expected = functional.dequantize_4bit(packed, state)
    values, bits = baselines.bitsandbytes_nf4(WEIGHT, group, double=double)
    if double:
        assert torch.equal(baselines.dynamic_table(), functional.create_dynamic_map())
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        ours = baselines.nested(WEIGHT.view(-1, group).abs().amax(1))
        equal = torch.isclose(ours, absmax, rtol=1e-6, atol=0)
        assert equal.float().mean() > 0.98  # near midpoints the library takes the farther entry
        assert torch.allclose(ours, absmax, rtol=2e-2)
        same = equal.repeat_interleave(group).view_as(WEIGHT)
        assert torch.allclose(values[same], expected[same], rtol=1e-6, atol=0)
        assert bits == 4 + (8 + 32 / 256) / group
    else:
        assert torch.equal(values, expected)
        assert bits == 4 + 32 / group


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hqq_lowers_the_error_of_plain_asymmetric_rounding(bits):
    heavy = WEIGHT * WEIGHT.abs()
    plain, _ = baselines.hqq(heavy, bits, 64, iterations=1)
    found, size = baselines.hqq(heavy, bits, 64)
    assert (found - heavy).abs().mean() < (plain - heavy).abs().mean()
    assert size == bits + 0.5
    groups = found.view(-1, 64)
    assert max(len(row.unique()) for row in groups) <= 1 << bits


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_lowers_the_error_of_the_outputs_at_the_cost_of_the_weights(bits):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(256, 256, generator=generator) / 8
    x = torch.randn(2000, 256, generator=generator) @ mixing
    fed, size = baselines.gptq_int(WEIGHT, bits, 64, x.T @ x)
    alone, _ = baselines.gptq_int(WEIGHT, bits, 64, torch.eye(256))
    outputs = [relative_error(x @ WEIGHT.T, x @ q.T) for q in (fed, alone)]
    assert outputs[0] < 0.8 * outputs[1]
    assert relative_error(WEIGHT, fed) > relative_error(WEIGHT, alone)
    assert size == bits + (16 + bits) / 64


def test_gptq_leaves_out_columns_that_are_never_active():
    hessian = torch.eye(256)
    hessian[7, 7] = 0
    values, _ = baselines.gptq_int(WEIGHT, 4, 64, hessian)
    assert values.isfinite().all()
    assert values[:, 7].abs().max() == 0


def test_cases_are_all_methods_and_seeds_where_text_is_drawn():
    methods = [*quality_cases.OURS, *quality_cases.OTHERS]
    cases = list(cases_of(methods, (4, 3, 2), (32, 64, 128), calibration=True))
    assert len(set(cases)) == len(cases)
    count = {m: sum(case.method == m for case in cases) for m in methods}
    assert count["mse"] == count["nf"] == count["HQQ (re-created)"] == 9
    assert count["GPTQ int (re-created)"] == 27
    assert count["bitsandbytes nf4"] == 3
    assert count["int8"] == 1
    without = {case.method for case in cases_of(methods, (4,), (64,), calibration=False)}
    assert not without & set(quality_cases.CALIBRATED)
    assert "table" not in methods


def test_quantised_copies_are_real_layers_or_rounded_weights_and_leave_the_model_alone():
    dense = tiny_model(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    windows = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    hessians = collect_hessians(dense, windows)
    name = "model.layers.0.mlp.down_proj"
    assert hessians[name].shape == (128, 128)
    caught = []
    dense.get_submodule(name).register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    dense(input_ids=windows)
    x = caught[0].flatten(0, 1).double()
    assert torch.allclose(hessians[name].double(), x.T @ x, rtol=1e-3, atol=1e-6)
    reference = Remembered(dense)
    losses = {}
    for method, kind, bits in (
        ("nf", "method", 4),
        ("nf, dequantised", "control", 4),
        ("nf, table permuted", "control", 4),
        ("int8", "control", 8),
        ("GPTQ int (re-created)", "baseline", 4),
    ):
        case = Case(method, kind, bits, 32)
        model, stored, seconds = quantized_copy(dense, case, None, hessians)
        losses[method] = divergence(model, reference, windows).mean
        assert bits <= stored < bits + 1
        assert seconds > 0
    assert losses["nf, dequantised"] == pytest.approx(losses["nf"], rel=0.05)
    assert losses["int8"] < 0.05 * losses["nf"]
    assert losses["nf, table permuted"] > 5 * losses["nf"]
    after = dense.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_remembered_model_runs_once_per_batch():
    runs = []
    dense = tiny_model()
    dense.register_forward_hook(lambda *_: runs.append(1))
    reference = Remembered(dense)
    batch = torch.zeros(1, 8, dtype=torch.long)
    first = reference(input_ids=batch, use_cache=False).logits
    assert reference(input_ids=batch, use_cache=False).logits is first
    reference(input_ids=batch + 1, use_cache=False)
    assert len(runs) == 2


def test_seeds_draw_other_windows():
    windows = torch.arange(100)[:, None]
    drawn = [draw(windows, 10, seed).flatten().tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10


def test_calibration_on_the_test_text_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_quality.parse(["--calibration", "wikitext2"])
    assert "calibrate on other text than is measured" in capsys.readouterr().err


def test_the_benchmark_writes_a_record_per_case_and_text(tmp_path, capsys):
    path = tmp_path / "quality.json"
    argv = ["--window", "64", "--max-tokens", "128", "--bits", "4", "--groups", "64"]
    methods = ["nf", "GPTQ int (re-created)", "int8"]
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("The king of the country went to the house of the queen. " * 40)
    argv += ["--calibration", str(calibration), "--calibration-windows", "2"]
    bench_quality.main([*argv, "--json", str(path), "--methods", *methods])
    records = json.loads(path.read_text())
    assert len(records) == 2 * (1 + 1 + 3 + 1)
    assert {r["method"] for r in records} == {"bf16", *methods}
    assert {r["text"] for r in records} == {"wikitext2", "classics"}
    wanted = {"model", "method", "bits", "group", "seed", "ppl", "kl", "bytes", "seconds"}
    wanted |= {"commit", "date", "machine", "tokens", "window", "dloss", "bits_per_weight"}
    assert all(wanted <= r.keys() for r in records)
    dense, nf = records[0], next(r for r in records if r["method"] == "nf")
    assert (dense["tokens"], dense["bytes"]) == (126, 13_638_144)
    expected = dense["bytes"] - 4_718_592 * (16 - nf["bits_per_weight"]) / 8
    assert nf["bytes"] == pytest.approx(expected, abs=10)
    assert nf["dloss"] == pytest.approx(nf["loss"] - dense["loss"], abs=1e-4)
    assert "GPTQ int" in capsys.readouterr().out


def test_workers_measure_the_same_and_a_later_run_goes_on(tmp_path, capsys):
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("The king of the country went to the house of the queen. " * 40)
    argv = ["--window", "64", "--max-tokens", "128", "256", "--bits", "4", "--groups", "64"]
    argv += ["--calibration", str(calibration), "--calibration-windows", "2", "--seeds", "1"]
    argv += ["--methods", "nf", "GPTQ int (re-created)"]
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    bench_quality.main([*argv, "--json", str(here)])
    bench_quality.main([*argv, "--json", str(there), "--workers", "2"])

    def by_case(path):
        varies = ("seconds", "machine")
        return {
            tuple(r[k] for k in ("method", "text", "tokens")): {
                k: v for k, v in r.items() if k not in varies
            }
            for r in json.loads(path.read_text())
        }

    expected, found = by_case(here), by_case(there)
    assert len(expected) == 3 * 2 * 2
    assert {tokens for _, _, tokens in expected} == {126, 252}
    assert expected.keys() == found.keys()
    for key, record in expected.items():
        same = {k: v for k, v in record.items() if isinstance(v, (str, int, type(None)))}
        assert same.items() <= found[key].items()
        assert found[key]["kl"] == pytest.approx(record["kl"], rel=1e-2, abs=1e-6)
    kept = [r for r in json.loads(here.read_text()) if r["method"] != "nf"]
    here.write_text(json.dumps(kept))
    bench_quality.main([*argv, "--json", str(here), "--append"])
    assert by_case(here).keys() == expected.keys()
    assert json.loads(here.read_text())[: len(kept)] == kept
    capsys.readouterr()
    here.unlink()
    bench_quality.main([*argv, "--json", str(here), "--budget", "0"])
    assert not here.exists()
    assert "3 of 3 cases were not measured; go on with --append." in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_dense_layers_in_place_of_quantised_ones_compute_the_same(kind):
    model, _, _ = quantized_copy(
        tiny_model(kind, dtype=torch.float32), Case("mse", "method", 3, 32), None, None
    )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LutLinear)}
    biased = [name for name, layer in layers.items() if layer.bias is not None]
    assert bool(biased) is (kind == "qwen2")
    values = {name: layer.dequantize(torch.float32) for name, layer in layers.items()}
    ids = torch.arange(24)[None]
    logits = model(input_ids=ids).logits
    make_dense(model)
    for name, expected in values.items():
        linear = model.get_submodule(name)
        assert type(linear) is torch.nn.Linear
        assert torch.equal(linear.weight, expected)
        assert (linear.bias is not None) is (name in biased)
    assert torch.allclose(model(input_ids=ids).logits, logits, rtol=1e-2, atol=1e-3)


def test_a_case_that_fails_in_a_worker_is_told_and_the_others_are_measured(tmp_path, capfd):
    from quality_workers import run_in_workers

    jobs = [("good", 1), ("bad", 2), ("good", 3)]
    makers = {"good": Doubles, "bad": Fails}
    found = dict(run_in_workers(makers, jobs, deadline=None, workers=2))
    assert found == {("good", 1): [{"twice": 2}], ("good", 3): [{"twice": 6}]}
    assert "2 failed:" in capfd.readouterr().err


class Doubles:
    def records(self, case):
        yield {"twice": 2 * case}


class Fails:
    def records(self, case):
        raise ValueError(f"case {case} cannot be measured")


def test_what_is_wanted_most_comes_first():
    args = SimpleNamespace(groups=(32, 64, 128), seeds=(0, 1))
    cases = cases_of(["nf", "gptq"], (3,), args.groups, calibration=True, seeds=args.seeds)
    ordered = sorted(cases, key=lambda case: bench_quality.first_of_all(case, args))
    assert [(c.group, c.seed) for c in ordered[:3]] == [(64, None), (64, 0), (64, 1)]
    assert {c.group for c in ordered[3:]} == {32, 128}


# ---- plots


def record(**changes):
    base = {
        **{"model": "m", "text": "t", "method": "nf", "kind": "method", "bits": 4, "group": 64},
        **{"seed": None, "bits_per_weight": 4.25, "bytes": 1, "ppl": 40.0, "dloss": 0.1},
        "dloss_error": 0.02,
        **{"kl": 0.09, "seconds": 1.0, "agreement": 0.9, "tokens": 8184, "window": 1024},
        **{"commit": "abc1234", "date": "2026-11-22"},
    }
    return {**base, **changes}


RECORDS = [
    record(method="bf16", kind="dense", bits=16, group=None, ppl=35.0, dloss=0.0, kl=0.0),
    record(),
    record(bits=2, dloss=5.0, kl=5.5, bits_per_weight=2.25),
    *(
        record(method="gptq", seed=seed, dloss=loss, kl=0.05)
        for seed, loss in enumerate((0.04, 0.05, 0.06))
    ),
    record(method="HQQ", kind="baseline", dloss=-0.01, bits_per_weight=4.5, group=32),
    record(method="int8", kind="control", bits=8, dloss=0.0),
]


def test_seeds_are_averaged_and_their_spread_kept():
    gptq = next(r for r in plot_quality.averaged(RECORDS) if r["method"] == "gptq")
    assert gptq["dloss"] == pytest.approx(0.05)
    assert gptq["spread"] == pytest.approx(0.01)
    assert gptq["seeds"] == 3


def test_the_front_holds_what_nothing_beats():
    points = [(4.0, 0.3), (3.0, 0.5), (5.0, 0.3), (4.0, 0.2), (2.0, 0.5)]
    assert plot_quality.front(points) == [(2.0, 0.5), (4.0, 0.2)]


def test_the_table_gives_losses_as_shares_of_nf():
    lines = plot_quality.markdown(RECORDS, "m", "t").splitlines()
    assert lines[0].startswith("Loss over bf16 in nats per token")
    assert "8184 tokens of t in windows of 1024, bf16 perplexity 35.00; commit abc1234" in lines[0]
    assert lines[2:] == [
        "| method | 4 bits | 2 bits |",
        "| --- | --- | --- |",
        "| nf | 0.100 ± 0.020 (100%), 0.090 | 5.000 ± 0.020 (100%), 5.500 |",
        "| gptq | 0.050 ± 0.020 (50%), 0.050 | - |",
    ]


def test_plots_are_drawn_from_json_alone(tmp_path, capsys):
    (tmp_path / "quality.json").write_text(json.dumps(RECORDS))
    plot_quality.main([str(tmp_path / "quality.json"), "--out", str(tmp_path)])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "| gptq |" in capsys.readouterr().out
    assert "| gptq |" in (tmp_path / "quality.md").read_text()


@pytest.mark.parametrize("name", ["quality", "quality_h200"])
def test_results_that_are_kept_are_drawn_and_their_controls_hold(name):
    every = json.loads((plot_quality.RESULTS / f"{name}.json").read_text())
    kept = plot_quality.longest(every)
    assert all(r["commit"] and r["date"] and r["machine"] and r["tokens"] for r in kept)
    assert (plot_quality.RESULTS / f"{name}.png").exists()
    assert (plot_quality.RESULTS / f"{name}.md").read_text() == plot_quality.tables(kept)
    for model, text in {(r["model"], r["text"]) for r in kept}:
        here = {
            (r["method"], r["bits"], r["group"]): r
            for r in sorted(every, key=lambda r: r["tokens"])  # the longest counts
            if (r["model"], r["text"]) == (model, text)
        }
        assert abs(here["int8", 8, 64]["dloss"]) < 0.005
        assert here["nf, table permuted", 4, 64]["dloss"] > 3
        for bits in (4, 3, 2):
            assert here["mse", bits, 64]["kl"] < here["nf", bits, 64]["kl"]


def test_the_readme_has_the_figures_that_are_kept():
    kept = json.loads((plot_quality.RESULTS / "quality_h200.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for line in plot_quality.markdown(
        plot_quality.longest(kept), "llama-bench-30m", "wikitext2"
    ).splitlines():
        assert line in readme, "paste what benchmarks/plot_quality.py prints into the README"


def test_figures_are_of_the_most_tokens_that_were_measured():
    records = [
        record(method=method, kind=kind, tokens=tokens)
        for tokens in (8184, 61380)
        for method, kind in (("bf16", "dense"), ("nf", "method"))
    ]
    assert [r["tokens"] for r in plot_quality.longest(records)] == [61380, 61380]
