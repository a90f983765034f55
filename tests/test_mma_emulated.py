"""The mma kernels' code compiled for the host and run by an emulator, against fp64, without a GPU.

`tests/emulator/` stands in for the instructions. What is checked: indices, copies and barriers,
pieces and their sums, tables, ranges, ragged N and K, bank conflicts; not speed.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from emulated import compile_for_host, needs_compiler, run_on_host
from helpers import TOLERANCE, exact_weight, random_weight, relative_error

from flute import launchers, mma
from flute.config import Gpu, Problem, kernel_group_size
from flute.format import QuantSpec
from flute.jit import launch
from flute.kernel_order import order_codes, order_scales
from flute.mma import MmaConfig, MmaPlan

NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
FEW_SMS = Gpu("sm_80", 5, 166912)
"""So that pieces part units of small problems."""


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(launch, "_driver", lambda: {"cuLaunchKernelEx": lambda *a: 0})


def compile_kernel(config: MmaConfig, folder) -> ctypes.CDLL:
    return compile_for_host(config.source(), "flute::mma<Config>", "flute::MmaParams", folder)


def run(library, product, pointers, *, early):
    """Do what the launches of a product would; returns what the last of each counted."""
    counts = [0] * 6
    for launcher in getattr(product.launcher, "launchers", (product.launcher,)):
        found = run_on_host(library, launcher, pointers, early=early)
        if launcher._launch_shape[-1]:  # shared memory
            counts = found
    return counts


def check(plan, spec, dtype, scale_dtype, tables, bias, M, N, K, folder, gpu=FEW_SMS):
    """Multiply by the emulated kernel and compare; returns the wavefronts counted."""
    ends = tables if isinstance(tables, tuple) else ()
    weight = random_weight(
        N, K, spec, per_row=tables == "row", table_ends=ends, scale_dtype=scale_dtype
    )
    rng = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=rng).to(dtype)
    b = torch.randn(N, generator=rng).to(dtype) if bias else None
    packed, scales = order_codes(weight.codes, spec.num_bits), order_scales(weight.scales, K)
    table = weight.table.float().contiguous()
    group = kernel_group_size(spec.group_size, K)
    problem = Problem(
        spec.num_bits, group, NAMES[dtype], NAMES[scale_dtype], tables == "row", M, N, K
    )
    names = problem._asdict()
    config = replace(plan.config, **{f: names[f] for f in list(names)[:5]})
    plan = replace(plan, config=config)
    assert mma.supports(plan, M, N, K, gpu) == ""
    product = launchers.product_of(1, plan, problem, gpu, ends)
    library = compile_kernel(config, folder)
    exact = x.double() @ torch.from_numpy(exact_weight(weight, dtype)).T
    exact += 0 if b is None else b.double()
    outs = []
    for early in (False, True):
        scratch = torch.full((product.num_scratch + 1,), float("nan"))
        guarded = torch.full((M + 2, N), 77.0, dtype=dtype)
        out = guarded[1 : M + 1]
        keep = (x, packed, scales, table, b, scratch, out)
        pointers = [0 if t is None else t.data_ptr() for t in keep]
        counts = run(library, product, pointers, early=early)
        assert (guarded[[0, -1]] == 77).all()
        assert relative_error(out, exact) <= TOLERANCE[dtype]
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    return product, np.array(counts).reshape(2, 3)


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
WIDE = {"warps_n": 4, "warps_k": 2, "tiles": 4, "chunks": 2, "stages": 3}
CASES = [
    # shape, bits, group, dtypes of x and scales, tables, bias, M, N, K
    ({"tokens": 16}, 4, 128, F16, F16, "one", True, 13, 300, 512),
    ({"tokens": 16, "warps_k": 2, "chunks": 2}, 3, 32, BF16, F32, "one", False, 17, 100, 448),
    (
        {"tokens": 32, "warps_n": 4, "warps_k": 4, "chunks": 4},
        *(2, 64, F16, F16, "row", False, 40, 65, 512),
    ),
    (
        {"tokens": 64, "scale_sums": False, **WIDE},
        *(4, 256, F16, F16, (48, 64, 203), True, 70, 203, 512),
    ),
    (
        {"tokens": 128, "stages": 3, "scale_sums": False},
        *(3, 128, BF16, BF16, "row", True, 130, 150, 512),
    ),
    (
        {"tokens": 48, "stages": 2, "scale_sums": False},
        *(2, -1, BF16, F32, "one", True, 50, 1, 160),
    ),
    (
        {"tokens": 96, "stages": 2, "scale_sums": False},
        *(4, 32, F16, F32, "one", True, 97, 129, 96),
    ),
    (
        {"tokens": 32, "warps_n": 2, "warps_k": 4, "chunks": 4, "scale_sums": False},
        *(3, 64, F16, F16, (16, 176), False, 33, 176, 1280),
    ),
    (
        {"tokens": 16, "warps_n": 4, "warps_k": 2, "chunks": 2},
        *(4, 32, BF16, BF16, "row", True, 9, 100, 352),
    ),
]


def name(case):
    return f"{case[1]} bits, {case[0]['tokens']} tokens"


@needs_compiler
@pytest.mark.parametrize("ahead", [True, False], ids=["parts, ahead", "whole"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_products_are_exact(case, ahead, tmp_path, driver):
    changes, num_bits, group, *rest = case
    config = replace(MmaConfig(), **changes)
    config = replace(config, ahead=ahead and config.stages > 2)
    check(MmaPlan(config, parts=ahead), QuantSpec(num_bits, group), *rest, tmp_path)


@needs_compiler
def test_whole_units_ahead(tmp_path, driver):
    """A piece of several units: what was looked up past a unit's end must not be used."""
    plan = MmaPlan(MmaConfig(tokens=16, ahead=True, stages=3), parts=False)
    gpu = replace(FEW_SMS, num_sms=2)
    sizes = (40, 400, 256)
    check(plan, QuantSpec(4, 64), F16, F16, (160, 400), True, *sizes, tmp_path, gpu)


@needs_compiler
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_no_bank_conflicts(num_bits, tmp_path, driver):
    plan = MmaPlan(MmaConfig(tokens=32, stages=3, ahead=True))
    sizes = (40, 256, 1024)
    _, counts = check(plan, QuantSpec(num_bits, 128), F16, F16, "one", False, *sizes, tmp_path)
    reads, writes, matrices = counts[0] / counts[1]
    assert matrices == 1
    assert writes == 1
    assert reads < 1.15  # sums are read 32 bytes to a lane, which takes twice their wavefronts
