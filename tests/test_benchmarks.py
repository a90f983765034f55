"""The kernel benchmark without a GPU: its limit, its checks, its records, its plots."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_kernel
import plot_cpu
import plot_kernel
from bench_kernel import Worker, make_records, parse, print_records
from peers import Packed, Session, UnsupportedCaseError, uniform
from protocol import Case, Oracle, by_weight

HEAD = {"gpu": "GPU", "cuda": "13.0", "torch": "2.11", "commit": "abc1234", "date": "2026-11-22"}


@pytest.mark.parametrize(("num_bits", "limit"), [(4, 55.5), (3, 42.0), (2, 28.6)])
def test_the_limit_counts_codes_scales_x_and_out(num_bits, limit):
    case = Case(1, 57344, 8192, num_bits)
    assert case.limit_us == pytest.approx(limit, abs=0.06)
    more = Case(17, 57344, 8192, num_bits)
    assert more.num_bytes - case.num_bytes == 16 * 2 * (57344 + 8192)


def test_cases_come_together_by_weight_in_their_first_order():
    cases = [Case(2, 64, 32, 4), Case(1, 32, 32, 4), Case(1, 64, 32, 4), Case(2, 64, 32, 3)]
    groups = list(by_weight(case for case in cases))
    assert [(w.n, w.num_bits, [c.m for c in group]) for w, group in groups] == [
        (64, 4, [1, 2]),
        (32, 4, [1]),
        (64, 3, [2]),
    ]


@pytest.mark.parametrize("m", [1, 64, 65, 100])
def test_the_oracle_sees_an_error_in_the_first_and_the_last_token(m):
    dense = torch.randn(48, 32)
    oracle = Oracle(dense, torch.float16)
    x = oracle.tokens(m)
    assert x.shape == (m, 32)
    out = (x.double() @ dense.double().T).float()
    assert oracle.error(out) < 1e-6
    for row in (0, -1):
        wrong = out.clone()
        wrong[row, 7] += 10
        assert oracle.error(wrong) > 1e-2


# ---- another library's session


def fake_pack(case):
    if case.num_bits == 2:
        raise UnsupportedCaseError("4 bits only")
    codes = torch.randint(0, 16, (case.n, case.k), dtype=torch.uint8)
    scales = torch.rand(case.n, case.k // case.group_size) + 0.5
    dense = uniform(codes, scales, 4)

    def run(x, dense):
        if x.shape[0] == 3:
            raise RuntimeError("some text\nillegal 3")
        return x @ dense.to(x.dtype).T * (2 if x.shape[0] == 2 else 1)

    prepared.append(case)
    return Packed((dense,), run, dense, torch.float16, lambda m: prepared.append(m))


prepared: list[object] = []


def test_a_session_checks_then_times_what_is_right_and_says_why_not():
    prepared.clear()
    cases = [Case(1, 64, 64, 4, 32), Case(1, 64, 64, 2, 32)]
    cases += [Case(m, 64, 64, 4, 32) for m in (2, 3)]
    told = []
    session = Session(cases, fake_pack, told.append)
    session.compile()
    assert {1, 2, 3} <= {m for m in prepared if isinstance(m, int)}
    session.check()
    assert [t["case"] for t in told if "error" in t] == [0]
    notes = {t["case"]: t["note"] for t in told if "note" in t}
    assert notes.keys() == {1, 2, 3}
    assert notes[1] == "4 bits only"
    assert "wrong: its relative error is 1.0e+00" in notes[2]
    assert notes[3] == "RuntimeError: illegal 3"
    told.clear()
    session.time(lambda calls: float(len(calls) > 1 and calls[0]().shape == (1, 64)))
    assert told == [{"case": 0, "us": 1.0}]


def test_uniform_codes_are_centred_and_scaled_by_group():
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    assert uniform(codes, torch.tensor([[2.0, 10.0]]), 2).tolist() == [[-4.0, -2.0, 0.0, 10.0]]


PEER = """
import json, sys, time
cases = json.loads(input())
for i, case in enumerate(cases[:-1]):
    print(json.dumps({"case": i, "error": 1e-4}), flush=True)
print(json.dumps({"case": len(cases) - 1, "note": "not this one"}), flush=True)
print(json.dumps({"ready": True}), flush=True)
input()
print(json.dumps({"case": 0, "us": 2.5 * cases[0]["m"]}), flush=True)
"""
CASES = [Case(2, 64, 64, 4), Case(1, 64, 64, 4), Case(1, 64, 64, 3)]


def worker_of(code, seconds=30.0):
    worker = Worker([sys.executable, "-c", code], CASES)
    worker.prepare(time.monotonic() + seconds)
    return worker


def test_a_worker_reports_what_its_process_tells():
    worker = worker_of(PEER)
    assert worker.errors == {CASES[0]: 1e-4, CASES[1]: 1e-4}
    assert worker.us == {}
    worker.time(time.monotonic() + 30)
    assert worker.us == {CASES[0]: 5.0}
    assert worker.notes == {CASES[2]: "not this one"}


def test_a_worker_that_dies_keeps_its_times_and_says_why():
    worker = worker_of(PEER + "sys.exit('out of luck')")
    worker.time(time.monotonic() + 30)
    assert worker.us == {CASES[0]: 5.0}
    assert worker.notes[CASES[1]] == "its process ended with 1: out of luck"
    assert worker.notes[CASES[2]] == "not this one"


def test_a_worker_that_hangs_is_ended():
    start = time.monotonic()
    worker = worker_of("import time; time.sleep(100)", seconds=0.5)
    worker.time(time.monotonic() + 30)
    assert time.monotonic() - start < 20
    assert set(worker.notes.values()) == {"no answer in time"}


# ---- records and plots


class Measured:
    def __init__(self, factor, num_bits):
        cases = [case for case in cases_of() if case.num_bits in num_bits]
        self.us = {case: factor * case.m for case in cases}
        self.errors = dict.fromkeys(cases, 2.0e-4)
        self.notes = {c: "4 bits only" for c in cases_of() if c.num_bits not in num_bits}


def cases_of():
    shapes = ((256, 512), (128, 128))
    return [Case(m, *shape, b) for shape in shapes for b in (4, 3, 2) for m in (1, 2, 16, 128)]


@pytest.fixture
def records():
    ours = dict.fromkeys(cases_of(), (4.0, 0.000123456))
    cublas = {bench_kernel.dense_case(case): 10.0 for case in cases_of()}
    workers = {"humming": Measured(5.0, (4, 3, 2)), "bitsandbytes": Measured(8.0, (4,))}
    return make_records(cases_of(), ours, cublas, workers, HEAD)


def test_records_are_json_of_known_keys(records):
    assert json.loads(json.dumps(records)) == records
    first = records[0]
    assert first.keys() == {
        *("m", "n", "k", "num_bits", "group_size", "dtype", "table", "us", "limit_us"),
        *("limit_fraction", "error", "cublas_us", "peers", "peer_errors", "peer_notes"),
        *HEAD,
    }
    assert (first["m"], first["n"], first["k"], first["num_bits"]) == (1, 256, 512, 4)
    assert first["us"] == 4.0
    assert first["error"] == 1.23e-4
    assert first["peers"] == {"humming": 5.0, "bitsandbytes": 8.0}
    assert first["peer_notes"] == {}
    three = next(r for r in records if r["num_bits"] == 3)
    assert three["peers"] == {"humming": 5.0}
    assert three["peer_notes"] == {"bitsandbytes": "4 bits only"}


def test_the_table_has_a_column_for_each_peer_that_was_measured(records, capsys):
    print_records(records)
    printed = capsys.readouterr().out
    assert "x humming" in printed
    assert "x bitsandbytes" in printed
    assert "x marlin" not in printed
    assert "bitsandbytes, 16 of 24: 4 bits only" in printed


def test_the_markdown_table_has_our_bits_side_by_side(records):
    lines = plot_kernel.markdown(records).splitlines()
    assert lines[0].endswith("commit abc1234, 2026-11-22")
    assert lines[4] == "| 256 x 512 | 4.0 / 4.0 / 4.0 | 10.0 | 5.0 | 8.0 |"


def test_speed_ups_are_against_cublas(records):
    here = [r for r in records if (r["n"], r["num_bits"]) == (256, 4)]
    assert plot_kernel.speed_ups(here, "flute") == ([1, 2, 16, 128], [2.5] * 4)
    assert plot_kernel.speed_ups(here, "humming") == ([1, 2, 16, 128], [2.0, 1.0, 0.125, 1 / 64])
    assert plot_kernel.speed_ups(here, "marlin") == ([], [])


def test_plots_are_drawn_from_json_alone(records, tmp_path):
    other = [{**r, "dtype": "bfloat16"} for r in records]
    assert plot_kernel.one_setting(records + other) == records
    (tmp_path / "results.json").write_text(json.dumps(records + other))
    plot_kernel.main([str(tmp_path / "results.json"), "--out", str(tmp_path)])
    for name in ("kernel_limit.png", "kernel_speed_up.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000


def test_results_that_are_kept_can_be_drawn():
    for path in (ROOT / "benchmarks" / "results").glob("kernel*.json"):
        kept = json.loads(path.read_text())
        assert all(r["commit"] and r["date"] and r["gpu"] for r in kept)
        assert all(r["limit_fraction"] < 1.1 for r in kept)


def test_the_readme_has_the_figures_that_are_kept():
    kept = json.loads((ROOT / "benchmarks" / "results" / "kernel_h200.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for line in plot_kernel.markdown(plot_kernel.one_setting(kept)).splitlines():
        assert line in readme, "paste what benchmarks/plot_kernel.py prints into the README"


# ---- the command line


def test_tokens_are_numbers_and_names_of_sets():
    assert parse(["--tokens", "7", "decode"]).tokens == [1, 2, 4, 7, 8, 16, 32]
    assert parse(["--set", "prefill"]).tokens[0] == 33
    assert parse([]).tokens == [1, 2, 4, 8, 16, 32]
    assert parse(["--shape", "64x32", "5X7"]).shape == [(64, 32), (5, 7)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "many"], "'many'; expected decode, prefill or a number"),
        (["--tokens", "0"], "'0'; expected decode, prefill or a number"),
        (["--shape", "64"], "'64'; expected NxK, such as 4096x14336"),
    ],
)
def test_wrong_arguments_say_what_is_expected(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(argv)
    assert message in capsys.readouterr().err


def test_no_gpu_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        bench_kernel.main([])


# ---- the CPU's


def test_the_cpu_plot_draws_what_is_committed(tmp_path, monkeypatch):
    results = ROOT / "benchmarks" / "results" / "cpu.json"
    monkeypatch.setattr(sys, "argv", ["plot_cpu.py", str(results), "--out", str(tmp_path)])
    plot_cpu.main()
    assert (tmp_path / "cpu_speed_up.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["plot_cpu.py", str(results), "--shape", "1x1"])
    with pytest.raises(SystemExit, match="no records of 1x1 with one thread"):
        plot_cpu.main()
