"""Tables: the 4, 8 or 16 numbers that codes index.

Owns the named families (int, fp, nf, bof, bof-s) and the reading of a user's own table. A table is
fp32 of shape (1, 2**num_bits) or (N, 2**num_bits); its order is the order of the codes and need not
be sorted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flute.bof import bof_table
from flute.errors import FormatError
from flute.format import NUM_BITS

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def int_table(num_bits: int) -> tuple[float, ...]:
    """Return the two's-complement integers, ascending: int4 is -8 .. 7.

    Reference: uniform symmetric quantisation.
    """
    half = 1 << (num_bits - 1)
    return tuple(float(v) for v in range(-half, half))


def fp_table(num_bits: int) -> tuple[float, ...]:
    """Return the values of a small float, indexed by its bit pattern (sign, exponent, mantissa).

    fp4 is e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), fp3 is e2m0 (0, 1, 2, 4) and fp2
    is e1m0 (0, 1). The pattern of minus zero decodes to zero, so it wastes one code.

    Reference: OCP Microscaling Formats (MX) v1.0, section 5.3.3, for e2m1.
    """
    positive = {4: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 3: (0.0, 1.0, 2.0, 4.0), 2: (0.0, 1.0)}
    values = positive[num_bits]
    return values + tuple(-v if v else 0.0 for v in values)


def nf_table(num_bits: int) -> tuple[float, ...]:
    """Return NormalFloat: quantiles of a normal distribution with an exact zero, scaled to [-1, 1].

    Both tails start at the probability ``1 - (1 / (2 (2**b - 1)) + 1 / (2 * 2**b)) / 2``; the
    positive side takes ``2**(b-1) + 1`` evenly spaced probabilities down to 0.5, the negative side
    one fewer, and zero joins the two. For b = 4 that is the offset 0.9677083 of the published NF4,
    whose 16 values are returned as published; 3 and 2 bits follow with their own offsets, 0.9330357
    and 0.8541667.

    Reference: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3 and appendix E.
    """
    return NF4 if num_bits == 4 else nf_quantiles(num_bits)


def nf_quantiles(num_bits: int) -> tuple[float, ...]:
    """Return NormalFloat by its construction; see `nf_table`."""
    half = 1 << (num_bits - 1)
    offset = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(p)) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-quantile(float(p)) for p in np.linspace(offset, 0.5, half)[:-1]]
    largest = max(positive)
    return tuple(sorted(v / largest for v in (*negative, 0.0, *positive)))


TABLES: dict[str, Callable[[int], tuple[float, ...]]] = {
    "int": int_table,
    "fp": fp_table,
    "nf": nf_table,
}
"""Family name -> function of num_bits."""

BLOCK_TABLES: dict[str, Callable[[int, int], tuple[float, ...]]] = {
    "bof": functools.partial(bof_table, signed=False),
    "bof-s": functools.partial(bof_table, signed=True),
}
"""Family name -> function of num_bits and group_size: tables made for groups of that size."""
FAMILIES = (*TABLES, *BLOCK_TABLES)
DEFAULT_GROUP = 64
"""The group size that "bof" and "bof-s" are made for where none is given."""

TableLike = str | Path | Tensor | Sequence[float] | Sequence[Sequence[float]] | np.ndarray


def get_table(table: TableLike, num_bits: int, group_size: int = DEFAULT_GROUP) -> Tensor:
    """Return a table as a tensor, from a name, a list, a tensor or a file.

    Args:
        table: a family ("nf", "int", "fp", "bof", "bof-s"), such a name with its bits ("nf4"), a
            sequence or tensor of ``2**num_bits`` numbers (or N rows of them), or the path of a
            .json, .txt, .npy or .safetensors file that holds one.
        num_bits: 2, 3 or 4.
        group_size: weights per scale, for families that depend on it; -1 is the whole row.

    Returns:
        fp32, shape (1, 2**num_bits) or (N, 2**num_bits), on the CPU or the given tensor's device.

    Raises:
        FormatError: an unknown name, a wrong number of entries, NaN or Inf, or one value
            throughout.
    """
    if num_bits not in NUM_BITS:
        raise FormatError(f"`num_bits` is {num_bits!r}; expected one of {NUM_BITS}.")
    source = "`table`"
    values: object = table
    if isinstance(table, (str, Path)):
        name = str(table)
        family = name.removesuffix(str(num_bits))
        if family in TABLES:
            values = TABLES[family](num_bits)
        elif family in BLOCK_TABLES:
            values = BLOCK_TABLES[family](num_bits, group_size)
        else:
            source, values = f"`{name}`", read_table_file(Path(name))
    try:
        if isinstance(values, np.ndarray):  # torch takes neither reversed nor foreign byte order
            values = values.astype(values.dtype.newbyteorder("="), order="C")
        # Why explicit: callers run under other default dtypes (bf16) and devices (meta).
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values, dtype=_exact_dtype(values), device="cpu")
        if values.is_complex():
            raise TypeError("complex numbers")
        tensor = values.detach().to(torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{source} is not a list of numbers: {error}") from error
    tensor = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or tensor.shape[1] != 1 << num_bits or not len(tensor):
        raise FormatError(
            f"{source} has shape {tuple(tensor.shape)}; expected {1 << num_bits} entries "
            f"(or N rows of them) for num_bits={num_bits}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{source} holds NaN or Inf; expected finite numbers.")
    if bool((tensor.amax(1) == tensor.amin(1)).any()):
        raise FormatError(f"{source} holds one value throughout; expected at least two.")
    return tensor


def read_table_file(path: Path) -> object:
    """Read the numbers of a table from .json, .txt, .npy or .safetensors (one tensor).

    Raises:
        FormatError: no such name or file, an unknown suffix, or a file that cannot be parsed.
    """
    if not path.exists():
        absent = ", and there is no such file" if path.suffix else ""
        raise FormatError(
            f"`table` is {str(path)!r}{absent}; expected one of {FAMILIES} (with or without the "
            "bits, as in 'nf4') or the path of a .json, .txt, .npy or .safetensors file."
        )
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda p: json.loads(p.read_text()),
        ".txt": lambda p: np.loadtxt(
            p, delimiter=None if "," not in p.read_text() else ","
        ).tolist(),
        ".npy": _array,
        ".safetensors": _only_tensor,
    }
    if path.suffix not in readers:
        raise FormatError(f"`{path}` has suffix {path.suffix!r}; expected one of {tuple(readers)}.")
    try:
        return readers[path.suffix](path)
    except Exception as error:
        raise FormatError(f"`{path}` cannot be read as a table: {error}") from error


def _exact_dtype(values: object) -> torch.dtype | None:
    return None if isinstance(values, np.ndarray) else torch.float64


def _array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it is no .npy file; write one by numpy.save")
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def _only_tensor(path: Path) -> Tensor:
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors; expected one")
    return next(iter(tensors.values()))
