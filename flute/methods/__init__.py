"""Quantisation methods: weight -> codes, scales, table. METHODS maps a name to a function.

Each has the signature ``quantize(weight, spec, table, scale_dtype) -> QuantizedWeight`` and works
row by row, so a matrix may be quantised in blocks of rows. Methods that need calibration are in
CALIBRATED; those in BY_HESSIAN take the Hessian of the layer's inputs after the weight, and the
whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flute.errors import FormatError
from flute.format import FLOAT_DTYPES, SCALE_DTYPES, QuantizedWeight, QuantSpec, check_table
from flute.methods import absmax, gptq, lnq, mse
from flute.methods.fit import fit_table, sample_rows
from flute.tables import DEFAULT_GROUP, FAMILIES, TableLike, get_table

Method = Callable[[Tensor, QuantSpec, Tensor, torch.dtype], QuantizedWeight]

METHODS: dict[str, Method] = {
    "mse": mse.quantize,
    "nf": absmax.quantize,
    "int": absmax.quantize,
    "fp": absmax.quantize,
    "bof": absmax.quantize,
    "bof-s": absmax.quantize_signed,
    "table": absmax.quantize,
}
"""Name -> method. "mse" searches the scales of any table, and fits one to the weight unless told
otherwise; "nf", "int", "fp", "bof" and "bof-s" are absmax rounding to that family, "table" to a
table of yours."""


BY_HESSIAN = ("gptq", "lnq")
"""Methods that need the Hessian of a layer's inputs: error feedback, and alternating exact updates.
Without a table of the user's they fit one to the weight."""
CALIBRATED = (*BY_HESSIAN, "nfl")
"""Methods that need calibration text. "nfl" learns scales with a whole decoder block at a time
(`flute.training`), so that there is no function of one matrix for it here."""

TABLE_SCOPES = ("tensor", "row")


def resolve_table(
    method: str, table: TableLike | None, num_bits: int, group_size: int = DEFAULT_GROUP
) -> Tensor:
    """Return the table a method uses when the user named ``table`` (None: the method's own).

    Of methods that fit a table to each weight it is where that starts.

    Args:
        method: a name in `METHODS` or `CALIBRATED`.
        table: what the user named.
        num_bits: 2, 3 or 4.
        group_size: weights per scale; the bof tables depend on it.

    Raises:
        FormatError: an unknown method, a table that contradicts it, or none for "table".
    """
    if method not in (*METHODS, *CALIBRATED):
        raise FormatError(f"`method` is {method!r}; expected one of {(*METHODS, *CALIBRATED)}.")
    if method in FAMILIES:
        if table is not None and not (
            isinstance(table, str) and table.removesuffix(str(num_bits)) == method
        ):
            raise FormatError(
                f"method={method!r} always uses the {method} table; drop `table`, or use "
                "method='table' (absmax) or 'mse' (searched scales) with it."
            )
        return get_table(method, num_bits, group_size)
    if table is None and method == "table":
        raise FormatError(
            "method='table' needs `table` (`--table`): a name, a list, a tensor or a file of "
            f"{1 << num_bits} numbers."
        )
    return get_table("bof-s" if table is None else table, num_bits, group_size)


def fits_table(method: str, table: TableLike | None) -> bool:
    """Tell whether a method fits a table to each weight when the user named ``table``."""
    return method == "lnq" or (table is None and method in ("mse", *CALIBRATED))


def table_for(method: str, rows: Tensor, spec: QuantSpec, table: TableLike | None) -> Tensor:
    """Return the table that a method without calibration uses for one weight.

    Args:
        method: a name in `METHODS`.
        rows: floating-point, shape (rows, K): of a large weight the `fit.sample_rows`.
        spec: bits and group size.
        table: what the user named; None is the method's own.

    Returns:
        fp32, shape (1 | N, 2**num_bits), on the device of ``rows``.
    """
    entries = resolve_table(method, table, spec.num_bits, spec.group_size).to(rows.device)
    is_finite = all(bool(torch.isfinite(end)) for end in rows.aminmax())  # else refused elsewhere
    if is_finite and fits_table(method, table):
        entries = fit_table(rows.detach().float(), spec, entries)
    return entries


def quantize(
    weight: Tensor,
    num_bits: int = 4,
    group_size: int = 64,
    *,
    method: str = "mse",
    table: TableLike | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    hessian: Tensor | None = None,
    table_scope: str = "tensor",
) -> QuantizedWeight:
    """Quantise one matrix.

    Chooses codes, scales and table so that
    ``weight[n, k] ~ table[codes[n, k]] * scales[n, k // group_size]``.

    Args:
        weight: fp16, bf16 or fp32, finite, shape (N, K); a CPU or CUDA tensor.
        num_bits: bits per weight: 2, 3 or 4.
        group_size: weights per scale: 32, 64, 128, 256, or -1 for the whole row. Smaller is more
            accurate and costs 16 / group_size bits per weight.
        method: "mse" (scales and a table of least squared error, the default) or "nf", "int", "fp",
            "bof", "bof-s", "table" (absmax scales, rounded to that table); with ``hessian`` "gptq"
            or "lnq".
        table: a name, list, tensor or file of ``2**num_bits`` numbers, or N rows of them; by
            default the method's own ("mse", "gptq" and "lnq" fit one). "lnq" only starts from it.
        scale_dtype: dtype of the stored scales: fp16, bf16 or fp32.
        hessian: for "gptq" and "lnq": sum of x x' over inputs of the layer, shape (K, K).
        table_scope: "tensor", or with "lnq" also "row": learn a table for each row.

    Returns:
        The quantised matrix, on the device of ``weight``.

    Raises:
        FormatError: a wrong dtype or shape, NaN or Inf, K not a multiple of the group, a bad table,
            a Hessian that the method needs and is not given, or cannot use.
    """
    spec = QuantSpec(num_bits, group_size)
    check_table_scope(method, table_scope)
    check_weight(weight, "weight")
    spec.group_length(weight.shape[1])
    entries = resolve_table(method, table, num_bits, group_size).to(weight.device)
    check_table(entries, weight.shape[0], spec)
    if scale_dtype not in SCALE_DTYPES.values():
        raise FormatError(f"`scale_dtype` is {scale_dtype}; expected float16, bfloat16 or float32.")
    dense = weight.detach().float().contiguous()
    if method not in BY_HESSIAN:
        if method in CALIBRATED:
            raise FormatError(
                f"method={method!r} learns on text, with whole blocks of a model: use "
                "`flute.quantize_model(model, ..., calibration=windows)`."
            )
        if hessian is not None:
            raise FormatError(
                f"method={method!r} uses no `hessian`: drop it, or use one of {BY_HESSIAN}."
            )
        if fits_table(method, table):
            entries = table_for(method, dense[sample_rows(*dense.shape)], spec, table)
        return METHODS[method](dense, spec, entries, scale_dtype)
    if hessian is None:
        raise FormatError(
            f"method={method!r} needs `hessian`: the sum of x x' over inputs, (K, K)."
        )
    given = None if table is None else entries
    per_row = table_scope == "row"
    return quantize_calibrated(
        dense, hessian.to(dense.device), spec, given, scale_dtype, method=method, per_row=per_row
    )


def quantize_calibrated(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    table: Tensor | None,
    scale_dtype: torch.dtype,
    *,
    method: str,
    per_row: bool = False,
    name: str = "the layer",
) -> QuantizedWeight:
    """Quantise one matrix by a method in BY_HESSIAN.

    Args:
        weight: fp32, finite, shape (N, K).
        hessian: sum of x x' over inputs of the layer, shape (K, K), on the same device.
        spec: bits and group size; K is a multiple of the group.
        table: fp32, shape (1 | N, 2**num_bits); None fits one.
        scale_dtype: dtype of the scales.
        method: "gptq" or "lnq".
        per_row: "lnq" learns a table for each row.
        name: of the layer, for warnings.

    Raises:
        FormatError: a Hessian of another shape, with NaN or Inf, or that cannot be factored.
    """
    if method == "lnq":
        return lnq.quantize(weight, hessian, spec, table, scale_dtype, per_row=per_row, name=name)
    return gptq.quantize(weight, hessian, spec, table, scale_dtype, name=name)


def check_table_scope(method: str, table_scope: str) -> None:
    """Check that a method can learn tables of this scope.

    Raises:
        FormatError: an unknown scope, or tables per row by a method other than "lnq".
    """
    if table_scope not in TABLE_SCOPES:
        raise FormatError(f"`table_scope` is {table_scope!r}; expected one of {TABLE_SCOPES}.")
    if table_scope == "row" and method != "lnq":
        raise FormatError(
            f"`table_scope` is 'row'; only 'lnq' learns a table per row (or 'nfl' that starts from "
            f"it), and `method` is {method!r}. Other methods take such tables as `table`."
        )


def check_weight(weight: Tensor, name: str, first_row: int = 0) -> None:
    """Check that a dense weight can be quantised.

    Args:
        weight: shape (N, K), or some of its rows.
        name: of the weight, for messages.
        first_row: where those rows begin.

    Raises:
        FormatError: not a floating-point matrix, empty, or NaN or Inf in it; the message names it.
    """
    if weight.ndim != 2 or not weight.numel():
        raise FormatError(f"`{name}` has shape {tuple(weight.shape)}; expected (N, K), not empty.")
    if weight.dtype not in FLOAT_DTYPES:
        raise FormatError(f"`{name}` is {weight.dtype}; expected float16, bfloat16 or float32.")
    check_finite(weight, name, first_row)


def check_finite(tensor: Tensor, name: str, first_row: int = 0) -> None:
    """Check a tensor for NaN and Inf.

    Args:
        tensor: of any shape and float dtype; it may be some of a larger one's rows.
        name: of the tensor, for messages.
        first_row: where those rows begin.

    Raises:
        FormatError: it holds some; the message counts them and gives the first position.
    """
    if not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax()):
        return  # the extremes of a tensor with a NaN are NaN
    finite = torch.isfinite(tensor)
    first = tuple(int(i) for i in (~finite).nonzero()[0])
    position = (first[0] + first_row, *first[1:]) if first else ()
    raise FormatError(
        f"`{name}` holds NaN or Inf ({int((~finite).sum())} found), the first "
        f"({tensor[first].item()}) at {position}. Such a weight cannot be quantised: repair the "
        "checkpoint."
    )
