"""Randomised Hadamard rotation: it makes weights look Gaussian, and spreads outliers over a row.

    R = diag(signs) H / sqrt(b),   R R' = I,   H: the Hadamard matrix of size b, in blocks along n

b is the largest power of two that divides n. A product by R takes n log2(b) additions. Where R goes
into a model is `flute.rotation`'s business.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_signs(n: int, seed: int) -> Tensor:
    """Return random signs, fp32, shape (n,), the same for a seed on any machine."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (n,), generator=generator, dtype=torch.int64, device="cpu")
    return 2.0 * bits.float() - 1.0


def rotate_rows(matrix: Tensor, signs: Tensor) -> Tensor:
    """Return ``matrix @ R``: each row of (N, n), in stretches of ``len(signs)``, rotated.

    Args:
        matrix: fp32 or fp64, shape (N, n).
        signs: of R, shape (d,), where d divides n; each stretch of d columns is rotated alike.

    Reference: Ashkboos et al. 2024 (QuaRot), arXiv 2404.00456, section 3.
    """
    d = len(signs)
    block = d & -d  # the largest power of two that divides d
    x = matrix.reshape(-1, d) * signs.to(matrix)
    x = x.view(-1, block)
    half = 1
    while half < block:
        pairs = x.view(-1, block // (2 * half), 2, half)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        x = x.view(-1, block)
        half *= 2
    return (x / math.sqrt(block)).view(matrix.shape)


def rotate_columns(matrix: Tensor, signs: Tensor) -> Tensor:
    """Return ``R' @ matrix``: each column, in stretches of ``len(signs)``, rotated.

    Args:
        matrix: fp32 or fp64, shape (n, K).
        signs: of R, shape (d,), where d divides n, as of `rotate_rows`.
    """
    return rotate_rows(matrix.T.contiguous(), signs).T.contiguous()
