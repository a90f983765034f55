"""Time products on a CPU against PyTorch, its int4, bitsandbytes and llama.cpp, interleaved.

Methods take turns, so that what else the machine does hits all; a ratio is the median over rounds
of (their time / our time) within a round. With one thread time is that thread's on a CPU, which
other processes do not lengthen by taking the core. Weights rotate over copies that do not fit the
caches (bitsandbytes' does not). After the reads, which make the next 0.2 ms slow, comes torch's
bf16, for which that is little. Each product is held against fp64 before it is timed. The read
bandwidth is that of summing 256 MB in the same rounds; shares of it are by the best
rounds, and by medians. llama.cpp is measured with --ggml FOLDER (`ggml.py`).

    python benchmarks/bench_cpu.py --shapes 14336x4096 --tokens 1 8 --threads 1 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from ggml import TYPES, Ggml, Product

import flute
from flute.cpu import library, products
from flute.format import PackedWeight, QuantSpec

SHAPES = ("14336x4096", "4096x14336", "4096x4096", "6144x4096")
BYTES = 256 << 20
"""Bytes over which the copies of a weight rotate, and of the buffer that is read."""
GROUP = 128


def lut_products(N: int, K: int, num_bits: int) -> tuple[list[PackedWeight], torch.Tensor]:
    """Copies of one random weight in CPU order, and the dense weight."""
    spec = QuantSpec(num_bits, GROUP)
    codes = torch.randint(0, spec.num_entries, (N, K), dtype=torch.uint8)
    table = torch.randn(1, spec.num_entries).sort().values
    scales = (torch.rand(N, K // GROUP) / 8 + 0.01).bfloat16()
    stored = PackedWeight(flute.pack_codes(codes, num_bits), scales, table, spec, N, K)
    packed, ordered = products.order(stored)
    weight = stored._replace(packed=packed, scales=ordered)
    count = max(2, BYTES // packed.numel())
    copies = [weight._replace(packed=products.order(stored)[0]) for _ in range(count)]
    return copies, products.dequantize(weight, torch.float32)


def ggml_products(
    ggml: Ggml, N: int, K: int, dense: torch.Tensor
) -> dict[str, Callable[[torch.Tensor, int], object]]:
    """llama.cpp's products; graphs are made at the first round with an x."""
    found: dict[str, Callable[[torch.Tensor, int], object]] = {}
    for kind in TYPES:
        weights = ggml.weights(kind, dense, max(2, BYTES // (N * K * 9 // 16)))
        ready: dict[int, list[Product]] = {}

        def run(x: torch.Tensor, i: int, weights=weights, ready=ready) -> object:
            if x.data_ptr() not in ready:
                ready.clear()
                ready[x.data_ptr()] = ggml.products(weights, x, N)
            return ready[x.data_ptr()][i % len(weights)]()

        x = torch.randn(2, K)
        product = ggml.products(weights[:1], x, N)[0]
        product()
        exact = x @ dense[:64].T
        error = float((product.result()[:, :64] - exact).norm() / exact.norm())
        assert error < 0.2, f"{kind} of ggml gives a wrong product: {error}"
        found[f"llama.cpp {kind}"] = run
    return found


def peers(N: int, K: int, dense: torch.Tensor) -> dict[str, Callable[[torch.Tensor, int], object]]:
    """The other ways to multiply that are installed here; each takes x and the round."""
    half = [dense.bfloat16() for _ in range(max(2, BYTES // (2 * N * K)))]
    full = [dense, dense.clone()]
    found: dict[str, Callable[[torch.Tensor, int], object]] = {
        "torch bf16": lambda x, i: F.linear(x, half[i % len(half)]),
        "torch fp32": lambda x, i: F.linear(x.float(), full[i % 2]),
    }
    try:
        ints = torch.randint(0, 16, (N, K), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints, 1)
        zeros = torch.ones(K // GROUP, N, 2).bfloat16()
        copies = [packed.clone() for _ in range(max(2, BYTES // packed.numel()))]
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
        int4(torch.zeros(1, K).bfloat16(), packed, GROUP, zeros)
        found["torch int4"] = lambda x, i: int4(x, copies[i % len(copies)], GROUP, zeros)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        print(f"torch int4: not here ({error})")
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense.bfloat16(), quant_type="nf4", blocksize=GROUP)
        layer = layer.to("cpu").eval()
        layer(torch.zeros(1, K).bfloat16())
        found["bitsandbytes nf4"] = lambda x, i: layer(x)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        print(f"bitsandbytes nf4: not here ({error})")
    return found


def measure(
    shape: str,
    tokens: list[int],
    threads: list[int],
    rounds: int,
    bits: list[int],
    ggml: Ggml | None,
) -> list[dict[str, object]]:
    """Return a record per number of tokens, threads and bits."""
    N, K = map(int, shape.split("x"))
    weights = {b: lut_products(N, K, b) for b in bits}
    others = peers(N, K, weights[bits[0]][1])
    if ggml is not None:
        others |= ggml_products(ggml, N, K, weights[bits[0]][1])
    buffer, records = torch.zeros(BYTES // 8, dtype=torch.int64), []
    for count in threads:
        torch.set_num_threads(count)
        if ggml is not None:
            ggml.set_threads(count)
        clock = time.thread_time if count == 1 else time.perf_counter
        for M in tokens:
            x = torch.randn(M, K).bfloat16()
            for copies, dense in weights.values():
                out = products.multiply(x, copies[0], None).double()
                exact = x.double() @ dense.double().T
                error = float((out - exact).norm() / exact.norm())
                assert error < 1e-2, f"a product is wrong: {error}"
            methods: dict[str, Callable[[int], object]] = {"read": lambda i: buffer.sum()}
            methods |= {name: lambda i, f=f, x=x: f(x, i) for name, f in others.items()}
            methods |= {
                f"flute {b}": lambda i, c=c, x=x: products.multiply(x, c[i % len(c)], None)
                for b, (c, _) in weights.items()
            }
            times: dict[str, list[float]] = {name: [] for name in methods}
            for i in range((rounds if M < 128 else max(2, rounds // 3)) + 1):
                for name, method in methods.items():
                    start = clock()
                    method(i)
                    if i:  # the first round warms up
                        times[name].append(clock() - start)
            read_s = times["read"]
            for b, (copies, _) in weights.items():
                ours = times[f"flute {b}"]
                size = copies[0].packed.numel() + 2 * copies[0].scales.numel()
                ratios = {
                    name: round(
                        statistics.median(t / o for t, o in zip(times[name], ours, strict=True)), 2
                    )
                    for name in others
                }
                record = {"shape": shape, "bits": b, "M": M, "threads": count, "ratios": ratios}
                record["ms_min"] = round(1e3 * min(ours), 3)
                record["ms_median"] = round(1e3 * statistics.median(ours), 3)
                share = size / BYTES * min(read_s) / min(ours)
                record["share_of_read_bandwidth"] = round(share, 3)
                share = size / BYTES * statistics.median(read_s) / statistics.median(ours)
                record["share_by_medians"] = round(share, 3)
                record["read_gb_per_s"] = round(BYTES / min(read_s) / 1e9, 1)
                print(json.dumps(record), flush=True)
                records.append(record)
    return records


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="N x K, as 14336x4096")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 32, 128, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ggml", type=Path, help="folder of llama.cpp's shared libraries")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if reason := library.why_not():
        raise SystemExit(f"No CPU kernels here: {reason}")
    records, ggml = [], Ggml(args.ggml) if args.ggml else None
    for shape in args.shapes:
        records += measure(shape, args.tokens, args.threads, args.rounds, args.bits, ggml)
        if not args.out:
            continue
        machine = {"cpu": cpu_name(), "variant": library.variant(), "torch": torch.__version__}
        result = {"machine": machine, "group_size": GROUP, "rounds": args.rounds}
        args.out.write_text(json.dumps({**result, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
