"""The kernels compile for every GPU, without spills: a spread of problems, by NVRTC, on the CPU."""

from __future__ import annotations

import re

import pytest
import torch
from test_config import GPUS

from flute import batch, device, launchers, mma
from flute.candidates import heuristic
from flute.config import Gpu, Problem
from flute.jit.compiler import KernelCompileError, Source, compile_cubin

SPREAD = [
    Problem(4, 128, "float16", "float16", False, 1, 57344, 8192),
    Problem(4, 64, "bfloat16", "bfloat16", False, 8, 4096, 4096),
    Problem(3, 32, "bfloat16", "bfloat16", False, 1, 4096, 3584),
    Problem(3, 0, "float16", "float32", False, 16, 1000, 11008),
    Problem(2, 256, "bfloat16", "float16", True, 5, 8192, 4608),
    Problem(4, 0, "float16", "float16", True, 1, 33, 96),
    Problem(2, 128, "float16", "float16", False, 12, 28672, 4096),
    Problem(2, 128, "bfloat16", "bfloat16", False, 8, 57344, 8192),  # lookups in registers
    Problem(3, 128, "float16", "float16", False, 8, 8192, 28672),  # x streamed
    Problem(4, 128, "bfloat16", "bfloat16", True, 1, 28672, 4096),  # two buffers of row tables
]


def check_report(log: str) -> None:
    """Fail if the assembler reports local memory."""
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", log)
    assert found, f"no report in the log:\n{log}"
    assert set(found) == {("0", "0", "0")}, log


BATCH_SPREAD = [
    Problem(4, 128, "float16", "float16", False, 16, 57344, 8192),
    Problem(3, 32, "bfloat16", "float32", False, 32, 4096, 4096),
    Problem(4, 128, "float16", "float16", False, 24, 4096, 14336),
    Problem(2, 128, "bfloat16", "bfloat16", True, 16, 4096, 4096),
    Problem(2, 0, "float16", "bfloat16", False, 48, 4096, 14336),
    Problem(4, 64, "bfloat16", "bfloat16", True, 64, 8192, 28672),
    Problem(2, 128, "float16", "float16", False, 96, 1000, 11008),
    Problem(4, 256, "float16", "float16", False, 128, 57344, 8192),
    Problem(3, 128, "bfloat16", "bfloat16", False, 256, 57344, 8192),
]


@pytest.mark.parametrize("problem", BATCH_SPREAD, ids=lambda p: f"{p.num_bits} bits, M={p.m}")
def test_batch_kernels_compile_without_spills(problem):
    plan = batch.candidates(problem, Gpu())[0]
    cubin = compile_cubin(launchers.source_of(plan), Gpu().arch)
    check_report(cubin.log)
    assert "serialized" not in cubin.log  # ptxas: wgmma one by one


MMA_SPREAD = [
    Problem(4, 128, "float16", "float16", False, 16, 57344, 8192),
    Problem(4, 32, "bfloat16", "bfloat16", False, 32, 57344, 8192),
    Problem(3, 64, "float16", "float32", False, 48, 4096, 4096),
    Problem(2, 128, "float16", "float16", True, 64, 8192, 28672),
    Problem(2, 0, "bfloat16", "float16", False, 96, 1000, 11008),
    Problem(4, 128, "bfloat16", "bfloat16", True, 128, 57344, 8192),
]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_mma_kernels_compile_without_spills(gpu):
    plans = [mma.candidates(problem, gpu)[0] for problem in MMA_SPREAD]
    plans += [p for p in mma.candidates(MMA_SPREAD[0], gpu) if p.config.ahead][:1]
    for plan in plans:
        source = launchers.source_of(plan)
        assert source.name == "flute::mma<Config>"
        check_report(compile_cubin(source, gpu.arch).log)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_kernels_compile_without_spills(gpu):
    for problem in SPREAD:
        plan = heuristic(problem, gpu)
        for source in (launchers.source_of(plan), launchers.dequantize_source(problem)):
            cubin = compile_cubin(source, gpu.arch)
            assert cubin.code.startswith(b"\x7fELF")
            assert source.name.split("<")[0].split("::")[1] in cubin.symbol
            check_report(cubin.log)


def test_a_refused_kernel_raises_with_the_log():
    source = Source(
        '#include "decode.cuh"\nstruct Config {};\n', "flute::decode<Config>", launchers.KERNELS
    )
    with pytest.raises(
        KernelCompileError, match=r"(?s)NVRTC failed for .* on sm_90a\. Log:.*error"
    ):
        compile_cubin(source, Gpu().arch)


def test_the_rules_of_the_kernel_carry_sentences():
    config = heuristic(SPREAD[0], Gpu()).config
    text = config.source().replace("num_bits = 4", "num_bits = 5")
    source = Source(text, "flute::decode<Config>", launchers.KERNELS)
    with pytest.raises(KernelCompileError):
        compile_cubin(source, Gpu().arch)


@pytest.mark.parametrize(
    ("capability", "allowed", "reason"),
    [
        ((7, 5), "", "older than sm_80"),
        ((8, 6), "", "have not been run on it; FLUTE_UNTESTED_GPU=1 runs them"),
        ((8, 6), "1", ""),
        ((9, 0), "", ""),
    ],
)
def test_only_tested_gpus_run_the_kernels_unasked(capability, allowed, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setenv("FLUTE_UNTESTED_GPU", allowed)
    found = device.why_not.__wrapped__(torch.device("cuda", 0))
    assert found.endswith(reason) if reason else not found
