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

import torch
from torch import Tensor

from flute.format import QuantizedWeight
from flute.methods.absmax import round_to_table, storable_scales


class LearnedWeight:
    """The scales and the table of one matrix while they are learned.

    Args:
        weight: the dense weight, fp32, shape (N, K).
        start: its quantised form to start from.
        hold_codes: keep the codes of ``start`` instead of finding them anew for each step's scales.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight, *, hold_codes: bool) -> None:
        self._weight, self._start, self._hold_codes = weight, start, hold_codes
        self._scales = start.scales.float()
        self.scale_change = torch.zeros_like(self._scales).requires_grad_()
        """Relative change of each scale, shape (N, groups): what an optimiser moves."""
        self.table_change = torch.zeros_like(start.table).requires_grad_()
        """Change of each entry, shape (1 | N, 2**num_bits)."""

    def codes(self, scales: Tensor, table: Tensor) -> Tensor:
        """Return the codes for scales (N, groups) and a table: uint8, shape (N, K)."""
        if self._hold_codes:
            return self._start.codes
        groups = self._weight.view(*scales.shape, -1)
        return round_to_table(groups, scales, table)

    def dequantized(self) -> Tensor:
        """Return ``table[codes] * scales`` as it is now, fp32 (N, K), with its gradients."""
        scales = self._scales * (1 + self.scale_change)
        table = self._start.table + self.table_change
        with torch.no_grad():
            codes = self.codes(scales, table)
        index = codes.long() if table.shape[0] > 1 else codes.int()
        values = table.gather(1, index) if table.shape[0] > 1 else table[0][index]
        return (values.view(*scales.shape, -1) * scales.unsqueeze(2)).flatten(1)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Return the quantised matrix, its codes chosen for the scales as they are stored."""
        start = self._start
        table = start.table + self.table_change
        stored = storable_scales(self._scales * (1 + self.scale_change), start.scales.dtype)
        return QuantizedWeight(self.codes(stored, table), stored, table, start.spec)
