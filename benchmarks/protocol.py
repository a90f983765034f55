"""How kernels are timed here, ours and others'; the only place that says so.

A product is captured many times into one CUDA graph, each time with another copy of the weight, so
that together the copies exceed the L2 more than twice and every call reads its weight from memory.
After warm-up replays, which bring the clocks up, the time of a call is the median over replays, by
GPU events. Before it is timed, each product is held against fp64. x stays in the L2, as in a model.

The limit of a product is the time that the bytes it must move take at the read bandwidth measured:

    packed codes N K num_bits / 8 + scales 2 N K / group + x 2 M K + out 2 M N     bytes
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

READ_BYTES_PER_US = 4.37e6
"""Of an H200, by a reduction over 2 GiB."""
ROTATED_BYTES = 200e6
"""Twice the 60 MB of an H200's L2, and more."""
REPLAYS = 20
WARM_UP_US = 1e4
"""Replays before those that count; the clocks come up in that time."""
MOST_US = 1e6
"""Replays end when they have taken this long together, after 5 at least."""
CHECKED_TOKENS = 64
"""At most so many tokens of a result are held against fp64: the first and the last."""


@dataclass(frozen=True)
class Case:
    """A product to time: ``x (m, k)`` by a weight (n, k).

    Args:
        m: tokens.
        n: output features.
        k: input features.
        num_bits: bits per weight.
        group_size: weights per scale.
        dtype: of x, "float16" or "bfloat16".
        table: "tensor" or "row": what one table serves.
    """

    m: int
    n: int
    k: int
    num_bits: int
    group_size: int = 128
    dtype: str = "float16"
    table: str = "tensor"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x as torch has it."""
        return torch.float16 if self.dtype == "float16" else torch.bfloat16

    @property
    def num_bytes(self) -> float:
        """The bytes that must be moved."""
        weight = self.n * self.k * (self.num_bits / 8 + 2 / self.group_size)
        return weight + 2 * self.m * (self.n + self.k)

    @property
    def limit_us(self) -> float:
        """The time that these bytes take."""
        return self.num_bytes / READ_BYTES_PER_US

    @property
    def num_copies(self) -> int:
        """Copies of the weight that a graph rotates through."""
        return copies_of(self.n * self.k * self.num_bits / 8)

    def to_dict(self) -> dict[str, int | str]:
        """Return the fields, as JSON has them."""
        return asdict(self)


def copies_of(num_bytes: float) -> int:
    """Return how many copies of a weight exceed the L2 well."""
    return max(2, int(ROTATED_BYTES / num_bytes) + 1)


def by_weight(cases: Iterable[Case]) -> Iterator[tuple[Case, list[Case]]]:
    """Yield (weight, cases that share it); the weight is a case with m = 1."""
    cases = list(cases)
    rank = {weight: i for i, weight in enumerate(dict.fromkeys(replace(c, m=1) for c in cases))}
    ordered = sorted(cases, key=lambda case: (rank[replace(case, m=1)], case.m))
    for weight, group in groupby(ordered, key=lambda case: replace(case, m=1)):
        yield weight, list(group)


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the microseconds of one call: the median over replays of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay_us() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    warm_us = 0.0
    while warm_us < WARM_UP_US:
        warm_us += replay_us()
    times: list[float] = []
    while len(times) < REPLAYS and (len(times) < 5 or sum(times) < MOST_US):
        times.append(replay_us())
    return statistics.median(times) / len(calls)


class Oracle:
    """The product in fp64, for the first and the last tokens of any x.

    Args:
        dense: the weight exactly, fp32, shape (N, K).
        dtype: of x.
    """

    def __init__(self, dense: Tensor, dtype: torch.dtype) -> None:
        N, K = dense.shape
        self.x = torch.randn(CHECKED_TOKENS, K, device=dense.device).to(dtype)
        x, rows = self.x.double(), max(1, (1 << 26) // K)
        parts = [x @ dense[i : i + rows].double().T for i in range(0, N, rows)]
        self.exact = torch.cat(parts, dim=1)

    def tokens(self, m: int) -> Tensor:
        """Return an x of ``m`` tokens."""
        if m <= CHECKED_TOKENS:
            return self.x[:m].contiguous()
        half = CHECKED_TOKENS // 2
        middle = self.x.repeat(-(-m // CHECKED_TOKENS), 1)[: m - CHECKED_TOKENS]
        return torch.cat((self.x[:half], middle, self.x[half:]))

    def error(self, out: Tensor) -> float:
        """Return the relative error of the product of `tokens`, shape (m, N)."""
        m, half = out.shape[0], CHECKED_TOKENS // 2
        if m > CHECKED_TOKENS:
            out = torch.cat((out[:half], out[-half:]))
        exact = self.exact[:m]
        return float((out.double() - exact).norm() / exact.norm())
