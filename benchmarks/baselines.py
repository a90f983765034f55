"""Other libraries' ways to quantise, re-created so that they run beside ours on any machine.

Each takes a weight (N, K) and returns the values that the library's layer would multiply with, and
the bits per weight that it stores. `bitsandbytes_nf4` equals the library bit for bit (with double
quantisation but for absmax values next to a midpoint, some of which the library rounds the other
way; tests/test_bench_quality.py). The other two follow their papers, not the libraries' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute.methods.nearest import nearest_codes
from flute.tables import get_table

Result = tuple[Tensor, float]

_NESTED_BLOCK = 256


def bitsandbytes_nf4(weight: Tensor, group_size: int, *, double: bool = False) -> Result:
    """NormalFloat of 4 bits, absmax per block of the flattened weight.

    Args:
        weight: fp32, shape (N, K).
        group_size: the library's block size; divides N * K.
        double: quantise the absmax values to 8 bits as well ("double quantisation").

    Reference: Dettmers et al. 2023, arXiv 2305.14314.
    """
    blocks = weight.reshape(-1, group_size)
    absmax = blocks.abs().amax(1)
    table = get_table("nf", 4).to(weight.device)
    inverse = absmax.masked_fill(absmax == 0, torch.inf).reciprocal()  # the library multiplies
    codes = nearest_codes(blocks * inverse[:, None], table).long()
    bits = 4 + 32 / group_size
    if double:
        absmax = nested(absmax)
        bits = 4 + (8 + 32 / _NESTED_BLOCK) / group_size
    return (table[0][codes] * absmax[:, None]).view_as(weight), bits


def nested(absmax: Tensor) -> Tensor:
    """Return absmax values as they come back from 8 bits: less their mean, in blocks of 256."""
    offset = absmax.mean()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % _NESTED_BLOCK))
    blocks = blocks.view(-1, _NESTED_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    table = dynamic_table().to(absmax.device)
    codes = nearest_codes(blocks / largest.masked_fill(largest == 0, 1), table[None]).long()
    return (table[codes] * largest).view(-1)[: len(absmax)] + offset


def dynamic_table() -> Tensor:
    """Return the 256 values of the dynamic 8-bit type: sign, a run of zeros, a linear fraction.

    Reference: Dettmers et al. 2022, arXiv 2110.02861, section 1.3.
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += [*means, *(-v for v in means)]
    return torch.tensor(sorted(values))


def hqq(weight: Tensor, num_bits: int, group_size: int, *, iterations: int = 20) -> Result:
    """Asymmetric integers whose zero-points are found by half-quadratic splitting.

    ``w ~ (code - zero) / scale``; minimises ``sum |w - q|**0.7``, robust against outliers, by
    turns over the error's shrunk part and the zero-point. No data.

    Args:
        weight: fp32, shape (N, K).
        num_bits: bits per code.
        group_size: weights per scale and zero-point, both stored in 16 bits.
        iterations: of the solver; it stops when the error no longer falls.

    Reference: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
    (mobiusml.github.io/hqq_blog); p = 0.7, beta = 10, kappa = 1.01 as there.
    """
    p, beta, kappa = 0.7, 10.0, 1.01
    top = 2**num_bits - 1
    groups = weight.reshape(-1, group_size)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (top / (high - low).clamp_min(1e-8)).clamp(max=2e4)
    zero = -low * scale
    best, best_zero = torch.inf, zero
    for _ in range(iterations):
        codes = (groups * scale + zero).round().clamp(0, top)
        error = groups - (codes - zero) / scale
        size = float(error.abs().mean())
        if size >= best:
            break
        best, best_zero = size, zero
        magnitude = error.abs()
        shrunk = (magnitude - magnitude.clamp_min(1e-12) ** (p - 1) / beta).relu() * error.sign()
        zero = (codes - (groups - shrunk) * scale).mean(1, keepdim=True)
        beta *= kappa
    step, zero = (x.bfloat16().float() for x in (1 / scale, best_zero))
    codes = (groups / step + zero).round().clamp(0, top)
    return ((codes - zero) * step).view_as(weight), num_bits + 32 / group_size


def gptq_int(
    weight: Tensor, num_bits: int, group_size: int, hessian: Tensor, *, damping: float = 0.01
) -> Result:
    """Asymmetric integers, each column's rounding error fed into the columns after it.

    Args:
        weight: fp32, shape (N, K).
        num_bits: bits per code.
        group_size: weights per scale (16 bits) and zero-point (as wide as a code); both are found
            when the group's first column is reached.
        hessian: fp32, shape (K, K): sum of the outer products of the layer's inputs.
        damping: share of the mean diagonal added to the diagonal.

    Reference: Frantar et al. 2022, arXiv 2210.17323.
    """
    top = 2**num_bits - 1
    weight, hessian = weight.clone(), hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    weight[:, dead] = 0
    diagonal += damping * diagonal.mean() + dead.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group_size):
        block = weight[:, start : start + group_size]
        low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
        step = ((high - low) / top).clamp_min(1e-8).bfloat16().float()
        zero = (-low / step).round().clamp(0, top)
        errors = torch.empty_like(block)
        part = upper[start : start + group_size, start:]
        for j in range(group_size):
            codes = (block[:, j] / step + zero).round().clamp(0, top)
            out[:, start + j] = (codes - zero) * step
            errors[:, j] = (block[:, j] - out[:, start + j]) / part[j, j]
            block[:, j:] -= errors[:, j, None] * part[j, j:group_size]
        weight[:, start + group_size :] -= errors @ part[:, group_size:]
    return out, num_bits + (16 + num_bits) / group_size
