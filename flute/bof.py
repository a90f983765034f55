"""BOF: the tables of least squared error for Gaussian weights that are scaled block by block.

In a block of G weights divided by its largest magnitude m, the others follow a normal distribution
cut off at +-1, whose width depends on m. Their squared error counts m^2. So the density that the
entries have to serve is, over x in (-1, 1),

    f(x) ~ integral over m of  p(m) m^2 * m phi(m x) / P(|w| < m),    p: density of m in a block

and Lloyd's algorithm on f gives the entries. Zero and the largest weight's own entries are held.
"""

from __future__ import annotations

import functools
import math

import numpy as np

_CELLS = 8192
"""Cells of (-1, 1) on which the density stands; twice as many change no entry by 1e-4."""
_ROUNDS = 3000
"""Of Lloyd's algorithm; with 16 entries the last thousand change none by 1e-4."""


@functools.cache
def bof_table(num_bits: int, group_size: int, signed: bool) -> tuple[float, ...]:
    """Return the entries, ascending, with six decimals.

    Args:
        num_bits: 2, 3 or 4.
        group_size: weights per block, 2 or more; a whole row (-1) is taken for 256.
        signed: blocks are divided by their largest weight itself, not by its magnitude, so that it
            always becomes 1: the entry -1 is free for better use (BOF-S).

    Reference: Blumenberg et al. 2025, arXiv 2505.06653; computed here, not copied.
    """
    x, density = _density(256 if group_size < 2 else group_size)
    mass = np.concatenate(([0.0], np.cumsum(density)))
    moment = np.concatenate(([0.0], np.cumsum(density * x)))
    entries = np.linspace(-0.9 if signed else -1.0, 1.0, 1 << num_bits)
    zero = int(np.abs(entries).argmin())
    held = [zero, len(entries) - 1] if signed else [0, zero, len(entries) - 1]
    values = [0.0, 1.0] if signed else [-1.0, 0.0, 1.0]
    for _ in range(_ROUNDS):
        entries[held] = values
        bounds = np.searchsorted(x, (entries[1:] + entries[:-1]) / 2)
        edges = np.concatenate(([0], bounds, [len(x)]))
        weight = np.diff(mass[edges])
        entries = np.where(weight > 0, np.diff(moment[edges]) / np.maximum(weight, 1e-300), entries)
    entries[held] = values
    return tuple(round(float(entry), 6) for entry in entries)


@functools.cache
def _density(group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of cells over (-1, 1), and the weighted density there (unnormalised)."""
    x = (np.arange(_CELLS) + 0.5) * (2 / _CELLS) - 1
    largest = np.linspace(0.004, 8, 2000)
    within = np.array([math.erf(m / math.sqrt(2)) for m in largest])
    # p(m) ~ within^(G - 1) phi(m), of which one factor `within` cancels against P(|w| < m)
    shares = within ** (group_size - 2) * np.exp(-(largest**2) / 2) * largest**3
    half = np.exp(-0.5 * np.outer(x[_CELLS // 2 :] ** 2, largest**2)) @ shares
    return x, np.concatenate((half[::-1], half))
