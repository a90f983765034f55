"""Run one problem of each kind of kernel: what compute-sanitizer is pointed at.

    compute-sanitizer --tool memcheck --report-api-errors no python tests/gpu/one_of_each.py

and likewise `initcheck` and `synccheck`, and `racecheck` with FLUTE_RACECHECK=1 in the environment,
which compiles what it can follow: arrivals of every thread at a cluster's barriers. The kernels
must be compiled before (run it once without), since the sanitizer slows NVRTC too. Prints the
kernels that ran; exits with 1 if a product is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import flute
from flute import cuda, launchers, mma, plans
from flute.config import Gpu, Problem
from flute.device import gpu_of
from flute.format import PackedWeight, QuantSpec
from flute.jit.cache import load_or_compile
from flute.kernel_order import order_codes, order_scales
from flute.plans import AnyPlan, BatchPlan, KernelPlan, MmaPlan, Plan

DEVICE = torch.device("cuda", 0)
N, K = 272, 1024
M_OF_KERNELS = {"decode": (1, 8, 16), "batch": (16, 24, 64, 128, 256), "mma": (16, 64, 128)}


def weight_of(spec: QuantSpec, tables: str) -> PackedWeight:
    """A random weight in kernel order; tables "one", "row" or "ranges"."""
    codes = torch.randint(0, spec.num_entries, (N, K), device=DEVICE, dtype=torch.uint8)
    scales = torch.randn(N, spec.num_groups(K), device=DEVICE).half()
    ends = (64, 192, N) if tables == "ranges" else ()
    rows = N if tables == "row" else max(1, len(ends))
    table = torch.randn(rows, spec.num_entries, device=DEVICE)
    packed = order_codes(codes, spec.num_bits)
    return PackedWeight(packed, order_scales(scales, K), table, spec, N, K, ends)


def kinds_of(problem: Problem, gpu: Gpu) -> list[KernelPlan]:
    """The first plan of each kind: family, source of x, split of K, scales, parts of units."""
    found: dict[tuple[object, ...], KernelPlan] = {}
    for plan in dict.fromkeys((*plans.plans_of(problem, gpu), *mma.candidates(problem, gpu))):
        c = getattr(plan, "config", None)
        if isinstance(plan, Plan):
            found.setdefault(("decode", c.x_source, c.cluster, plan.phases > 1), plan)
        elif isinstance(plan, BatchPlan):
            rest = (c.scale_sums, c.buffers, c.warpgroups, c.units)
            kind = ("batch", c.cluster > 1, c.split_k, *rest)
            found.setdefault(kind, plan)
        elif isinstance(plan, MmaPlan) and problem.m in M_OF_KERNELS["mma"]:
            found.setdefault(("mma", c.warps_k > 1, c.scale_sums, plan.parts), plan)
    return list(found.values())


def runs_of(weights: list[PackedWeight], gpu: Gpu) -> list[tuple[PackedWeight, int, KernelPlan]]:
    """What to run: each kernel once, for the first weight and number of tokens that it suits."""
    runs: dict[object, tuple[PackedWeight, int, KernelPlan]] = {}
    for weight in weights:
        for M in sorted({m for ms in M_OF_KERNELS.values() for m in ms}):
            problem = launchers.problem_of(weight, M, torch.float16)
            for plan in kinds_of(problem, gpu):
                kernel = (launchers.source_of(plan), len(weight.table_ends) > 1)
                runs.setdefault(kernel, (weight, M, plan))
    return list(runs.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--clusters", action="store_true", help="only kernels of clusters")
    parser.add_argument("--products", action="store_true", help="no methods, which use torch's")
    args = parser.parse_args()
    torch.manual_seed(0)
    gpu, wrong = gpu_of(DEVICE), 0
    weights = [
        weight_of(QuantSpec(num_bits, 128), tables)
        for num_bits in args.bits
        for tables in ("one", "row", "ranges")
    ]
    runs = runs_of(weights, gpu)
    if args.clusters:
        runs = [run for run in runs if getattr(run[2].config, "cluster", 1) > 1]
    sources = {launchers.source_of(plan) for _, _, plan in runs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: load_or_compile(source, gpu.arch), sources))
    for weight, M, plan in runs:
        launchers._products.clear()
        x = torch.randn(M, K, device=DEVICE).half()
        exact = x.double() @ cuda.dequantize(weight, torch.float16).double().T
        out = multiply(x, weight, plan)
        error = ((out.double() - exact).norm() / exact.norm()).item()
        if not error < 2e-3:
            wrong += 1
            tables = "ranges" if weight.table_ends else weight.table.shape[0]
            sys.stdout.write(f"wrong by {error:.1e}: M={M}, tables {tables}, {plan}\n")
    methods = [(b, m) for b in args.bits for m in ("gptq", "lnq", "lnq row")]
    methods = [] if args.clusters or args.products else methods
    wrong += sum(not rounds_well(num_bits, method) for num_bits, method in methods)
    sys.stdout.write(f"{len(runs)} kernels, {len(methods)} methods ran, {wrong} were wrong\n")
    return int(wrong > 0)


def multiply(x: torch.Tensor, weight: PackedWeight, plan: AnyPlan) -> torch.Tensor:
    """Multiply by one plan."""
    choose, launchers.choose = launchers.choose, lambda *_: plan
    try:
        return cuda.multiply(x, weight, None)
    finally:
        launchers.choose = choose
        torch.cuda.synchronize()


def rounds_well(num_bits: int, method: str) -> bool:
    """Quantise by the kernels of `flute.cuda_quantize`: less output error than absmax rounding?

    K is no multiple of their blocks, N none of theirs.
    """
    name, _, scope = method.partition(" ")
    x = torch.randn(1024, 160, device=DEVICE)
    weight = torch.randn(75, 160, device=DEVICE)
    options = {"hessian": x.T @ x, "table_scope": scope or "tensor"}
    found = flute.quantize(weight, num_bits, 32, method=name, **options)
    plain = flute.quantize(weight, num_bits, 32, method="nf")
    errors = [(x @ (weight - flute.dequantize(q)).T).norm() for q in (found, plain)]
    return bool(errors[0] < errors[1])


if __name__ == "__main__":
    sys.exit(main())
