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
import copy
import dataclasses
import datetime
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import baselines
import torch
from quality_workers import run_here, run_in_workers
from torch import Tensor, nn

import flute
from flute.cli.loading import load_model, load_tokenizer
from flute.console import Bar, print_table, quiet_transformers
from flute.divergence import Divergence, divergence
from flute.evaluate import TEXTS, Perplexity, perplexity, read_text, to_windows
from flute.format import QuantizedWeight
from flute.linear import LutLinear
from flute.methods import CALIBRATED as METHODS_WITH_TEXT
from flute.methods import METHODS
from flute.model import QuantizeOptions, plan_model
from flute.training import LearnOptions

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "examples" / "llama-demo-7m"
BITS = (4, 3, 2)
GROUPS = (32, 64, 128)
SEEDS = (0, 1, 2)
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to quantise a model. ``kind``: "dense", "method", "baseline" or "control"."""

    method: str
    kind: str
    bits: int
    group: int
    seed: int | None = None


def bitsandbytes(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    double = case.method.endswith("double")
    return baselines.bitsandbytes_nf4(weight, case.group, double=double)


def hqq(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    return baselines.hqq(weight, case.bits, case.group)


def gptq_int(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    assert hessian is not None, "GPTQ runs with a Hessian"
    return baselines.gptq_int(weight, case.bits, case.group, hessian)


def int8(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    """Control: absmax integers of 8 bits lose about nothing."""
    groups = weight.view(-1, case.group)
    step = groups.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return ((groups / step).round() * step).view_as(weight), 8 + 16 / case.group


def permuted(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    """Control: nf whose table is permuted after the codes were chosen destroys the model."""
    quantized = flute.quantize(weight, case.bits, case.group, method="nf")
    order = torch.randperm(1 << case.bits, generator=torch.Generator().manual_seed(0))
    wrong = QuantizedWeight(
        quantized.codes, quantized.scales, quantized.table[:, order], quantized.spec
    )
    return flute.dequantize(wrong), case.bits + 16 / case.group


def dequantized(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    """Control: dense layers of nf's dequantised weights give what the real layers give."""
    quantized = flute.quantize(weight, case.bits, case.group, method="nf")
    return flute.dequantize(quantized), case.bits + 16 / case.group


OURS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in (*METHODS, *METHODS_WITH_TEXT) if name != "table"},
    "lnq, table per row": {"method": "lnq", "table_scope": "row"},
    "nfl from nf": {"method": "nfl", "learn": LearnOptions("nf", learning_rate=1e-4)},
    "nfl from lnq, table per row": {
        **{"method": "nfl", "table_scope": "row"},
        "learn": LearnOptions("lnq", tables=True),
    },
    "nfl, end to end": {"method": "nfl", "learn": LearnOptions(end_to_end=True)},
    "nfl from lnq, end to end": {
        "method": "nfl",
        "learn": LearnOptions("lnq", learning_rate=2e-3, end_to_end=True),
    },
    "gptq, guided": {"method": "gptq", "guided": True},
    "lnq, guided": {"method": "lnq", "guided": True},
}
"""Name -> options of `flute.quantize_model` besides bits and group."""
CALIBRATED = (
    "GPTQ int (re-created)",
    *(name for name, options in OURS.items() if options["method"] in METHODS_WITH_TEXT),
)
OTHERS: dict[str, Callable[[Tensor, Case, Tensor | None], baselines.Result]] = {
    "bitsandbytes nf4": bitsandbytes,
    "bitsandbytes nf4, double": bitsandbytes,
    "HQQ (re-created)": hqq,
    "GPTQ int (re-created)": gptq_int,
    "int8": int8,
    "nf, table permuted": permuted,
    "nf, dequantised": dequantized,
}
CONTROLS = ("int8", "nf, table permuted", "nf, dequantised")


def cases_of(
    methods: Sequence[str],
    bits: Sequence[int],
    groups: Sequence[int],
    *,
    calibration: bool,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Case]:
    """Yield what is measured: methods of ours, then baselines and controls, by bits and group."""
    for method in methods:
        ours = method in OURS
        needs = method in CALIBRATED
        if needs and not calibration:
            continue
        kind = "method" if ours else "control" if method in CONTROLS else "baseline"
        for num_bits in bits:
            if (method.startswith("bitsandbytes") or method in CONTROLS) and num_bits != 4:
                continue
            for group in groups:
                if method in CONTROLS and group != groups[len(groups) // 2]:
                    continue
                for seed in seeds if needs else (None,):
                    yield Case(method, kind, 8 if method == "int8" else num_bits, group, seed)


def quantized_copy(
    dense: nn.Module, case: Case, windows: Tensor | None, hessians: dict[str, Tensor] | None
) -> tuple[nn.Module, float, float]:
    """Return a quantised copy of a model, the bits it stores per weight, and the seconds it took.

    A method of the package becomes real layers, anything else dense layers of rounded weights.

    Args:
        dense: the model.
        case: what to do.
        windows: calibration text for a method of the package that needs it.
        hessians: of the dense model's layers, for a baseline that needs them.
    """
    model = copy.deepcopy(dense)
    start = time.perf_counter()
    if case.kind == "method":
        options = OURS[case.method] | ({} if windows is None else {"calibration": windows})
        flute.quantize_model(model, case.bits, case.group, **options)
        seconds = time.perf_counter() - start
        layers = [m for m in model.modules() if isinstance(m, LutLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        tensors = [t for m in layers for t in (m.codes, m.scales, m.table)]
        return model, 8 * sum(t.numel() * t.element_size() for t in tensors) / weights, seconds
    plan = plan_model(
        model, QuantizeOptions(4 if case.kind == "control" else case.bits, case.group)
    )
    stored = 0.0
    for name in plan.shapes:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} was planned as nn.Linear"
        weight = linear.weight.detach().float()
        group = plan.config.spec_of(name).group_size  # smaller where the row wants it
        flat = case.method.startswith("bitsandbytes")
        here = case if flat else dataclasses.replace(case, group=group)
        hessian = hessians[name] if hessians else None
        values, per_weight = OTHERS[case.method](weight, here, hessian)
        linear.weight.data = values.to(linear.weight.dtype)
        stored += per_weight * weight.numel()
    seconds = time.perf_counter() - start
    return model, stored / sum(N * K for N, K in plan.shapes.values()), seconds


@torch.inference_mode()
def collect_hessians(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Return sum of x x' over a text for each linear layer of the dense model, fp32, (K, K)."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    plan = plan_model(model, QuantizeOptions(4, -1))
    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in plan.shapes
    ]
    for batch in windows.split(4):
        model(input_ids=batch.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def draw(windows: Tensor, count: int, seed: int) -> Tensor:
    """Return ``count`` of the windows, drawn by the seed."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


class Remembered:
    """A model whose logits are kept: the reference of many comparisons runs once."""

    def __init__(self, model: Any) -> None:
        self._model, self._kept = model, {}
        self.config, self.device = model.config, model.device

    def eval(self) -> Remembered:
        """Do nothing: it is."""
        return self

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        """Return the logits of a batch, from the first time it was seen."""
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._kept:
            self._kept[key] = self._model(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=self._kept[key])


@dataclasses.dataclass(frozen=True)
class Material:
    """What a model is measured on.

    Args:
        path: the model's folder.
        texts: name -> windows to measure on, int64, shape (windows, window).
        lengths: numbers of windows to give figures of, from the first on.
        calibration: seed -> windows to calibrate on; empty without a calibration text.
        calibration_name: the text and its tokens, None without.
    """

    path: str
    texts: dict[str, Tensor]
    lengths: tuple[int, ...]
    calibration: dict[int, Tensor]
    calibration_name: str | None


def read_material(path: str, args: argparse.Namespace) -> Material:
    tokenizer = load_tokenizer(path)
    longest = max(args.max_tokens) if args.max_tokens else None
    texts = {
        Path(name).stem: to_windows(read_text(name), tokenizer, args.window, longest)
        for name in args.texts
    }
    counts = {min(n // args.window, *map(len, texts.values())) for n in args.max_tokens or ()}
    picked, name = {}, None
    if args.calibration:
        pool = to_windows(read_text(args.calibration), tokenizer, args.window)
        picked = {seed: draw(pool, args.calibration_windows, seed) for seed in args.seeds}
        tokens = args.calibration_windows * args.window
        name = f"{Path(args.calibration).stem}, {tokens} tokens"
    whole = max(map(len, texts.values()))
    return Material(path, texts, tuple(sorted(counts)) or (whole,), picked, name)


class Bench:
    """A dense model, its own losses, and what quantised copies of it are compared with.

    Args:
        material: what it is measured on.
        device: where all of it runs.
        head: what each record begins with.
    """

    def __init__(self, material: Material, device: str, head: Record) -> None:
        self.material = material
        self.dense = load_model(material.path, device)
        self._reference = Remembered(self.dense) if device == "cpu" else self.dense
        self._hessians: dict[int, dict[str, Tensor]] = {}
        window = next(iter(material.texts.values())).shape[1]
        self._head = {**head, "model": Path(material.path).name, "window": window}
        self._size = sum(p.numel() * p.element_size() for p in self.dense.parameters())
        plan = plan_model(self.dense, QuantizeOptions(4, -1))
        self._num_weights = sum(N * K for N, K in plan.shapes.values())
        self._plain = {name: perplexity(self.dense, w) for name, w in material.texts.items()}

    def dense_records(self) -> Iterator[Record]:
        """Yield a record of the dense model per text and length."""
        for name, result in self._plain.items():
            for count in self.material.lengths:
                part = first_windows(result, count)
                yield {
                    **{**self._head, "text": name, "tokens": part.num_tokens},
                    **{"method": "bf16", "kind": "dense", "bits": 16, "group": None},
                    **{"seed": None, "calibration": None},
                    **{"bits_per_weight": 16.0, "bytes": self._size, "ppl": part.perplexity},
                    **{"loss": part.loss, "dloss": 0.0, "dloss_error": 0.0, "kl": 0.0},
                    **{"kl_error": 0.0, "agreement": 1.0, "seconds": 0.0},
                }

    def records(self, case: Case) -> Iterator[Record]:
        """Quantise, measure, and yield a record per text and length."""
        material, picked, sums = self.material, None, None
        if case.seed is not None:
            picked = material.calibration[case.seed]
            if case.kind == "baseline":
                if case.seed not in self._hessians:
                    self._hessians[case.seed] = collect_hessians(self.dense, picked)
                sums = self._hessians[case.seed]
        model, bits, seconds = quantized_copy(self.dense, case, picked, sums)
        if self.dense.device.type != "cpu":
            make_dense(model)
        for name, windows in material.texts.items():
            whole = divergence(model, self._reference, windows)
            for count in material.lengths:
                own = first_windows(whole.perplexity, count)
                result = Divergence(whole.kl[:count], whole.agrees[:count], own)
                excess, error = own.excess(first_windows(self._plain[name], count))
                yield {
                    **{**self._head, "text": name, "tokens": own.num_tokens},
                    **{"method": case.method, "kind": case.kind, "bits": case.bits},
                    **{"group": case.group, "seed": case.seed, "bits_per_weight": bits},
                    "bytes": round(self._size - self._num_weights * (16 - bits) / 8),
                    **{"ppl": own.perplexity, "loss": own.loss},
                    **{"dloss": excess, "dloss_error": error, "kl": result.mean},
                    "calibration": None if case.seed is None else material.calibration_name,
                    **{"kl_error": result.error, "agreement": result.agreement},
                    "seconds": seconds,
                }


def first_windows(result: Perplexity, count: int) -> Perplexity:
    return Perplexity(result.losses[:count], result.window, result.seconds)


def make_dense(model: Any) -> None:
    """Put dense layers of the dequantised weights in place of quantised ones."""
    dtype = model.get_input_embeddings().weight.dtype
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LutLinear):
            weight = layer.dequantize(dtype)
            linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, linear)


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
