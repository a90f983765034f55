"""Random operands for timing: codes, scales, table and x of any problem, from shared buffers.

Any words are legal codes in kernel order, so nothing is packed: a weight in hand is a view, and its
copies lie side by side, together larger than the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flute import cuda
from flute.config import Problem
from flute.format import WHOLE_ROW, PackedWeight, QuantSpec
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k
from flute.plans import DensePlan
from flute.timing import rotated_copies

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


_GRAPH_BYTES = 1e9
"""That the calls of a graph read if 6 suffice: with fewer, its own launch would count."""


class Operands:
    """One buffer of each kind, of which the weight in hand (`take`) has views.

    Args:
        tokens: weight, a problem with m = 0 -> numbers of tokens that it will be timed with.
        device: a GPU, the current one.

    Raises:
        OutOfMemoryError: torch's; the largest weight takes twice its size.
    """

    def __init__(self, tokens: Mapping[Problem, Sequence[int]], device: torch.device) -> None:
        self._device = device
        words = max(_num_words(key) * _num_copies(key) for key in tokens)
        self._words = torch.randint(
            -(1 << 31), (1 << 31) - 1, (words,), dtype=torch.int32, device=device
        )
        self._num_scales = max(_num_scales(key) * _num_copies(key) for key in tokens)
        self._num_rows = max(key.n for key in tokens)
        self._num_x = max(max(ms) * key.k for key, ms in tokens.items())
        self._cache: dict[tuple[object, ...], Tensor] = {}

    def take(self, key: Problem, most_tokens: int) -> None:
        """Make a weight the one in hand, and compute its product by another way.

        Args:
            key: a problem; its m is ignored.
            most_tokens: rows of x.
        """
        self.key, self.num_copies = key, _num_copies(key)
        self.num_calls = max(self.num_copies, min(6, int(_GRAPH_BYTES / (_num_words(key) * 4)) + 1))
        self.spec = QuantSpec(key.num_bits, key.group_size or WHOLE_ROW)
        scales = self._random("scales", self._num_scales, DTYPES[key.scale_dtype], 0.05)
        count = _num_scales(key)
        shape: tuple[int, ...] = (count,)
        if key.group_size:
            shape = (num_tiles(key.n), padded_k(key.k) // key.group_size, 8, 2)
        chunks = padded_k(key.k) // CHUNK_K
        words = _num_words(key)
        self._packed = [
            self._words[i * words : (i + 1) * words].view(num_tiles(key.n), chunks, -1)
            for i in range(self.num_copies)
        ]
        self._scales = [
            scales[i * count : (i + 1) * count].view(shape) for i in range(self.num_copies)
        ]
        rows = self._num_rows if key.row_tables else 1
        entries = self._random("table", rows << key.num_bits, torch.float32, 1.0)
        num_tables = key.n if key.row_tables else 1
        self._table = entries[: num_tables << key.num_bits].view(num_tables, -1)
        x = self._random("x", self._num_x, DTYPES[key.dtype], 1.0)
        self.x = x[: most_tokens * key.k].view(most_tokens, key.k)
        self._out = self.x.new_empty(most_tokens, key.n)
        self._scratch: list[Tensor] = []
        self._exact = dense_product(self.x, *self.weight(0), self.spec, key.n).float()
        torch.cuda.synchronize(self._device)  # kernels read weights before the stream gets there

    def _random(self, name: str, count: int, dtype: torch.dtype, scale: float) -> Tensor:
        found = self._cache.get((name, count, dtype))
        if found is None:
            numbers = torch.randn(count, device=self._device, dtype=torch.float32)
            found = self._cache[name, count, dtype] = numbers.mul_(scale).to(dtype)
        return found

    def weight(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and scales of copy ``i``, in kernel order, and the table."""
        return self._packed[i], self._scales[i], self._table

    def addresses(self, i: int) -> tuple[int, int, int]:
        """Where they lie."""
        return self._packed[i].data_ptr(), self._scales[i].data_ptr(), self._table.data_ptr()

    def x_of(self, m: int) -> Tensor:
        """The first ``m`` tokens."""
        return self.x[:m]

    def tokens_at(self, start: int) -> tuple[int, int]:
        """Addresses of x and out from a token on."""
        return (
            self.x.data_ptr() + start * self.key.k * 2,
            self._out.data_ptr() + start * self.key.n * 2,
        )

    def scratch_at(self, count: int) -> int:
        """Address of so many fp32 numbers of scratch; shared by all calls with the weight in hand.

        Args:
            count: as a product's ``num_scratch``; of none the address is 0.
        """
        if not count:
            return 0
        if not self._scratch or self._scratch[-1].numel() < count:
            # Smaller ones are kept: graphs know their addresses.
            self._scratch.append(self.x.new_empty(count, dtype=torch.float32))
        return self._scratch[-1].data_ptr()

    def error_of(self, call: Callable[[int], object], problem: Problem) -> float:
        """Relative norm of the difference between a product by copy 0 and the other way's."""
        self._out.fill_(float("nan"))
        found = call(0)
        out = found if isinstance(found, Tensor) else self._out[: problem.m]
        exact = self._exact[: problem.m]
        return float((out.float() - exact).norm() / exact.norm())


def dense_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    N: int,
    slice_bytes: int = DensePlan.slice_bytes,
) -> Tensor:
    """Multiply by dequantising slices of the weight.

    Args:
        x: fp16 or bf16, shape (M, K).
        packed: int32, shape (tiles, chunks, words of a chunk).
        scales: in kernel order.
        table: fp32, shape (1 | N, 2**num_bits).
        spec: bits and group size.
        N: output features.
        slice_bytes: most bytes of dequantised weight at a time.

    Returns:
        Shape (M, N).
    """
    weight = PackedWeight(packed, scales, table, spec, N, x.shape[1])
    return cuda.multiply_dense(x, weight, None, slice_bytes)


def _num_words(key: Problem) -> int:
    return num_tiles(key.n) * TILE_N * padded_k(key.k) * key.num_bits // 32


def _num_scales(key: Problem) -> int:
    groups = padded_k(key.k) // key.group_size if key.group_size else 1
    return num_tiles(key.n) * TILE_N * groups


def _num_copies(key: Problem) -> int:
    return rotated_copies(_num_words(key) * 4)
