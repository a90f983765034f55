"""The calibration Hessian of a linear layer, made safe to factor; shared by gptq and lnq.

For inputs x of a layer, rows of X (tokens, K), the output's squared error of a quantised row q is

    ||X (w - q)||^2 = (w - q) H (w - q)',   H = X' X   (K, K)

Only H's direction matters, so it is scaled to a mean diagonal of 1 before it is damped. Guided
weighting (`flute.guidance`) gives each group of outputs its own, X' diag(g^2) X: (groups, K, K).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from flute.errors import FormatError

DAMPING = 0.01
"""Added to the diagonal as a share of its mean; what GPTQ's authors use."""
_MAX_DAMPING = 10.0


def check_hessian(hessian: Tensor, K: int) -> None:
    """Check a Hessian's shape and values.

    Raises:
        FormatError: not (K, K) or (groups, K, K), a negative diagonal, or NaN or Inf in it.
    """
    if hessian.ndim not in (2, 3) or hessian.shape[-2:] != (K, K):
        raise FormatError(
            f"`hessian` has shape {tuple(hessian.shape)}; expected (K, K) = ({K}, {K}), the sum of "
            "x x' over calibration inputs."
        )
    if not all(bool(torch.isfinite(end)) for end in hessian.aminmax()):
        raise FormatError("`hessian` holds NaN or Inf: so did the layer's calibration inputs.")
    if bool((hessian.diagonal(dim1=-2, dim2=-1) < 0).any()):
        raise FormatError("`hessian` has a negative diagonal; expected the sum of x x'.")


def row_groups(N: int, hessian: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight (N, K) that share a Hessian, and that one, shape (K, K).

    Args:
        N: rows of the weight.
        hessian: (K, K) of all rows, or (groups, K, K): of consecutive groups of rows, as equal as
            `torch.tensor_split` makes them.
    """
    if hessian.ndim == 2:
        yield slice(0, N), hessian
        return
    start = 0
    for rows, own in zip(torch.arange(N).tensor_split(len(hessian)), hessian, strict=True):
        if len(rows):
            yield slice(start, start + len(rows)), own
        start += len(rows)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Return ``H / mean(diag H) + damping * I`` in fp32, shape (K, K).

    A column that was never active has only the damping: it is rounded to nearest, and no other
    column makes up for it. If none was active (an expert that no token took), all are treated so.
    """
    mean = hessian.diagonal().double().mean()
    scaled = (hessian / mean).float() if float(mean) > 0 else torch.zeros_like(hessian).float()
    scaled.diagonal().add_(damping)
    return scaled


def factored(
    hessian: Tensor, damping: float = DAMPING, name: str = "the layer"
) -> tuple[Tensor, Tensor, float]:
    """Return the damped Hessian, the upper Cholesky factor U of its inverse, and the damping used.

    ``H^-1 = U' U``.

    Where rounding leaves the Hessian without such a factor, the damping is raised tenfold until it
    has one; a warning says so.

    Args:
        hessian: sum of x x' over a layer's inputs, fp32, shape (K, K).
        damping: added to the diagonal, as a share of its mean.
        name: of the layer, for messages.

    Returns:
        ``H`` and ``U``, both fp32, shape (K, K), and the damping.

    Raises:
        FormatError: not even a damping of ten times the diagonal's mean helps.
    """
    used = damping
    while used <= _MAX_DAMPING:
        full = damped(hessian, used)
        upper = _inverse_factor(full)
        if upper is not None:
            if used > damping:
                warnings.warn(
                    f"The Hessian of {name} is not positive definite with damping {damping:g}; "
                    f"raised to {used:g}. More calibration text (`--samples`) helps.",
                    stacklevel=3,
                )
            return full, upper, used
        used = max(10 * used, 1e-4)
    raise FormatError(
        f"`hessian` is not positive definite, even with damping {_MAX_DAMPING:g}; expected the sum "
        "of x x' over calibration inputs."
    )


def _inverse_factor(full: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(full)
    if bool(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed) or not bool(torch.isfinite(upper).all()) else upper
