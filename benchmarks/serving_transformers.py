"""transformers' `generate` with a static cache: what is measured where vLLM cannot run.

On a GPU generate compiles the step of one token itself (`mode="reduce-overhead"`), so that decoding
replays CUDA graphs. It does so once per number of sequences.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel


def measure(
    model: PreTrainedModel,
    *,
    concurrency: int,
    tokens: tuple[int, int],
    repeats: int,
    backend: str = "inductor",
) -> dict[str, Any]:
    """Time generation of a batch, greedy, no early end.

    Args:
        model: on the device that is measured.
        concurrency: sequences in the batch.
        tokens: of each prompt, and to generate for each.
        repeats: timed runs; medians are returned.
        backend: of torch.compile; "cudagraphs" compiles faster and fuses nothing, "none" is eager.

    Returns:
        Output tokens/s with the prompt's processing and without, ms to the first token, ms per
        token, seconds of the first run (it compiles), peak GiB of GPU memory.
    """
    num_input, num_output = tokens
    ids = torch.randint(2, model.config.vocab_size, (concurrency, num_input), device=model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = _seconds(model, ids, num_output, num_output, backend)
    whole = [_seconds(model, ids, num_output, num_output, backend) for _ in range(repeats)]
    to_first = [_seconds(model, ids, 1, num_output, backend) for _ in range(repeats + 1)][1:]
    took, ttft = statistics.median(whole), statistics.median(to_first)
    decode = concurrency * (num_output - 1) / (took - ttft)
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else None
    return {
        "output_throughput": round(concurrency * num_output / took, 1),
        "decode_throughput": round(decode, 1),
        "median_ttft_ms": round(1e3 * ttft, 2),
        "median_tpot_ms": round(1e3 * concurrency / decode, 3),
        "first_run_s": round(first, 1),
        "peak_gib": None if peak is None else round(peak, 2),
    }


def time_to_first_token(model: PreTrainedModel, num_input: int, repeats: int) -> float:
    """Return the median ms of a prompt's processing and one token."""
    ids = torch.randint(2, model.config.vocab_size, (1, num_input), device=model.device)
    times = [_seconds(model, ids, 1, 2, "none") for _ in range(repeats + 2)][2:]
    return round(1e3 * statistics.median(times), 2)


def _seconds(
    model: PreTrainedModel, ids: torch.Tensor, count: int, most: int, backend: str
) -> float:
    """Seconds of one generation; ``most`` tokens fit the cache, whose size decides the graphs."""
    how = {"disable_compile": True} if backend == "none" else {}
    if backend not in ("none", "inductor"):
        how = {"compile_config": CompileConfig(backend=backend, mode=None)}
    config = GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        max_length=None,
        cache_config={"max_cache_len": ids.shape[1] + most},
        pad_token_id=0,
        **how,
    )
    _wait(model.device)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    _wait(model.device)
    took = time.perf_counter() - start
    assert out.shape[1] == ids.shape[1] + count, "generate ended early"
    return took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
