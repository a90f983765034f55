"""Quantising on a GPU by kernels of ours: scales searched, columns rounded one after the other.

    search      a warp per group of weights: its scale of least squared error     scale_search.cuh
    feedback    a warp per row: the columns of a block, one after the other           feedback.cuh

Each is one launch where torch takes hundreds of small ones. Torch's way (`mse.py`, `gptq.py` and
`lnq.py` in `methods/`) stays for other devices. Importing it loads neither CUDA nor the compiler.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flute.device import gpu_of, why_not

if TYPE_CHECKING:
    from flute.jit.compiler import Source
    from flute.jit.launch import Launcher

KERNELS = Path(__file__).parent / "kernels"
COLUMNS = 128
"""The most that `feedback` takes at a time."""
_FEEDBACK_ROWS, _SEARCH_GROUPS = 4, 8
"""Rows and groups of a block, a warp each: kFeedbackWarps, kSearchWarps."""

_launchers: dict[tuple[object, ...], Launcher] = {}
_functions: dict[tuple[str, int], int] = {}
_lock = threading.Lock()


def takes(weight: Tensor) -> bool:
    """Tell whether kernels serve this weight: fp32, on a GPU that runs them."""
    return (
        type(weight) is Tensor
        and weight.device.type == "cuda"
        and weight.dtype == torch.float32
        and weight.numel() > 0
        and not why_not(weight.device)
    )


def feedback_source() -> Source:
    """Return the text of the feedback kernel."""
    from flute.jit.compiler import Source

    return Source('#include "feedback.cuh"\n', "flute::feedback", KERNELS)


def search_source(num_bits: int) -> Source:
    """Return the text of the scale search for tables of ``2**num_bits`` entries."""
    from flute.jit.compiler import Source

    text = (
        '#include "scale_search.cuh"\n'
        f"struct Config {{\n  static constexpr int num_bits = {num_bits};\n}};\n"
    )
    return Source(text, "flute::scale_search<Config>", KERNELS)


def feedback(
    aims: Tensor,
    base: Tensor | None,
    scales: Tensor,
    entries: Tensor,
    bounds: Tensor,
    effect: Tensor,
    ranks: Tensor,
    *,
    first: int,
    length: int,
) -> Tensor:
    """Round the columns of a block one after the other, each knowing what those before changed.

    ``change_i = base_i - entries[rank_i] * scale_i``, and ``aims_k += change_i * effect[i, k]`` for
    k > i, where rank_i is that of the entry nearest to ``aims_i / scale_i``.

    Args:
        aims: what the columns should be, fp32, shape (N, count), rows any distance apart; stays.
        base: what they are now, of the same shape; None: what they should be, by then.
        scales: fp32, shape (N, groups), the first of them that of the first column's group.
        entries: ascending, fp32, shape (1 | N, T).
        bounds: midpoints of neighbouring entries, fp32, shape (1 | N, T - 1).
        effect: fp32, shape (count, count).
        ranks: where ranks go, uint8, shape (N, count), rows any distance apart.
        first: place of the first column in its group.
        length: columns of a group.

    Returns:
        The changes, fp32, shape (N, count).
    """
    N, count = aims.shape
    assert count <= COLUMNS, f"{count} columns; the kernel takes {COLUMNS}"
    entries, bounds = entries.contiguous(), bounds.contiguous()
    changes = torch.empty_like(aims, memory_format=torch.contiguous_format)
    base_stride = 0 if base is None else _row_stride(base)
    strides = (_row_stride(aims), base_stride, *map(_row_stride, (scales, effect, ranks)))
    table = (entries.shape[1], int(entries.shape[0] > 1))
    launcher = _launcher(
        *("feedback", feedback_source(), aims.device, -(-N // _FEEDBACK_ROWS)),
        *(32 * _FEEDBACK_ROWS, 8, (N, count, *strides, first, length, *table)),
    )
    tensors = (aims, base, scales, entries, bounds, effect, ranks, changes)
    _launch(launcher, tensors, aims.device)
    return changes


def search(
    weight: Tensor,
    length: int,
    entries: Tensor,
    bounds: Tensor,
    candidates: Tensor,
    refinements: int,
) -> Tensor:
    """Return the signed scale of least squared error of each group; see `flute.methods.mse`.

    Args:
        weight: see `takes`, shape (N, K), rows any distance apart.
        length: weights per scale.
        entries: ascending, fp32, shape (1 | N, T).
        bounds: midpoints of neighbouring entries, shape (1 | N, T - 1).
        candidates: scales to try for the table and for its negative, as shares of a group's largest
            weight, fp32, shape (1 | N, 2, candidates).
        refinements: rounds after the first.

    Returns:
        fp32, shape (N, groups).
    """
    N, K = weight.shape
    entries, bounds, candidates = entries.contiguous(), bounds.contiguous(), candidates.contiguous()
    scales = torch.empty(N, K // length, device=weight.device)
    num_bits = entries.shape[1].bit_length() - 1
    sizes = (N, K // length, length, _row_stride(weight), candidates.shape[2], refinements)
    launcher = _launcher(
        *(f"search of {num_bits} bits", search_source(num_bits), weight.device),
        *(-(-scales.numel() // _SEARCH_GROUPS), 32 * _SEARCH_GROUPS, 5),
        (*sizes, int(entries.shape[0] > 1)),
    )
    _launch(launcher, (weight, entries, bounds, candidates, scales), weight.device)
    return scales


def _row_stride(matrix: Tensor) -> int:
    """Return how far apart rows are, whose values must lie side by side."""
    assert matrix.shape[1] == 1 or matrix.stride(1) == 1, "kernels take rows"
    return matrix.stride(0)


def _launcher(
    name: str,
    source: Source,
    device: torch.device,
    blocks: int,
    num_threads: int,
    num_pointers: int,
    sizes: tuple[int, ...],
) -> Launcher:
    """Return the launcher of a kernel whose structure is so many pointers, then the sizes."""
    from flute.jit.launch import Launcher

    key = (name, device.index, sizes)
    found = _launchers.get(key)
    if found is None:
        numbers = struct.pack(f"{len(sizes)}i", *sizes)
        found = _launchers[key] = Launcher(
            _function(name, source, device),
            grid=(blocks, 1, 1),
            num_threads=num_threads,
            smem_bytes=0,
            params=bytes(8 * num_pointers) + numbers + bytes(-len(numbers) % 8),
            slots=range(0, 8 * num_pointers, 8),
            device=device.index or 0,
            name=name,
        )
    return found


def _function(name: str, source: Source, device: torch.device) -> int:
    """Return a loaded kernel, compiled at its first use on the machine."""
    from flute.jit.cache import load_or_compile
    from flute.jit.launch import load_function

    with _lock, torch.cuda.device(device):
        function = _functions.get((name, device.index))
        if function is None:
            cubin = load_or_compile(source, gpu_of(device).arch)
            function = load_function(cubin.code, cubin.symbol, 0, device.index)
            _functions[name, device.index] = function
    return function


def _launch(launcher: Launcher, tensors: tuple[Tensor | None, ...], device: torch.device) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        launcher.launch(stream, *(0 if t is None else t.data_ptr() for t in tensors))
