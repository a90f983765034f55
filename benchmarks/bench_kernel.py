"""Time the op against cuBLAS on fp16 weights, on one GPU, for the shapes of Llama-3.

Protocol: CUDA graphs of calls to copies of the layer that together exceed twice the L2, warmed up,
the median of 20 replays that follow each other without a pause (`flute.timing`).
The limit is (codes + scales + x + out bytes) / the read bandwidth of an H200.

Usage: python benchmarks/bench_kernel.py [--json benchmarks/results/decode_h200.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import flute
from flute.console import print_table
from flute.format import QuantizedWeight, QuantSpec
from flute.timing import time_us

SHAPES = ((57344, 8192), (28672, 4096), (8192, 28672), (4096, 14336), (8192, 8192), (4096, 4096))
READ_BYTES_PER_US = 4.37e6
"""Measured on an H200 by a reduction over 2 GiB."""
ROTATED_BYTES = 200e6


def random_layer(N: int, K: int, spec: QuantSpec) -> flute.LutLinear:
    codes = torch.randint(0, spec.num_entries, (N, K), device="cuda", dtype=torch.uint8)
    scales = torch.randn(N, K // spec.group_size, device="cuda").half()
    table = torch.randn(1, spec.num_entries, device="cuda")
    layer = flute.LutLinear.from_quantized(QuantizedWeight(codes, scales, table, spec))
    layer.to_kernel_order()
    return layer


def copies_of(num_bytes: float) -> int:
    return max(2, int(ROTATED_BYTES / num_bytes) + 1)


@torch.inference_mode()
def measure(N: int, K: int, num_bits: int, tokens: Sequence[int]) -> list[dict[str, object]]:
    spec = QuantSpec(num_bits, 128)
    layers = [random_layer(N, K, spec) for _ in range(copies_of(N * K * num_bits / 8))]
    dense = [torch.randn(N, K, device="cuda").half() for _ in range(copies_of(N * K * 2))]
    records: list[dict[str, object]] = []
    for M in tokens:
        x = torch.randn(M, K, device="cuda").half()
        exact = x.double() @ layers[0].dequantize().double().T
        error = ((layers[0](x).double() - exact).norm() / exact.norm()).item()
        assert error < 1e-3, f"wrong before it is fast: {error} at {N}x{K}, {num_bits} bits, M={M}"
        us = time_us([lambda layer=layer, x=x: layer(x) for layer in layers])
        cublas_us = time_us([lambda weight=weight, x=x: x @ weight.T for weight in dense])
        limit = (N * K * num_bits / 8 + N * K / 128 * 2 + M * (N + K) * 2) / READ_BYTES_PER_US
        records.append(
            {
                **{"m": M, "n": N, "k": K, "num_bits": num_bits, "group_size": 128},
                **{"dtype": "float16", "table": "random", "us": round(us, 2)},
                **{"limit_fraction": round(limit / us, 3), "cublas_us": round(cublas_us, 2)},
                "peers": {},
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--json", type=Path, help="write the records here too")
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    head = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    records = []
    for N, K in SHAPES:
        for num_bits in (4, 3, 2):
            records += [{**r, **head} for r in measure(N, K, num_bits, args.tokens)]
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
    rows = [
        [
            f"{r['n']} x {r['k']}",
            r["num_bits"],
            r["m"],
            r["us"],
            f"{r['limit_fraction']:.0%}",
            f"{r['cublas_us'] / r['us']:.2f}",
        ]
        for r in records
    ]
    print_table(
        f"{head['gpu']}, fp16, group 128",
        ["N x K", "bits", "M", "us", "of limit", "x cuBLAS"],
        rows,
    )


if __name__ == "__main__":
    main()
