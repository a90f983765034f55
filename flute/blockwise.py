"""The layers of a model, quantised as a plan says: one by itself, or a decoder block of them.

    quantize_weight    a weight -> codes, scales, table                       methods without data
    quantize_block     a block that a `BlockWalk` is at -> the same of each layer      with data

Models in memory, checkpoints on disk and quantise-on-load all come here, so that they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from flute.block_walk import Block, BlockWalk, explain_out_of_memory
from flute.errors import FormatError
from flute.format import SCALE_DTYPES, CheckpointConfig, QuantizedWeight
from flute.methods import (
    BY_HESSIAN,
    CALIBRATED,
    METHODS,
    check_weight,
    gptq,
    quantize_calibrated,
    resolve_table,
    table_for,
)
from flute.methods.fit import sample_rows
from flute.tables import TableLike
from flute.training import LearnOptions, learn_block

_MAX_WEIGHTS = 1 << 27
"""Weights of a matrix that are quantised at a time, in blocks of rows: an output head has 4 times
as many, and the search for scales takes several copies of a block in fp32."""
_HEAD_WEIGHTS = 1 << 25
"""Weights of a head that error feedback sees at a time: the fewer, the more often it factors."""


def quantize_weight(
    weight: Tensor,
    name: str,
    config: CheckpointConfig,
    table: TableLike | None,
    *,
    first_row: int = 0,
) -> QuantizedWeight:
    """Quantise the weight of the layer ``name`` as its plan says, on the weight's device.

    Args:
        weight: fp16, bf16 or fp32, shape (N, K).
        name: full module name; messages carry it, overrides are looked up by it.
        config: from `plan_model`.
        table: as in `QuantizeOptions`; None fits one to these rows if the method does so.
        first_row: where these rows start in the whole weight, for messages.

    Raises:
        FormatError: NaN or Inf, or a dtype that cannot be quantised; the message names the tensor.
    """
    if config.method in CALIBRATED:
        raise FormatError(
            f"method={config.method!r} needs calibration text: use `flute quantize --calibration`, "
            "or `flute.quantize_model(model, ..., calibration=windows)`."
        )
    check_weight(weight, f"{name}.weight", first_row)
    spec, dense = config.spec_of(name), weight.detach()
    entries = table_for(config.method, dense[sample_rows(*dense.shape)].float(), spec, table)
    step = max(1, _MAX_WEIGHTS // dense.shape[1])
    parts = []
    for start in range(0, len(dense), step):
        rows = slice(start, start + step)
        own = entries[rows] if len(entries) > 1 else entries
        block = dense[rows].float().contiguous()
        try:
            part = METHODS[config.method](block, spec, own, SCALE_DTYPES[config.scale_dtype])
        except FormatError as error:
            raise FormatError(f"`{name}.weight`: {error}") from error
        parts.append(part)
    done = joined(parts)
    return _per_row(done) if config.table_scope == "row" else done


def _per_row(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a matrix with a table for each row, whether it had one or a table for all."""
    N = weight.shape[0]
    return weight if len(weight.table) == N else replace(weight, table=weight.table.repeat(N, 1))


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return the parts of one matrix, one below the other; they have one table, or one per row."""
    if len(parts) == 1:
        return parts[0]
    codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    table = parts[0].table
    if len(table) > 1:
        table = torch.cat([p.table for p in parts])
    return QuantizedWeight(codes, scales, table, parts[0].spec)


def head_config(config: CheckpointConfig) -> CheckpointConfig:
    """Return a config with the method that an output head takes, which is in no decoder block.

    "gptq" where the method needs Hessians, "mse" for "nfl", which learns a block at a time.
    """
    if config.method in BY_HESSIAN:
        return replace(config, method="gptq")
    return replace(config, method="mse") if config.method in CALIBRATED else config


def quantize_head(
    read: Callable[[int, int], Tensor],
    shape: tuple[int, int],
    name: str,
    config: CheckpointConfig,
    table: TableLike | None,
    hessian: Tensor,
) -> Iterator[QuantizedWeight]:
    """Quantise an output head by "gptq", in blocks of rows, which depend on the table only.

    Args:
        read: returns rows from the first to the second number (excluded), on any device.
        shape: (N, K).
        name: full name, for messages.
        config: from `plan_model`.
        table: as in `QuantizeOptions`; None fits one to rows at even distances.
        hessian: sum of x x' over what enters the head, fp32, shape (K, K), where it is quantised.

    Raises:
        FormatError: NaN or Inf, or a Hessian that cannot be used; the message names the head.
        CalibrationError: out of memory.
    """
    (N, K), spec, device = shape, config.spec_of(name), hessian.device
    picked = sample_rows(N, K)
    spans = [(0, N)] if len(picked) == N else [(row, row + 1) for row in picked]
    if table is None:
        sample = torch.cat([read(*span) for span in spans]).to(device).float()
        check_weight(sample, f"{name}.weight")
        entries = gptq.table_of_rows(sample, hessian, spec)
    else:
        entries = resolve_table("gptq", table, spec.num_bits, spec.group_size).to(device)
    step = max(1, _HEAD_WEIGHTS // K)
    for start in range(0, N, step):
        stop = min(start + step, N)
        rows = read(start, stop).detach().to(device)
        check_weight(rows, f"{name}.weight", start)
        own = entries[start:stop] if len(entries) > 1 else entries
        advice = "Leave the head dense (no `--head-bits`), or use `--method mse`."
        try:
            with explain_out_of_memory(f"quantising `{name}` on {device}", advice):
                done = gptq.quantize(
                    *(rows.float().contiguous(), hessian, spec, own),
                    SCALE_DTYPES[config.scale_dtype],
                    name=f"`{name}`",
                )
        except FormatError as error:
            raise FormatError(f"`{name}`: {error}") from error
        yield _per_row(done) if config.table_scope == "row" else done


def quantize_block(
    walk: BlockWalk,
    block: Block,
    weights: Mapping[str, Tensor],
    config: CheckpointConfig,
    table: TableLike | None,
    learn: LearnOptions | None = None,
) -> dict[str, QuantizedWeight]:
    """Quantise the layers of the decoder block that a walk is at; it still has dense weights.

    Args:
        walk: keeps the dense stream if ``learn`` is given.
        block: the block.
        weights: layer name -> weight, shape (N, K), on the walk's device.
        config: from `plan_model`.
        table: as in `QuantizeOptions`.
        learn: how method "nfl" learns.

    Raises:
        FormatError: NaN or Inf, or a Hessian that cannot be used; the message names the layer.
        CalibrationError: NaN or Inf in the inputs of a layer, or out of memory.
    """
    if learn is None:
        return quantize_by_hessian(weights, walk.hessians(block), config, table)
    walk.advance_dense(block)
    basis = replace(config, method=learn.start)
    if learn.start in BY_HESSIAN:
        start = quantize_by_hessian(weights, walk.hessians(block), basis, table)
    else:
        start = {
            name: quantize_weight(weight, name, basis, table) for name, weight in weights.items()
        }
    return learn_block(walk, block, weights, start, learn)


def quantize_by_hessian(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    config: CheckpointConfig,
    table: TableLike | None,
) -> dict[str, QuantizedWeight]:
    """Quantise the layers of a decoder block against their Hessians.

    On the CPU a layer per thread, each thread running torch on one core: the steps are small, and
    torch's own threads would wait for each other in each of them.

    Args:
        weights: layer name -> weight, shape (N, K).
        hessians: layer name -> sum of x x' over its inputs, shape (K, K), on the weight's device.
        config: from `plan_model`.
        table: as in `QuantizeOptions`.

    Raises:
        FormatError: NaN or Inf, or a Hessian that cannot be used; the message names the layer.
    """

    def one(name: str) -> QuantizedWeight:
        weight, spec = weights[name], config.spec_of(name)
        check_weight(weight, f"{name}.weight")
        given = None
        if table is not None:
            given = resolve_table(config.method, table, spec.num_bits, spec.group_size)
        fewer = "Leave the layer dense (`--skip`), or use `--method mse`"
        advice = f"{fewer}." if weight.device.type == "cpu" else f"{fewer}, or `--device cpu`."
        try:
            with explain_out_of_memory(f"quantising `{name}` on {weight.device}", advice):
                return quantize_calibrated(
                    weight.detach().float().contiguous(),
                    hessians[name],
                    spec,
                    None if given is None else given.to(weight.device),
                    SCALE_DTYPES[config.scale_dtype],
                    method=config.method,
                    per_row=config.table_scope == "row",
                    name=f"`{name}`",
                )
        except FormatError as error:
            raise FormatError(f"`{name}`: {error}") from error

    names = sorted(weights, key=lambda name: -weights[name].numel())
    num_threads = torch.get_num_threads()
    if num_threads == 1 or any(weight.device.type != "cpu" for weight in weights.values()):
        return {name: one(name) for name in names}
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
