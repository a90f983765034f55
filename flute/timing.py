"""Time GPU work: CUDA graphs of calls, medians. Knows nothing of what the calls compute.

The protocol: the calls of a graph touch copies of the data that together exceed the L2, so each
reads from memory; the GPU is kept busy while a graph is launched, so no time of the host counts;
graphs that are compared take turns, so a drifting clock touches all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache

import torch

REPEATS = 20


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a graph of calls that have run before.

    Args:
        calls: each launches work on the current stream. What they launch on must be ready: nothing
            may be compiled or awaited.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(
        _side_stream(torch.cuda.current_device())
    ):  # torch.cuda.graph would empty the allocator's cache each time
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


@cache
def _side_stream(device_index: int) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for each that it sees."""
    return torch.cuda.Stream(device_index)


def time_graphs_us(graphs: Sequence[torch.cuda.CUDAGraph], repeats: int) -> list[float]:
    """Return the median time of each graph, in microseconds; they take turns.

    Args:
        graphs: from `capture`.
        repeats: how often each is timed, after one untimed run.
    """
    for graph in graphs:
        graph.replay()
    pairs = []
    for _ in range(repeats):
        for graph in graphs:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            pairs.append((start, stop))
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) * 1e3 for start, stop in pairs]
    return [statistics.median(times[i :: len(graphs)]) for i in range(len(graphs))]


def time_us(calls: Sequence[Callable[[], object]], repeats: int = REPEATS) -> float:
    """Return the median time of a call, in microseconds.

    Args:
        calls: each launches the same work on a copy of the data; see `capture`.
        repeats: how often all of them are timed.
    """
    for call in calls:
        call()
    return time_graphs_us([capture(calls)], repeats)[0] / len(calls)


def rotated_copies(num_bytes: float) -> int:
    """Return how many copies of ``num_bytes`` exceed four times the L2; at least 2."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, int(4 * l2_bytes / max(num_bytes, 1)) + 1)
