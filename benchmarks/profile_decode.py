"""Where the time of a decoded token goes in vLLM: each kernel of the GPU, and the gaps before it.

One request, greedy, CUDA graphs; the model is a folder's, or of a well-known model's shapes with
weights that vLLM makes up. A product's gap is what the kernel before it leaves of its latency.

    python benchmarks/profile_decode.py --model OUT
    python benchmarks/profile_decode.py --model llama-3-8b --variants fp16 w4 w4h --layers 8
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from serving_models import SHAPES, VARIANTS, write_folder

import flute

TOKENIZER = Path(flute.__file__).parents[1] / "examples" / "llama-demo-7m"
WARM_UP, TOKENS = 8, 33


class Kernel(NamedTuple):
    """A kernel's run on the GPU, times in us."""

    name: str
    start: float
    duration: float


class Row(NamedTuple):
    """What one kernel takes of a token, in us: by itself, and idle before it."""

    name: str
    count: float
    time: float
    gap: float


def read_trace(path: Path) -> list[Kernel]:
    """Return the kernels in a trace of torch's profiler, in order of their start."""
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [
        Kernel(event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def shares(kernels: list[Kernel], tokens: int) -> list[Row]:
    """Return what each kernel takes per token, most first.

    A kernel that starts before the last one has ended counts from that end on, so that the rows'
    times and gaps add up to the time from the first start to the last end.
    """
    count: dict[str, int] = defaultdict(int)
    time: dict[str, float] = defaultdict(float)
    gap: dict[str, float] = defaultdict(float)
    end = kernels[0].start if kernels else 0.0
    for kernel in kernels:
        name = short(kernel.name)
        count[name] += 1
        gap[name] += max(0.0, kernel.start - end)
        time[name] += max(0.0, kernel.start + kernel.duration - max(end, kernel.start))
        end = max(end, kernel.start + kernel.duration)
    rows = [Row(n, count[n] / tokens, time[n] / tokens, gap[n] / tokens) for n in count]
    return sorted(rows, key=lambda row: -(row.time + row.gap))


def short(name: str) -> str:
    """Return a kernel's name without its arguments."""
    plain = re.sub(r"^(void|int) ", "", name)
    return re.split(r"[(<]", plain, maxsplit=1)[0][:60]


def profile(folder: Path, *, dummy: bool, more: dict[str, Any]) -> list[Kernel]:
    """Serve one request in this process and return the kernels of `TOKENS` - 1 decoded tokens.

    Args:
        folder: the model.
        dummy: whether vLLM makes up its weights.
        more: arguments of vLLM's engine.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    from vllm import LLM, SamplingParams

    compilation = {"cudagraph_capture_sizes": [1], **more.get("compilation_config", {})}
    made_up: dict[str, Any] = {"load_format": "dummy", "dtype": "float16"} if dummy else {}
    engine = LLM(
        str(folder),
        max_model_len=1024,
        max_num_seqs=1,
        gpu_memory_utilization=0.6,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        **made_up,
        **{**more, "compilation_config": compilation},
    )
    prompt = [{"prompt_token_ids": list(range(10, 138))}]

    def generate(count: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        engine.generate(prompt, sampling, use_tqdm=False)

    generate(WARM_UP)
    traces = []
    for count in (1, TOKENS):  # the first token is of the prompt's processing
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            generate(count)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "trace.json"
            prof.export_chrome_trace(str(path))
            traces.append(read_trace(path))
    first, whole = traces
    return whole[len(first) :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"a folder, or one of {', '.join(SHAPES)}")
    add("--variants", nargs="+", default=["fp16", "w4"], choices=list(VARIANTS))
    add("--layers", type=int, help="keep only so many layers of a well-known model's shapes")
    add("--rows", type=int, default=14, help="kernels that are printed (14)")
    add(
        "--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of vLLM's LLM"
    )
    add("--out", type=Path, help="a JSON file for all of them")
    args = parser.parse_args()
    own = args.model not in SHAPES
    found = {}
    for variant in ["as it is"] if own else args.variants:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.model) if own else Path(temporary)
            if not own:
                write_folder(folder, variant, args.model, args.layers, TOKENIZER)
            rows = shares(profile(folder, dummy=not own, more=args.engine), TOKENS - 1)
        found[variant] = [row._asdict() for row in rows]
        print_rows(variant, rows[: args.rows], rows)
        if args.out:
            about = {"model": args.model, "layers": args.layers, "engine": args.engine}
            about["us per token"] = found
            args.out.write_text(json.dumps(about, indent=1) + "\n")


def print_rows(variant: str, rows: list[Row], all_rows: list[Row]) -> None:
    total, idle = sum(row.time for row in all_rows), sum(row.gap for row in all_rows)
    print(f"{variant}: us per token: {total:.0f} in kernels, {idle:.0f} idle between them")
    print(f"{'runs':>8} {'each':>8} {'all':>8} {'idle':>8}  kernel")
    for row in rows:
        each = row.time / row.count
        print(f"{row.count:8.1f} {each:8.2f} {row.time:8.1f} {row.gap:8.1f}  {row.name}")


if __name__ == "__main__":
    main()
