"""Time the op on a GPU against cuBLAS and against other libraries, on the shapes of Llama-3.

Each product is held against fp64 before it is timed; `protocol.py` says how it is timed. Libraries
that are installed are measured in the same run, each in a process of its own (`peers.py`); those
that don't take a product, or get it wrong, are left out of it, and why is printed.

Examples:
    python benchmarks/bench_kernel.py                      decode, at 4, 3 and 2 bits
    python benchmarks/bench_kernel.py --shape 5120x5120 --bits 4 --tokens 1 7 prefill
    python benchmarks/bench_kernel.py --dtype bfloat16 --group 64 --table row --peers none
    python benchmarks/bench_kernel.py --json results.json
    python benchmarks/plot_kernel.py results.json          draws these
"""

from __future__ import annotations

import argparse
import datetime
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, is_installed
from protocol import READ_BYTES_PER_US, Case, Oracle, by_weight, copies_of, time_us

import flute
from flute.console import Bar, print_table, report
from flute.format import QuantizedWeight, QuantSpec

SHAPES = (
    (57344, 8192),
    (28672, 4096),
    (8192, 28672),
    (4096, 14336),
    (8192, 8192),
    (4096, 4096),
    (6144, 4096),
    (10240, 8192),
)
"""(N, K) of Llama-3 70B and 8B: gate and up together, down, q or o, q, k and v together."""
TOKENS = {
    "decode": (1, 2, 4, 8, 16, 32),
    "prefill": (33, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192, 16384),
}
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}
FOLDER = Path(__file__).resolve().parent


def random_layer(case: Case) -> flute.LutLinear:
    spec = QuantSpec(case.num_bits, case.group_size)
    N, K, dtype = case.n, case.k, case.torch_dtype
    codes = torch.randint(0, spec.num_entries, (N, K), device="cuda", dtype=torch.uint8)
    scales = torch.randn(N, K // case.group_size, device="cuda").to(dtype)
    table = torch.randn(N if case.table == "row" else 1, spec.num_entries, device="cuda")
    return flute.LutLinear.from_quantized(QuantizedWeight(codes, scales, table, spec))


def compile_ours(cases: Iterable[Case]) -> dict[Case, flute.LutLinear]:
    """Return a layer for each weight, its kernels compiled: all of them at once, on all cores."""
    layers = {weight: random_layer(weight) for weight, _ in by_weight(cases)}
    for dtype in (torch.float16, torch.bfloat16):
        wanted = [layer for weight, layer in layers.items() if weight.torch_dtype == dtype]
        flute.prepare(torch.nn.ModuleList(wanted), dtype=dtype)
    return layers


def time_cublas(cases: Sequence[Case], bar: Bar) -> dict[Case, float]:
    """Return the microseconds of torch's product with a dense weight; bits make no difference."""
    times: dict[Case, float] = {}
    for weight, group in by_weight(dict.fromkeys(dense_case(case) for case in cases)):
        num_copies = copies_of(weight.n * weight.k * 2)
        copies = [
            torch.randn(weight.n, weight.k, device="cuda").to(weight.torch_dtype)
            for _ in range(num_copies)
        ]
        for case in group:
            x = torch.randn(case.m, case.k, device="cuda").to(case.torch_dtype)
            times[case] = time_us([partial(torch.matmul, x, copy.T) for copy in copies])
            bar.advance(1, f"cuBLAS, {case.n} x {case.k}, M = {case.m}")
    return times


def dense_case(case: Case) -> Case:
    """Return the case that stands for its dense product."""
    return replace(case, num_bits=16, group_size=128, table="tensor")


def time_ours(
    cases: Sequence[Case], layers: dict[Case, flute.LutLinear], bar: Bar
) -> dict[Case, tuple[float, float]]:
    """Return microseconds and relative error of each product.

    Raises:
        SystemExit: a product is wrong.
    """
    results: dict[Case, tuple[float, float]] = {}
    for weight, group in by_weight(cases):
        first = layers.pop(weight)
        oracle = Oracle(first.dequantize(), weight.torch_dtype)
        copies = [first, *(random_layer(weight) for _ in range(weight.num_copies - 1))]
        flute.prepare(torch.nn.ModuleList(copies), dtype=weight.torch_dtype)
        for case in group:
            error = oracle.error(first(oracle.tokens(case.m)))
            if not error < TOLERANCE[case.dtype]:
                raise SystemExit(f"wrong before it is fast: relative error {error:.1e} of {case}")
            x = torch.randn(case.m, case.k, device="cuda").to(case.torch_dtype)
            results[case] = time_us([partial(layer, x) for layer in copies]), error
            bar.advance(1, f"{case.n} x {case.k}, {case.num_bits} bits, M = {case.m}")
    return results


class Worker:
    """A process that measures one library; see `peers.py` for what is said between the two.

    Args:
        command: what starts it.
        cases: what it measures.
        log: file for what it prints, or None for one that goes with the process.
    """

    def __init__(
        self, command: Sequence[str], cases: Sequence[Case], log: Path | None = None
    ) -> None:
        self.us: dict[Case, float] = {}
        self.errors: dict[Case, float] = {}
        self.notes: dict[Case, str] = {}
        self._cases = cases
        self._log = log.open("w+") if log else tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._say(json.dumps([case.to_dict() for case in cases]))

    def _say(self, line: str) -> None:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            report("A library's process has ended early.")  # `_listen` finds out why

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _listen(self, deadline: float) -> bool:
        """Take messages until it is ready (True) or has ended (False)."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._end("no answer in time")
                return False
            if not line:
                self._process.wait()
                self._log.seek(0)
                last = (self._log.read().strip().splitlines() or ["no message"])[-1]
                code = self._process.returncode
                self._end(f"its process ended with {code}: {last[:300]}" if code else "")
                return False
            told = json.loads(line)
            if "ready" in told:
                return True
            case = self._cases[told["case"]]
            for key, values in (("us", self.us), ("error", self.errors), ("note", self.notes)):
                if key in told:
                    values[case] = told[key]

    def _end(self, why: str) -> None:
        self.close()
        for case in self._cases:
            if why and case not in self.us:
                self.notes.setdefault(case, why)

    def prepare(self, deadline: float) -> None:
        """Wait until everything is compiled and checked; end the process at the deadline."""
        if not self._listen(deadline):
            self.close()

    def time(self, deadline: float) -> None:
        """Let it time its cases, if it is there; end the process at the deadline."""
        if self._process.poll() is None:
            self._say("go")
            self._listen(deadline)
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def peer_case(case: Case) -> Case:
    """Return the case as peers have it: they know nothing of our tables."""
    return replace(case, table="tensor")


def make_records(
    cases: Sequence[Case],
    ours: dict[Case, tuple[float, float]],
    cublas: dict[Case, float],
    workers: dict[str, Worker],
    head: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return one record per product, of plain numbers and strings."""
    records = []
    for case in cases:
        us, error = ours[case]
        own = peer_case(case)
        found = {name: worker for name, worker in workers.items() if own in worker.us}
        records.append(
            {
                **case.to_dict(),
                "us": round(us, 2),
                "limit_us": round(case.limit_us, 2),
                "limit_fraction": round(case.limit_us / us, 3),
                "error": float(f"{error:.3g}"),
                "cublas_us": round(cublas[dense_case(case)], 2),
                "peers": {name: worker.us[own] for name, worker in found.items()},
                "peer_errors": {name: worker.errors[own] for name, worker in found.items()},
                "peer_notes": {n: w.notes[own] for n, w in workers.items() if own in w.notes},
                **head,
            }
        )
    return records


def print_records(records: Sequence[dict[str, Any]]) -> None:
    """Print a table, then why peers are missing from it."""
    names = [name for name in PEERS if any(name in r["peers"] for r in records)]
    rows = []
    for r in records:
        num_bytes = r["limit_us"] * READ_BYTES_PER_US
        times = [r["cublas_us"], *(r["peers"].get(name) for name in names)]
        rows.append(
            [
                f"{r['n']} x {r['k']}",
                r["num_bits"],
                r["m"],
                f"{r['us']:.1f}",
                f"{num_bytes / r['us'] / 1e3:.0f}",
                f"{r['limit_fraction']:.0%}",
                *(f"{us / r['us']:.2f}" if us else "-" for us in times),
            ]
        )
    head = records[0]
    print_table(
        f"{head['gpu']}, torch {head['torch']}, {head['dtype']}, group {head['group_size']}, "
        f"a table per {head['table']}; x: how many times as fast",
        ["N x K", "bits", "M", "us", "GB/s", "of limit", "x cuBLAS", *(f"x {n}" for n in names)],
        rows,
    )
    reasons: dict[tuple[str, str], int] = {}
    for r in records:
        for reason in r["peer_notes"].items():
            reasons[reason] = reasons.get(reason, 0) + 1
    for (name, note), count in reasons.items():
        print(f"{name}, {count} of {len(records)}: {note}")


def shape(text: str) -> tuple[int, int]:
    """Read NxK."""
    try:
        N, K = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NxK, such as 4096x14336") from None
    return N, K


def tokens(text: str) -> tuple[int, ...]:
    """Read a number of tokens, or the name of a set of them."""
    if text in TOKENS:
        return TOKENS[text]
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected {', '.join(TOKENS)} or a number")
    return (int(text),)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=shape, nargs="+", default=SHAPES, metavar="NxK", help="default: Llama-3's")
    add("--bits", type=int, nargs="+", choices=(4, 3, 2), default=(4, 3, 2))
    add(
        *("--tokens", "--set"),
        type=tokens,
        nargs="+",
        default=[TOKENS["decode"]],
        metavar="M",
        help="numbers of tokens, or decode (1 to 32, default) or prefill (33 to 16384)",
    )
    add("--dtype", nargs="+", choices=("float16", "bfloat16"), default=("float16",), help="of x")
    add("--group", type=int, nargs="+", choices=(32, 64, 128, 256), default=(128,))
    add("--table", nargs="+", choices=("tensor", "row"), default=("tensor",), help="one table per")
    add("--peers", nargs="+", choices=(*PEERS, "all", "none"), default=("all",))
    add("--tune-peers", action="store_true", help="let GemLite search its configurations: minutes")
    add("--peer-seconds", type=float, default=120, help="for a library to compile, and to be timed")
    add("--logs", type=Path, metavar="FOLDER", help="keep what the libraries print, a file each")
    add("--json", type=Path, help="write the records here too; what is there is kept on a failure")
    add("--commit", help="of the code that runs (default: what git says)")
    args = parser.parse_args(argv)
    args.tokens = sorted({m for some in args.tokens for m in some})
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU, and torch sees none.")
    cases = [
        Case(m, *shape, num_bits, group, dtype, table)
        for shape, num_bits, group, dtype, table, m in product(
            args.shape, args.bits, args.group, args.dtype, args.table, args.tokens
        )
    ]
    git = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
    found = args.commit or subprocess.run(git, capture_output=True, text=True, check=False).stdout
    head = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "commit": found.strip(),
        "date": datetime.date.today().isoformat(),
    }
    names = [name for name in PEERS if name in args.peers or "all" in args.peers]
    report(f"Not installed: {', '.join(n for n in names if not is_installed(n)) or 'none'}")
    flags = ["--tune-peers"] if args.tune_peers else []
    theirs = list(dict.fromkeys(peer_case(case) for case in cases))
    command = [sys.executable, str(FOLDER / "peers.py")]
    workers = {
        name: Worker([*command, name, *flags], theirs, args.logs and args.logs / f"{name}.log")
        for name in names
        if is_installed(name)
    }
    try:
        records = measure(cases, workers, head, args)
    finally:
        for worker in workers.values():
            worker.close()
    print_records(records)


@torch.inference_mode()
def measure(
    cases: Sequence[Case], workers: dict[str, Worker], head: dict[str, Any], args: Any
) -> list[dict[str, Any]]:
    """Compile and check everything, then time ours, cuBLAS and each peer; return the records."""
    deadline = time.monotonic() + args.peer_seconds
    layers = compile_ours(cases)
    for name, worker in workers.items():
        worker.prepare(deadline)
        report(f"{name}: {len(worker.errors)} of its products are right")
    with Bar("Timing", "products", len(cases) + len({dense_case(c) for c in cases})) as bar:
        cublas = time_cublas(cases, bar)
        ours = time_ours(cases, layers, bar)

    def save() -> list[dict[str, Any]]:
        records = make_records(cases, ours, cublas, workers, head)
        if args.json:
            args.json.write_text(json.dumps(records, indent=1) + "\n")
        return records

    records = save()
    for name, worker in workers.items():
        start = time.monotonic()
        worker.time(start + args.peer_seconds)
        report(f"{name}: {len(worker.us)} timed in {time.monotonic() - start:.0f} s")
        records = save()
    return records


if __name__ == "__main__":
    main()
