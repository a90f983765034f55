"""The experts of an MoE block that multiply the tokens routed to them, as a CUDA graph allows.

A graph holds fixed addresses and fixed shapes, so which expert multiplies cannot change the launch.

    few tokens    the chosen experts are copied side by side, and the copies multiplied     routed
    many          every expert multiplies every token, mostly for a weight of zero     all_experts
    no graph      the experts that are asked for multiply their tokens                   asked_for

A copy costs three times its bytes (read, written, read by the product), so that the first way wins
while a token's choices, together, are few against the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flute.format import PackedWeight, QuantSpec
from flute.kernel_order import TILE_N
from flute.launchers import MAX_RANGES
from flute.ops import lut_gemm

COPY_COST = 4
"""Experts that could multiply in the time that copying and multiplying one takes: a bound."""


class ExpertStack(NamedTuple):
    """One projection of several experts, alike in shape and spec.

    Args:
        codes: of all of them, shape (E, ...), in plain or in kernel order.
        scales: shape (E, ...).
        table: shape (E, tables of an expert, 2**num_bits).
        spec: bits and group size.
        N: output features of an expert.
        table_ends: where an expert's ranges of rows with tables of their own end.
        is_ordered: whether codes and scales are in kernel order.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    spec: QuantSpec
    N: int
    table_ends: tuple[int, ...]
    is_ordered: bool

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.table

    def take(self, experts: Tensor) -> ExpertStack:
        """Return copies of some experts.

        Args:
            experts: int64, shape (n,).
        """
        codes, scales, table = (p.index_select(0, experts) for p in self._tensors())
        return self._replace(codes=codes, scales=scales, table=table)

    def multiply(self, e: int, x: Tensor) -> Tensor:
        """Return the product of expert ``e``, shape (M, N).

        Args:
            e: its index.
            x: shape (M, K).
        """
        out_features = self.N if self.is_ordered else None
        parts = (self.codes[e], self.scales[e], self.table[e])
        return lut_gemm(x.contiguous(), *parts, self.spec, None, out_features, self.table_ends)

    def launches(self, count: int) -> list[int]:
        """Return how many experts each launch of `multiply_side_by_side` takes.

        Args:
            count: of experts in all.
        """
        per_row = self.table.shape[1] == self.N
        most = count if per_row else MAX_RANGES // self.table.shape[1]
        if most < 2 or (self.is_ordered and self.N % TILE_N):
            most = 1
        whole, rest = divmod(count, most)
        return [most] * whole + [rest] * (rest > 0)

    def multiply_side_by_side(self, start: int, stop: int, x: Tensor) -> Tensor:
        """Return the products of experts ``start`` to ``stop`` (excluded) with the same tokens.

        Args:
            start: the first.
            stop: after the last.
            x: shape (M, K).

        Returns:
            Shape (M, stop - start, N).
        """
        products = []
        for count in self.launches(stop - start):
            part = slice(start, start + count)
            codes, scales, table = (tensor[part].flatten(0, 1) for tensor in self._tensors())
            rest = (self.spec, None, count * self.N if self.is_ordered else None)
            products.append(
                lut_gemm(x.contiguous(), codes, scales, table, *rest, self.ends_of(count))
            )
            start += count
        whole = torch.cat(products, 1) if len(products) > 1 else products[0]
        return whole.view(len(x), -1, self.N)

    def ends_of(self, count: int) -> tuple[int, ...]:
        """Return where ranges of rows end when ``count`` experts lie side by side."""
        if self.table.shape[1] == self.N or (count == 1 and not self.table_ends):
            return self.table_ends
        ends = self.table_ends or (self.N,)
        return tuple(e * self.N + end for e in range(count) for end in ends)

    def side_by_side(self, count: int, K: int) -> PackedWeight:
        """Return what stands for ``count`` experts side by side, for compiling; codes don't matter.

        Args:
            count: of experts.
            K: input features.
        """
        table = self.table[:count].flatten(0, 1)
        ends = self.ends_of(count)
        return PackedWeight(
            self.codes[0], self.scales[0], table, self.spec, count * self.N, K, ends
        )


class Block(NamedTuple):
    """The experts of a block.

    Args:
        gate_up: gate and up of each, side by side.
        down: of each.
        act: between them.
    """

    gate_up: ExpertStack
    down: ExpertStack
    act: Callable[[Tensor], Tensor]

    def expert(self, e: int, x: Tensor) -> Tensor:
        """Return what expert ``e`` makes of x, shape (M, H)."""
        gate, up = self.gate_up.multiply(e, x).chunk(2, dim=-1)
        return self.down.multiply(e, self.act(gate) * up)


def asked_for(block: Block, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Return the experts' weighted sum; asks the GPU which they are, so no graph can hold it.

    Args:
        block: the experts.
        x: shape (T, H).
        weights: shape (T, k), of each token's choices.
        ids: shape (T, k), indices into the block, -1 for none.

    Returns:
        Shape (T, H), dtype of ``x``.
    """
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e >= 0:
            tokens, slots = torch.where(ids == e)
            y = block.expert(e, x[tokens]) * weights[tokens, slots, None]
            out.index_add_(0, tokens, y.to(x.dtype))
    return out


def all_experts(block: Block, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Return the same as `asked_for`: every expert multiplies every token."""
    out = torch.zeros_like(x)
    for e in range(len(block.down.codes)):
        share = (weights * (ids == e)).sum(-1, keepdim=True)
        out += block.expert(e, x) * share.to(x.dtype)
    return out


def routed(block: Block, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Return the same as `asked_for`: the chosen experts are copied, and the copies multiply."""
    chosen = ids.clamp(min=0).flatten().long()
    gate_up, down = block.gate_up.take(chosen), block.down.take(chosen)
    # NOTE: a product reads its weight before the kernel in front of it has ended, so this kernel,
    # which waits for the copies, must stand between them and the first product.
    share = weights.masked_fill(ids < 0, 0).float()
    out, k = [], ids.shape[1]
    for t in range(len(x)):
        first = t * k
        both = gate_up.multiply_side_by_side(first, first + k, x[t : t + 1])[0]
        gate, up = both.chunk(2, dim=-1)
        hidden = block.act(gate) * up
        parts = [down.multiply(first + j, hidden[j : j + 1]) for j in range(k)]
        out.append((torch.cat(parts).float() * share[t, :, None]).sum(0))
    return torch.stack(out).to(x.dtype)


def captured(block: Block, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Return the same as `asked_for`, by the cheaper of the ways that a CUDA graph can hold."""
    is_few = len(x) > 0 and ids.numel() * COPY_COST <= len(block.down.codes)
    return (routed if is_few else all_experts)(block, x, weights, ids)
