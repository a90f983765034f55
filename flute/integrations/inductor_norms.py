"""Norms in one pass: how inductor sums rows of a decoder's width, for dependent launches.

    two passes   wait; load and sum; load, scale, store; let the next kernel start
    one pass     wait; load; let the next kernel start; sum, scale, store

In one pass the product behind a norm fetches its weights while the norm still runs, and the row is
read once. inductor takes it for up to 1,024 values by itself. It is asked through the hook that
torch has for heuristics from outside, ``torch._inductor.config.inductor_choices_class``.
"""

from __future__ import annotations

from typing import Any

import torch._inductor.config as inductor
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

MOST = 8192
"""Values of a row, 32 of each tensor in each of a block's 256 threads: they stay in registers."""


class OnePassNorms(InductorChoices):
    """inductor's own choices, but for rows of up to `MOST` contiguous values, which take a pass."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Tell whether a reduction holds its rows in registers, so that it reads them once.

        Args:
            features: inductor's description of the kernel.
            cooperative_reduction: whether several blocks share a row.
        """
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        return bool(
            inductor.triton.persistent_reductions
            and not cooperative_reduction
            and features.get_reduction_hint() == ReductionHint.INNER
            and V.graph.sizevars.statically_known_leq(features.reduction_numel, MOST)
        )
