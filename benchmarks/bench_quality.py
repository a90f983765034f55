"""Quality of every method on small trained models: perplexity, KL divergence, size, seconds.

Each method of the package at each number of bits and group size, the bf16 model, controls, and
other libraries' methods re-created (`baselines.py`). Methods that calibrate run on three seeds,
which draw other windows from the calibration text; without such a text they are left out. Losses
are paired with the bf16 model's on the same windows. benchmarks/plot_quality.py draws the results.

`--workers` measures cases in as many processes, on a GPU too (`--device cuda`), the middle group
size and the first seed first; `--budget` bounds the time. What is measured is in the file at once,
and `--append` goes on with what is not in it yet. On a GPU the quantised weights run as dense ones,
and several processes want CUDA's MPS (`nvidia-cuda-mps-control -d`): without it they take turns.

Usage: python benchmarks/bench_quality.py --json benchmarks/results/quality.json
       python benchmarks/bench_quality.py --json gpu.json --device cuda --workers 12 --budget 240 \
           --calibration train.txt --max-tokens 8192 65536
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quality_cases import OTHERS, OURS, SEEDS, Case, cases_of
from quality_measure import Bench, Material, Record, read_material
from quality_workers import run_here, run_in_workers

from flute.console import Bar, print_table, quiet_transformers
from flute.evaluate import TEXTS

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "examples" / "llama-demo-7m"
BITS = (4, 3, 2)
GROUPS = (32, 64, 128)


def first_of_all(case: Case, args: argparse.Namespace) -> tuple[bool, bool, int]:
    """Order cases by what is wanted first: the middle group, then seeds, then other groups."""
    middle = args.groups[len(args.groups) // 2]
    return case.group != middle, case.seed not in (None, args.seeds[0]), case.seed or 0


def ordered_cases(material: Material, args: argparse.Namespace) -> list[Case]:
    calibration = bool(material.calibration)
    methods = args.methods or [*OURS, *OTHERS]
    cases = cases_of(methods, args.bits, args.groups, calibration=calibration, seeds=args.seeds)
    return sorted(cases, key=lambda case: first_of_all(case, args))


def identity(record: Record) -> tuple[Any, ...]:
    """Return what tells a case's records from another's."""
    keys = ("model", "method", "bits", "group", "seed", "calibration")
    return tuple(record[key] for key in keys)


def commit() -> str | None:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.check_output(command, cwd=ROOT, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """Return the CPU and how many cores torch uses; `main` adds a GPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def rounded(record: Record) -> Record:
    """Return a record with floats of six digits: a file that is read and compared."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}


def keep(path: Path, records: Sequence[Record]) -> None:
    """Write the records, one per line, by way of a file beside it."""
    lines = ",\n".join(json.dumps(record) for record in records)
    part = path.with_suffix(".part")
    part.write_text(f"[\n{lines}\n]\n")
    part.replace(path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[str(DEMO_MODEL)], metavar="DIR")
    parser.add_argument(
        "--texts", nargs="+", default=list(TEXTS), metavar="TEXT", help="files or shipped texts"
    )
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens; 1024")
    parser.add_argument(
        *("--max-tokens", "-n"),
        type=int,
        nargs="+",
        metavar="N",
        help="of each text, several for figures of each; default all",
    )
    parser.add_argument("--methods", nargs="+", choices=[*OURS, *OTHERS], metavar="METHOD")
    parser.add_argument("--bits", nargs="+", type=int, default=BITS, choices=BITS)
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS, metavar="N")
    parser.add_argument("--calibration", metavar="TEXT", help="training text, none of --texts")
    parser.add_argument("--calibration-windows", type=int, default=16, metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write records after each case")
    parser.add_argument("--append", action="store_true", help="keep the records that FILE has")
    parser.add_argument("--commit", metavar="ID", help="to record; default: what git says")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0: this")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long")
    args = parser.parse_args(argv)
    if args.calibration in args.texts:
        parser.error("--calibration is one of --texts: calibrate on other text than is measured")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    start = time.perf_counter()
    quiet_transformers()
    where = machine()
    if args.device != "cpu":
        where = f"{torch.cuda.get_device_name(args.device)}, {where}"
    if args.workers:
        where += f", {args.workers} processes"
    head = {
        "commit": args.commit or commit(),
        "date": datetime.date.today().isoformat(),
        "machine": where,
    }
    records: list[Record] = json.loads(args.json.read_text()) if args.append else []
    known, old = {identity(r) for r in records}, len(records)
    materials = [read_material(path, args) for path in args.models]
    jobs = []
    for material in materials:
        own = {"model": Path(material.path).name, "calibration": None}
        if not any((r["method"], r["model"]) == ("bf16", own["model"]) for r in records):
            jobs.append((material.path, None))
        for case in ordered_cases(material, args):
            own["calibration"] = None if case.seed is None else material.calibration_name
            if identity({**dataclasses.asdict(case), **own}) not in known:
                jobs.append((material.path, case))
    deadline = None if args.budget is None else start + args.budget
    run = functools.partial(run_in_workers, workers=args.workers) if args.workers else run_here
    benches = {m.path: functools.partial(Bench, m, args.device, head) for m in materials}
    left = len(jobs)
    with Bar("measuring", "cases", len(jobs)) as bar:
        for (_, case), found in run(benches, jobs, deadline=deadline):
            records += [rounded(record) for record in found]
            if args.json:
                keep(args.json, records)
            left -= 1
            bar.advance(1, "bf16" if case is None else f"{case.method} {case.bits} bits")
    if left:
        print(f"{left} of {len(jobs)} cases were not measured; go on with --append.")
    columns = ["model", "text", "method", "bits", "group", "seed", "bits/weight", "perplexity"]
    columns += ["loss over bf16", "KL", "agreement", "seconds"]
    rows = [
        [
            *(r[k] for k in ("model", "text", "method", "bits", "group", "seed")),
            f"{r['bits_per_weight']:.3f}",
            f"{r['ppl']:.2f}",
            f"{r['dloss']:.4f} +- {r['dloss_error']:.4f}",
            f"{r['kl']:.4f} +- {r['kl_error']:.4f}",
            f"{r['agreement']:.3f}",
            f"{r['seconds']:.1f}",
        ]
        for r in records[old:]
    ]
    print_table("Quality; losses and KL in nats per token", columns, rows)


if __name__ == "__main__":
    main()
