"""NFL, Learned Normal Float: scales (and tables) that follow the gradient of a loss on real text.

    q = table[code(w / s)] * s,    s = s_0 (1 + d)

The gradient reaches d through q with the codes held (straight through), while the codes themselves
are found anew for each s. So s may cross the points where codes change, which a search per group
against the weight alone never sees the use of. Codes that error feedback has chosen are not the
nearest ones and would be lost so: ``hold_codes`` keeps them, and only what they stand for moves.

Reference: Guo et al. 2024, arXiv 2407.10960, section 3.3 (from NF, index constant in the gradient);
Chen et al. 2024 (EfficientQAT), arXiv 2407.11062, learns block by block.

Owns what is learned for one matrix; `flute.training` owns loss, data and optimiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flute.format import QuantizedWeight
from flute.methods.absmax import round_to_table, storable_scales
from flute.methods.fit import sum_by_rank


class LearnedWeight:
    """The scales and the table of one matrix while they are learned.

    Args:
        weight: the dense weight, floating-point, shape (N, K).
        start: its quantised form to start from.
        hold_codes: keep the codes of ``start`` instead of finding them anew for each step's scales.
        tables: give the table a gradient too.
    """

    def __init__(
        self, weight: Tensor, start: QuantizedWeight, *, hold_codes: bool, tables: bool = True
    ) -> None:
        self._weight, self._start, self._hold_codes = weight, start, hold_codes
        self._scales = start.scales.float()
        self.scale_change = torch.zeros_like(self._scales).requires_grad_()
        """Relative change of each scale, shape (N, groups): what an optimiser moves."""
        self.table_change = torch.zeros_like(start.table).requires_grad_(tables)
        """Change of each entry, shape (1 | N, 2**num_bits)."""

    def codes(self, scales: Tensor, table: Tensor) -> Tensor:
        """Return the codes for scales (N, groups) and a table: uint8, shape (N, K)."""
        if self._hold_codes:
            return self._start.codes
        groups = self._weight.float().contiguous().view(*scales.shape, -1)
        return round_to_table(groups, scales, table)

    @torch.no_grad()
    def codes_now(self) -> Tensor:
        """Return the codes for scales and table as they are now: uint8, shape (N, K)."""
        table = self._start.table + self.table_change
        return self.codes(self._scales * (1 + self.scale_change), table)

    def dequantized(self, codes: Tensor | None = None) -> Tensor:
        """Return ``table[codes] * scales`` as it is now, fp32 (N, K), with its gradients.

        Args:
            codes: uint8, shape (N, K); None finds them.
        """
        scales = self._scales * (1 + self.scale_change)
        table = self._start.table + self.table_change
        if codes is None:
            codes = self.codes_now()
        values: Tensor = _Dequantize.apply(scales, table, codes)  # type: ignore[no-untyped-call]
        return values

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Return the quantised matrix, its codes chosen for the scales as they are stored."""
        start = self._start
        table = start.table + self.table_change
        stored = storable_scales(self._scales * (1 + self.scale_change), start.scales.dtype)
        return QuantizedWeight(self.codes(stored, table), stored, table, start.spec)


class _Dequantize(torch.autograd.Function):
    """``table[codes] * scales`` with gradients to scales and table; keeps a byte per weight."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(scales, table, codes)
        return (_look_up(table, codes).view(*scales.shape, -1) * scales.unsqueeze(2)).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        scales, table, codes = ctx.saved_tensors
        by_group = gradient.view(*scales.shape, -1)
        to_scales = (by_group * _look_up(table, codes).view_as(by_group)).sum(2)
        if not ctx.needs_input_grad[1]:
            return to_scales, None, None
        by_weight = (by_group * scales.unsqueeze(2)).flatten(1)
        T = table.shape[1]
        if table.shape[0] == 1:
            return to_scales, sum_by_rank(codes, by_weight, T).unsqueeze(0), None
        if codes.device.type == "cpu":  # on a GPU the order of its sums differs
            to_table = torch.zeros_like(table).scatter_add_(1, codes.long(), by_weight)
        else:
            to_table = torch.stack([(by_weight * (codes == i)).sum(1) for i in range(T)], 1)
        return to_scales, to_table, None


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Look codes (N, K) up in a table (1 | N, T): fp32, shape (N, K)."""
    if table.shape[0] > 1:
        return table.gather(1, codes.long())
    return table[0].index_select(0, codes.flatten().int()).view(codes.shape)
