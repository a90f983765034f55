"""Relative squared error and speed of the methods that need no data.

On Gaussian weights and heavy-tailed ones (Student-t with 5 degrees of freedom).

Usage: python benchmarks/bench_methods.py [--json benchmarks/results/methods.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import flute
from flute.console import print_table
from flute.evaluate import relative_error

SHAPE = (512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the records here too")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(SHAPE, generator=generator)
    chi2 = sum(torch.randn(SHAPE, generator=generator).square() for _ in range(5))
    weights = {"gaussian": gaussian, "student-t5": gaussian * (5 / chi2).sqrt()}
    records = []
    for name, weight in weights.items():
        for num_bits in (4, 3, 2):
            for group_size in (32, 64, 128, 256):
                for method in ("mse", "bof-s", "bof", "nf", "int", "fp"):
                    start = time.perf_counter()
                    quantized = flute.quantize(weight, num_bits, group_size, method=method)
                    seconds = time.perf_counter() - start
                    records.append(
                        {
                            "weights": name,
                            "num_bits": num_bits,
                            "group_size": group_size,
                            "method": method,
                            "error": relative_error(weight, flute.dequantize(quantized)),
                            "mweights_per_second": weight.numel() / seconds / 1e6,
                        }
                    )
    if args.json:
        head = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**head, "shape": SHAPE, "records": records}, indent=1))
    rows = [
        [
            *(r[key] for key in ("weights", "num_bits", "group_size", "method")),
            f"{r['error']:.5f}",
            f"{r['mweights_per_second']:.1f}",
        ]
        for r in records
    ]
    columns = ["weights", "bits", "group", "method", "error", "M weights/s"]
    print_table("||w - q||^2 / ||w||^2", columns, rows)


if __name__ == "__main__":
    main()
