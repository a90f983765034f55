"""vLLM servers to measure, and vLLM's own benchmark client against them.

Servers outlive the command that starts them, so that several may be started at once and measured
one after the other: `servers.json` in the work folder says which run. An idle server takes memory
of the GPU and no time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FIRST_PORT = 8100
LENGTH = 4096
"""Tokens of a request that models are served with, unless they take fewer."""
CAPTURED = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of tokens that vLLM captures a CUDA graph for; others are padded to the next."""
KEPT = (
    "completed",
    "failed",
    "output_throughput",
    "total_token_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "duration",
    "total_input_tokens",
    "total_output_tokens",
)


def start(
    models: dict[str, Path],
    work: Path,
    *,
    kv_gib: float,
    share: float,
    extra: Sequence[str],
    environments: Mapping[str, Mapping[str, str]],
) -> None:
    """Start a server per model, without waiting for it.

    Args:
        models: variant -> folder.
        work: where `servers.json` and the servers' logs are written.
        kv_gib: GiB of KV cache of each server.
        share: of the GPU's memory that must be free when each starts.
        extra: more arguments for each.
        environments: variant -> variables that its server has besides those of this process.
    """
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if find_spec("flashinfer") is None:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    servers = running(work)
    for i, (variant, folder) in enumerate(models.items(), len(servers)):
        port = FIRST_PORT + i
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(folder), "--port", str(port)]
        length = max_length(folder)
        command += ["--max-model-len", str(length), "--max-num-seqs", "128", "--seed", "0"]
        command += ["--no-enable-prefix-caching", "--gpu-memory-utilization", str(share)]
        command += ["--kv-cache-memory-bytes", str(int(kv_gib * 2**30))]
        command += ["--cudagraph-capture-sizes", *map(str, CAPTURED)]
        command += extra
        with (work / f"{variant}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment | environments[variant],
                start_new_session=True,
            )
        servers[variant] = {
            "port": port,
            "pid": process.pid,
            "model": str(folder),
            "max_length": length,
            "command": command[1:],
            "started": time.time(),
        }
    (work / "servers.json").write_text(json.dumps(servers, indent=1))


def max_length(folder: Path) -> int:
    """Return the most tokens of a request that a model is served with."""
    config = json.loads((folder / "config.json").read_text())
    most = config.get("text_config", config).get("max_position_embeddings", LENGTH)
    return min(LENGTH, int(most))


def running(work: Path) -> dict[str, Any]:
    """Return what `servers.json` says; empty if there is none."""
    file = work / "servers.json"
    return json.loads(file.read_text()) if file.exists() else {}


def wait(work: Path, seconds: float) -> dict[str, float]:
    """Wait until all servers answer or have died; return variant -> seconds until it answered.

    What does not answer in time, or until this is cut off, has the end of its log printed.
    """
    pending, ready = running(work), {}
    began = time.monotonic()
    try:
        importlib.import_module("vllm.benchmarks.serve")  # seconds, in which servers start
        while pending and time.monotonic() < began + seconds:
            for variant, server in list(pending.items()):
                if is_up(server["port"]):
                    ready[variant] = round(time.time() - server["started"], 1)
                    print(f"{variant}: ready after {ready[variant]} s", flush=True)
                    del pending[variant]
                elif not _is_alive(server["pid"]):
                    print(f"{variant}: the server ended.\n{tail(work, variant)}", flush=True)
                    del pending[variant]
            time.sleep(0.5)
    finally:
        waited = time.monotonic() - began
        for variant in pending:
            print(f"{variant}: no answer in {waited:.0f} s.\n{tail(work, variant)}", flush=True)
    return ready


def stop(work: Path, variants: Sequence[str] | None = None) -> None:
    """End the servers with all their processes, and wait until they are gone."""
    servers = running(work)
    ended = [servers.pop(v)["pid"] for v in list(variants or servers) if v in servers]
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for pid in ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, kind)
        deadline = time.monotonic() + 10
        while any(map(_is_alive, ended)) and time.monotonic() < deadline:
            time.sleep(0.1)
    (work / "servers.json").write_text(json.dumps(servers, indent=1))


def loaded_bytes(work: Path, variant: str) -> float | None:
    """Return the bytes that a model takes on all GPUs by its server's log; None: it says nothing.

    vLLM tells them for each rank, or for the first only.
    """
    text = (work / f"{variant}.log").read_text(errors="replace")
    gib = [float(found) for found in re.findall(r"Model loading took ([\d.]+) GiB", text)]
    ranks = [int(found) for found in re.findall(r"world_size=(\d+) rank=", text)]
    return max(gib) * 2**30 * max(ranks, default=1) if gib else None


def tail(work: Path, variant: str, lines: int = 25) -> str:
    """Return the last lines of a server's log."""
    text = (work / f"{variant}.log").read_text(errors="replace").splitlines()
    return "\n".join(text[-lines:])


def is_up(port: int) -> bool:
    """Tell whether a server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # ours: else it stays a zombie
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def measure(server: dict[str, Any], *, concurrency: int, prompts: int, tokens: tuple[int, int]):
    """Run vLLM's benchmark client and return what of its result is kept.

    Args:
        server: from `running`.
        concurrency: requests at once.
        prompts: requests in all.
        tokens: of a prompt, and of an answer.
    """
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    arguments = ["--backend", "openai", "--base-url", f"http://127.0.0.1:{server['port']}"]
    arguments += ["--model", server["model"], "--dataset-name", "random", "--ignore-eos"]
    arguments += ["--random-input-len", str(tokens[0]), "--random-output-len", str(tokens[1])]
    arguments += ["--num-prompts", str(prompts), "--max-concurrency", str(concurrency)]
    arguments += ["--temperature", "0", "--disable-tqdm", "--seed", str(concurrency)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = asyncio.run(serve.main_async(parser.parse_args(arguments)))
    except BaseException:
        print(printed.getvalue()[-4000:], flush=True)
        raise
    return {key: result[key] for key in KEPT if key in result}
