"""What kernels are given: the structures that the headers declare, and the ranges of rows."""

from __future__ import annotations

import itertools
import re
import struct
import threading

import pytest
import torch
from helpers import packed_weight, random_weight

from flute import launchers, mma, precompile
from flute.batch import BatchPlan
from flute.candidates import heuristic
from flute.config import Gpu
from flute.format import QuantSpec
from flute.jit import cache, launch
from flute.plans import KernelPlan, SplitPlan, plans_of


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(launch, "_driver", lambda: {"cuLaunchKernelEx": lambda *a: 0})
    monkeypatch.setattr(launchers, "_launchers", {})
    monkeypatch.setattr(launchers, "_products", {})
    for module in (launchers, precompile):
        monkeypatch.setattr(module, "gpu_of", lambda device: Gpu())
    monkeypatch.setattr(launchers, "_function", lambda source, device: 1)


def fields(header: str, name: str) -> list[tuple[str, int]]:
    """(name, how many) of the members of a structure, in order; pointers first."""
    text = (launchers.KERNELS / header).read_text()
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)[1])
    found = []
    for kind, names in re.findall(r"(const void\*|void\*|float\*|int)\s+([^;]+);", body):
        for member in names.split(","):
            match = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?\s*", member)
            assert kind != "int" or found
            found.append((match[1], int(match[2] or 1)))
    return found


def unpack(params: bytes, members: list[tuple[str, int]], num_pointers: int) -> dict:
    values = struct.unpack(f"{num_pointers}Q{sum(n for _, n in members[num_pointers:])}i", params)
    out, at = {}, 0
    for name, count in members:
        out[name] = values[at] if count == 1 else values[at : at + count]
        at += count
    return out


WEIGHTS = [
    ((), 40, 1, (3,) * 8),
    ((16, 40), 40, 2, (1, 3, 3, 3, 3, 3, 3, 3)),
    (tuple(range(16, 129, 16)), 128, 8, tuple(range(1, 9))),
    ((64, 80, 101), 101, 3, (4, 5, 7, 7, 7, 7, 7, 7)),
]


@pytest.mark.parametrize(("ends", "N", "num_ranges", "range_end"), WEIGHTS)
def test_decode_params(ends, N, num_ranges, range_end):
    weight = packed_weight(random_weight(N, 512, QuantSpec(4, 64), table_ends=ends))
    launcher = launchers.product(weight, 3, torch.float16, torch.device("cuda", 1)).launcher
    members = fields("traits.cuh", "DecodeParams")
    assert [name for name, _ in members[:7]] == [
        *("x", "packed", "scales", "table", "bias", "workspace", "out")
    ]
    assert launcher.slots == tuple(range(0, 56, 8))
    params = unpack(launcher.params, members, 7)
    assert [params[f"shape_{i}"] for i in "mnk"] == [3, N, 512]
    assert (params["num_chunks"], params["num_phases"]) == (8, 1)
    assert (params["num_ranges"], params["range_end"]) == (num_ranges, range_end)
    plan = heuristic(launchers.problem_of(weight, 3, torch.float16), Gpu())
    assert params["x_stride"] == plan.config.x_stride(512)


@pytest.mark.parametrize(
    ("ends", "N", "num_ranges", "range_end"),
    [
        ((), 40, 1, (3,) * 8),
        ((64, 192, 200), 200, 3, (4, 12, 13, 13, 13, 13, 13, 13)),
    ],
)
@pytest.mark.parametrize("M", [9, 64, 300])
def test_batch_params(M, ends, N, num_ranges, range_end):
    weight = packed_weight(random_weight(N, 512, QuantSpec(4, 64), table_ends=ends))
    problem = launchers.problem_of(weight, M, torch.float16)
    plan = next(p for p in plans_of(problem, Gpu()) if isinstance(p, BatchPlan))
    launcher = launchers.product_of(1, plan, problem, Gpu(), ends).launcher
    members = fields("batch_traits.cuh", "BatchParams")
    assert [name for name, _ in members[:5]] == ["packed", "scales", "table", "bias", "out"]
    assert launcher.slots == tuple(range(128, 168, 8))
    params = unpack(launcher.params[128:], members, 5)
    assert (params["shape_m"], params["shape_n"], params["num_chunks"]) == (M, N, 8)
    assert params["num_token_tiles"] == -(-M // plan.config.tokens)
    assert (params["num_ranges"], params["range_end"]) == (num_ranges, range_end)


@pytest.mark.parametrize(
    ("environment", "early"),
    [
        ({}, 1),
        ({"TORCHINDUCTOR_ENABLE_PDL": "0"}, 1),
        ({"TORCHINDUCTOR_ENABLE_PDL": "1"}, 0),
        ({"TORCHINDUCTOR_ENABLE_PDL": "1", "FLUTE_EARLY_DEPENDENTS": "1"}, 1),
        ({"FLUTE_EARLY_DEPENDENTS": "0"}, 0),
    ],
)
def test_when_the_next_kernel_may_start_is_told_to_kernels(monkeypatch, environment, early):
    """Those that inductor generates rely on all kernels before this one having ended."""
    for name in ("TORCHINDUCTOR_ENABLE_PDL", launchers.EARLY_DEPENDENTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    weight = packed_weight(random_weight(40, 512, QuantSpec(4, 64)))
    problem = launchers.problem_of(weight, 16, torch.float16)
    for plan, header, name, pointers, start in (
        (next(p for p in plans_of(problem, Gpu()) if isinstance(p, BatchPlan)),
         "batch_traits.cuh", "BatchParams", 5, 128),
        (heuristic(problem, Gpu()), "traits.cuh", "DecodeParams", 7, 0),
        (mma.candidates(problem, Gpu())[0], "mma_traits.cuh", "MmaParams", 7, 0),
    ):  # fmt: skip
        launcher = launchers.product_of(1, plan, problem, Gpu()).launcher
        params = unpack(launcher.params[start:], fields(header, name), pointers)
        assert params["early_dependents"] == early, name


def test_a_batch_kernel_gets_blocks_of_one_table():
    for ends, kind in (((64, 200), BatchPlan), ((16, 200), SplitPlan)):
        weight = random_weight(200, 8192, QuantSpec(4, 64), table_ends=ends)
        problem = launchers.problem_of(packed_weight(weight), 40, torch.float16)
        assert isinstance(launchers.choose(problem, ends, Gpu()), kind)


@pytest.mark.parametrize("ends", [(64, 200), (16, 200), (15, 200)])
def test_what_is_compiled_ahead_serves_every_number_of_tokens(monkeypatch, ends):
    """Also where ranges of rows, which batch kernels do not take, have others serve."""
    compiled = set()
    monkeypatch.setattr(cache, "load_or_compile", lambda source, arch: source)
    monkeypatch.setattr(
        precompile, "load_kernel", lambda source, cubin, device: compiled.add(source.text)
    )
    weight = packed_weight(random_weight(200, 8192, QuantSpec(4, 64), table_ends=ends))
    problem = precompile.prepared_problem(weight, torch.float16)
    precompile.compile_kernels([problem], torch.device("cuda", 0), lambda *_: None)
    for m in (*range(1, 130), *range(130, 2100, 37)):
        plan = launchers.choose(problem[0]._replace(m=m), problem[1], Gpu())
        if isinstance(plan, KernelPlan):
            assert launchers.source_of(plan).text in compiled, m


def test_kernels_are_compiled_on_all_cores_whatever_torch_takes(monkeypatch):
    """A worker of vLLM with several ranks has one thread of torch."""
    together = threading.Barrier(3)
    calls = itertools.count()

    def compile_(source, arch):
        if next(calls) < 3:
            together.wait(timeout=60)  # a BrokenBarrierError where fewer compile at once
        return source

    monkeypatch.setattr(cache, "load_or_compile", compile_)
    monkeypatch.setattr(precompile, "load_kernel", lambda *_: None)
    monkeypatch.setattr(precompile.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    weight = packed_weight(random_weight(200, 8192, QuantSpec(4, 64)))
    problem = precompile.prepared_problem(weight, torch.float16)
    assert precompile.compile_kernels([problem], torch.device("cuda", 0), lambda *_: None) >= 3


@pytest.mark.parametrize(("ends", "N", "num_ranges", "range_end"), WEIGHTS)
def test_dequantize_params(ends, N, num_ranges, range_end):
    weight = packed_weight(random_weight(N, 512, QuantSpec(4, 64), table_ends=ends))
    device = torch.device("cuda", 0)
    launcher = launchers.dequantize(weight, 24, 1, torch.float16, device)
    members = fields("dequantize.cuh", "DequantizeParams")
    assert [name for name, _ in members[:4]] == ["packed", "scales", "table", "out"]
    params = unpack(launcher.params, members, 4)
    assert (params["shape_n"], params["shape_k"], params["first_tile"]) == (N, 512, 1)
    assert (params["num_ranges"], params["range_end"]) == (num_ranges, range_end)
    assert launchers.dequantize(weight, 24, 1, torch.float16, device) is launcher


def test_launchers_are_shared_by_weights_of_the_same_ranges_only():
    device, found = torch.device("cuda", 0), set()
    for ends in ((16, 40), (32, 40), ()):
        for seed in range(2):
            weight = random_weight(40, 512, QuantSpec(4, 64), table_ends=ends, seed=seed)
            product = launchers.product(packed_weight(weight), 1, torch.float16, device)
            found.add(product.launcher)
    per_row = packed_weight(random_weight(40, 512, QuantSpec(4, 64), per_row=True))
    found.add(launchers.product(per_row, 1, torch.float16, device).launcher)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("ends", "taken"),
    [
        ((), True),
        ((5,), True),
        ((16, 21), True),
        ((15, 32), False),
        (tuple(range(16, 129, 16)), True),
        (tuple(range(16, 145, 16)), False),
    ],
)
def test_ranges_that_kernels_take(ends, taken):
    assert launchers.takes_ranges(ends) is taken
    N = ends[-1] if ends else 16
    weight = packed_weight(random_weight(N, 64, QuantSpec(4, 64), table_ends=ends))
    assert launchers.problem_of(weight, 1, torch.float16).row_tables is not taken
