"""The format: what a quantised weight is, in memory and on disk.

Owns `QuantSpec`, `QuantizedWeight`, `CheckpointConfig` and the names of the tensors on disk. Knows
nothing of how codes are found, packed, multiplied or stored in files.

    weight[n, k] = table[codes[n, k]] * scales[n, k // group_size]

                 in memory                          on disk, per linear layer (format version 1)
    codes        uint8 (N, K), < 2**num_bits        <layer>.codes   int32 (N, ceil(K num_bits / 32))
    scales       fp16 | bf16 | fp32 (N, K / group)  <layer>.scales  the same
    table        fp32 (1 | N, 2**num_bits)          <layer>.table   the same
                                                    <layer>.bias    as in the dense model

In memory only, a matrix may have R tables for R ranges of rows (fused q/k/v): ``table`` is then
(R, 2**num_bits) and ``table_ends`` says where each range ends, the last at N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flute.errors import FormatError

FORMAT_VERSION = 1
NUM_BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128, 256)
WHOLE_ROW = -1
"""`group_size` that stands for one scale per row, whatever the row's length."""
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FLOAT_DTYPES = tuple(SCALE_DTYPES.values())
"""dtypes of dense weights, activations and scales."""
TENSOR_NAMES = ("codes", "scales", "table")


@dataclass(frozen=True)
class QuantSpec:
    """Bits per weight and weights per scale.

    Args:
        num_bits: bits per code: 2, 3 or 4.
        group_size: consecutive weights along K that share a scale: 32, 64, 128, 256, or -1 for the
            whole row.

    Raises:
        FormatError: either number is not one of those.
    """

    num_bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.num_bits, int) or self.num_bits not in NUM_BITS:
            raise FormatError(f"`num_bits` is {self.num_bits!r}; expected one of {NUM_BITS}.")
        allowed = (*GROUP_SIZES, WHOLE_ROW)
        if not isinstance(self.group_size, int) or self.group_size not in allowed:
            raise FormatError(
                f"`group_size` is {self.group_size!r}; expected one of {GROUP_SIZES}, "
                f"or {WHOLE_ROW} for the whole row."
            )

    @property
    def num_entries(self) -> int:
        """Entries of a table: ``2**num_bits``."""
        return 1 << self.num_bits

    def group_length(self, K: int) -> int:
        """Return the weights per scale of a row of ``K`` weights.

        Raises:
            FormatError: ``K`` is not a multiple of the group size.
        """
        if self.group_size == WHOLE_ROW:
            return K
        if K % self.group_size:
            raise FormatError(
                f"K={K} is not a multiple of group_size={self.group_size}. Choose a group size "
                f"that divides it, or {WHOLE_ROW} for one scale per row."
            )
        return self.group_size

    def num_groups(self, K: int) -> int:
        """Return the scales per row of ``K`` weights."""
        return K // self.group_length(K) if K else 0

    def num_words(self, K: int) -> int:
        """Return the 32-bit words that a row of ``K`` codes takes on disk."""
        return -(-K * self.num_bits // 32)


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantised matrix, unpacked: the result of quantisation and the source of everything else.

    Args:
        codes: uint8, shape (N, K), each below ``2**num_bits``.
        scales: fp16, bf16 or fp32, finite, shape (N, K / group length); a scale may be negative.
        table: fp32, finite, shape (1, 2**num_bits) for the matrix, (N, 2**num_bits) per row, or
            (R, 2**num_bits) for R ranges of rows.
        spec: bits and group size.
        table_ends: where each of R ranges of rows ends, ascending, the last N; else empty.

    Raises:
        FormatError: a dtype, shape, device or value breaks one of these rules.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    spec: QuantSpec
    table_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        codes, spec = self.codes, self.spec
        check_codes(codes, spec.num_bits)
        N, K = codes.shape
        check_scales(self.scales, N, K, spec)
        check_table(self.table, N, spec, self.table_ends)
        devices = {t.device for t in (codes, self.scales, self.table)}
        if len(devices) > 1:
            raise FormatError(f"`codes`, `scales` and `table` are on {sorted(map(str, devices))}.")
        for name, tensor in (("scales", self.scales), ("table", self.table)):
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"`{name}` holds NaN or Inf; expected finite numbers.")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output features, input features."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight on disk: packed codes, scales and table."""
        N, K = self.shape
        return (
            4 * N * self.spec.num_words(K)
            + self.scales.numel() * self.scales.element_size()
            + self.table.numel() * 4
        )


class PackedWeight(NamedTuple):
    """A quantised matrix as products read it: packed codes, and what turns them into weights.

    Args:
        packed: int32, shape (N, ceil(K * num_bits / 32)), or codes in kernel order.
        scales: shape (N, K / group length), or in kernel order as ``packed`` is.
        table: fp32, shape (1 | N | R, 2**num_bits).
        spec: bits and group size.
        N: output features.
        K: input features.
        table_ends: where each of R ranges of rows ends; else empty.
    """

    packed: Tensor
    scales: Tensor
    table: Tensor
    spec: QuantSpec
    N: int
    K: int
    table_ends: tuple[int, ...] = ()

    @property
    def has_row_tables(self) -> bool:
        """Whether each row has a table of its own."""
        return not self.table_ends and self.table.shape[0] > 1


def check_codes(codes: Tensor, num_bits: int) -> None:
    """Check dtype, shape and range of unpacked codes.

    Raises:
        FormatError: not uint8 (N, K), or a code that ``num_bits`` cannot hold.
    """
    spec = QuantSpec(num_bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise FormatError(
            f"`codes` is {codes.dtype} of shape {tuple(codes.shape)}; expected torch.uint8 (N, K)."
        )
    if codes.numel() and int(codes.max()) >= spec.num_entries:
        raise FormatError(
            f"`codes` holds {int(codes.max())}; expected values below {spec.num_entries} "
            f"for num_bits={num_bits}."
        )


def check_scales(scales: Tensor, N: int, K: int, spec: QuantSpec) -> None:
    """Check dtype and shape of the scales of a weight.

    Args:
        scales: of any dtype and shape.
        N: rows of the weight.
        K: weights per row.
        spec: bits and group size.

    Raises:
        FormatError: they disagree with ``spec``; the message carries both shapes.
    """
    expected = (N, spec.num_groups(K))
    if tuple(scales.shape) != expected:
        raise FormatError(
            f"`scales` has shape {tuple(scales.shape)}; expected (N, K / group) = {expected} "
            f"for N={N}, K={K}, group_size={spec.group_size}."
        )
    if scales.dtype not in FLOAT_DTYPES:
        raise FormatError(f"`scales` is {scales.dtype}; expected float16, bfloat16 or float32.")


def check_table(table: Tensor, N: int, spec: QuantSpec, table_ends: Sequence[int] = ()) -> None:
    """Check dtype and shape of the table of a weight, and the ranges of rows that use its rows.

    Args:
        table: of any dtype and shape.
        N: rows of the weight.
        spec: bits and group size.
        table_ends: where each range of rows ends; empty if there is one table, or one per row.

    Raises:
        FormatError: the table has the wrong number of entries or rows, or the ends do not ascend
            to N.
    """
    expected = f"(1, {spec.num_entries}) or ({N}, {spec.num_entries})"
    rows: tuple[int, ...] = (1, N)
    if table_ends:
        starts = (0, *table_ends[:-1])
        ascend = all(start < end for start, end in zip(starts, table_ends, strict=True))
        if not ascend or table_ends[-1] != N:
            raise FormatError(
                f"`table_ends` is {tuple(table_ends)}; expected ascending rows, the last N={N}."
            )
        rows = (len(table_ends),)
        expected = f"({rows[0]}, {spec.num_entries}), a row for each of `table_ends`,"
    if table.ndim != 2 or table.shape[1] != spec.num_entries or table.shape[0] not in rows:
        raise FormatError(
            f"`table` has shape {tuple(table.shape)}; expected {expected} for "
            f"num_bits={spec.num_bits}, N={N}."
        )
    if table.dtype != torch.float32:
        raise FormatError(f"`table` is {table.dtype}; expected torch.float32.")


def table_per_row(table: Tensor, table_ends: Sequence[int]) -> Tensor:
    """Return the table of each row, shape (N, 2**num_bits), of a table per range of rows.

    Args:
        table: shape (R, 2**num_bits).
        table_ends: where each of the R ranges ends.
    """
    starts = (0, *table_ends[:-1])
    counts = [end - start for start, end in zip(starts, table_ends, strict=True)]
    parts = [row.expand(count, -1) for row, count in zip(table, counts, strict=True)]
    return torch.cat(parts)


@dataclass(frozen=True)
class CheckpointConfig:
    """What ``quantization_config`` in a checkpoint's config.json says; all loaders read this.

    Args:
        num_bits: bits per weight, unless overridden.
        group_size: weights per scale, unless overridden; -1 is the whole row.
        method: name of the method that chose codes and scales (for people; loaders don't need it).
        table: name of the table, or "custom" (for people; the numbers are stored per layer).
        table_scope: "tensor" for one table per matrix, "row" for one per output row.
        scale_dtype: "float16", "bfloat16" or "float32".
        modules_to_not_convert: full names of linear layers left dense.
        overrides: full module name -> {"num_bits": ..., "group_size": ...} where it differs.
        quantized_experts: whether MoE experts are quantised, a matrix per expert and projection.
        quantized_head: full name of the output head if that is quantised, else empty; an embedding
            that it was tied to is dense, and the model's config does not tie them any more.
        format_version: version of the tensors' layout on disk.

    Raises:
        FormatError: a value is not allowed, or the format is newer than this package.
    """

    num_bits: int = 4
    group_size: int = 64
    method: str = "mse"
    table: str = "nf"
    table_scope: str = "tensor"
    scale_dtype: str = "bfloat16"
    modules_to_not_convert: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    quantized_experts: bool = False
    quantized_head: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version not in range(1, FORMAT_VERSION + 1) or self.format_version is True:
            raise FormatError(
                f"The checkpoint has format version {self.format_version!r}; this package reads up "
                f"to {FORMAT_VERSION}. Upgrade flute, or quantise the model again."
            )
        if self.table_scope not in ("tensor", "row"):
            raise FormatError(f"`table_scope` is {self.table_scope!r}; expected 'tensor' or 'row'.")
        if self.scale_dtype not in SCALE_DTYPES:
            raise FormatError(
                f"`scale_dtype` is {self.scale_dtype!r}; expected one of {tuple(SCALE_DTYPES)}."
            )
        names = self.modules_to_not_convert
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"`modules_to_not_convert` is {names!r}; expected a list of names.")
        object.__setattr__(self, "modules_to_not_convert", tuple(names))
        if not isinstance(self.quantized_head, str) or self.quantized_head in names:
            raise FormatError(
                f"`quantized_head` is {self.quantized_head!r}; expected the name of the output "
                "head, which `modules_to_not_convert` must not have."
            )
        if not isinstance(self.overrides, Mapping):
            raise FormatError(f"`overrides` is {self.overrides!r}; expected an object.")
        QuantSpec(self.num_bits, self.group_size)
        for name in self.overrides:
            self.spec_of(name)

    def spec_of(self, module_name: str) -> QuantSpec:
        """Return the spec of a module, its override applied.

        Raises:
            FormatError: the override is no object, has unknown keys, or says no spec.
        """
        override = self.overrides.get(module_name, {})
        if not isinstance(override, Mapping):
            raise FormatError(
                f"The override of `{module_name}` is {override!r}; expected an object with "
                "`num_bits`, `group_size`, or both."
            )
        unknown = set(override) - {"num_bits", "group_size"}
        if unknown:
            raise FormatError(
                f"The override of `{module_name}` has unknown keys {sorted(unknown)}."
            )
        return QuantSpec(
            override.get("num_bits", self.num_bits), override.get("group_size", self.group_size)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object stored under ``quantization_config``."""
        config = {**asdict(self), "quant_method": "flute"}
        config["modules_to_not_convert"] = list(self.modules_to_not_convert)
        for key in ("quantized_experts", "quantized_head"):
            if not config[key]:
                del config[key]
        config["overrides"] = {name: dict(spec) for name, spec in self.overrides.items()}
        return config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CheckpointConfig:
        """Read the JSON object stored under ``quantization_config``.

        Raises:
            FormatError: another quantisation method, a newer format, or a value out of range.
        """
        if config.get("quant_method") != "flute":
            raise FormatError(
                f"`quant_method` is {config.get('quant_method')!r}; expected 'flute'. "
                "`flute convert` reads other formats."
            )
        if "format_version" not in config:
            raise FormatError("`quantization_config` has no `format_version`; expected 1.")
        known = {f.name for f in fields(cls)}
        optional = ("modules_to_not_convert", "overrides")  # null stands for nothing
        return cls(
            **{
                key: value
                for key, value in config.items()
                if key in known and not (value is None and key in optional)
            }
        )
