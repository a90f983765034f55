"""Models: which linear layers are quantised, and the replacement of layers in memory.

Owns the choice of layers (`plan_model`), shared by everything that quantises: models in memory
(here), checkpoints on disk (`flute.checkpoint`) and quantise-on-load
(`flute.integrations.huggingface`).

    QuantizeOptions (what was asked for) + the model's modules -> CheckpointConfig (what is done)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from flute.block_walk import BlockWalk
from flute.blockwise import (
    head_config,
    joined,
    quantize_block,
    quantize_head,
    quantize_weight,
)
from flute.calibration import CalibrationError
from flute.dense import check_head, untie_head, why_dense
from flute.end_to_end import quantize_end_to_end
from flute.errors import FormatError, UnsupportedProblemError
from flute.experts import split_experts, takes_experts
from flute.format import SCALE_DTYPES, CheckpointConfig, QuantizedWeight, QuantSpec
from flute.groups import fit_groups, head_group
from flute.guidance import output_weights
from flute.head_inputs import head_hessian
from flute.linear import LutLinear
from flute.methods import BY_HESSIAN, CALIBRATED, check_table_scope, fits_table, resolve_table
from flute.reference import dequantize
from flute.rotation import rotate_model
from flute.tables import FAMILIES, TableLike
from flute.training import LearnOptions


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantise a model to.

    Args:
        num_bits: bits per weight: 2, 3 or 4.
        group_size: weights per scale: 32, 64, 128, 256, or -1 for the whole row.
        method: a name in `flute.methods.METHODS`; "mse" needs no data and is the default. "gptq"
            and "lnq" need calibration.
        table: table of the method, by name, list, tensor or file; None is the method's own. With N
            rows (one table per output row) it fits only layers of N outputs.
        scale_dtype: "float16", "bfloat16" or "float32"; None is the model's own 16-bit dtype, and
            bfloat16 for an fp32 model.
        skip: patterns of layer names to leave dense, such as "lm_head" or "*.layers.0.*".
        table_scope: "row" lets "lnq" learn a table for each row instead of one per matrix.
        learn: how "nfl" learns; None is the defaults of `LearnOptions`.
        bits_by_layer: full layer name -> bits, of layers that have others than ``num_bits``, such
            as `flute.mixed.choose_bits` returns.
        hadamard: rotate the model first (`flute.rotation`); it computes the same.
        guided: weight the Hessians of "gptq" and "lnq" by what each output error costs the whole
            model (`flute.guidance`). The dense model must fit into memory for that.
        head_bits: bits per weight of the output head, which stays dense if None. It takes
            ``method``, but "gptq" instead of "lnq" and "mse" instead of "nfl". One that is tied to
            the embedding gets a weight of its own; the embedding stays dense.
        head_group_size: weights per scale of the head; None is ``group_size``.

    Raises:
        FormatError: a value out of range, or a table that does not fit.
    """

    num_bits: int = 4
    group_size: int = 64
    method: str = "mse"
    table: TableLike | None = None
    scale_dtype: str | None = None
    skip: tuple[str, ...] = ()
    table_scope: str = "tensor"
    learn: LearnOptions | None = None
    bits_by_layer: Mapping[str, int] = field(default_factory=dict)
    hadamard: bool = False
    guided: bool = False
    head_bits: int | None = None
    head_group_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            raise FormatError(f"`skip` is {self.skip!r}; expected a list of patterns.")
        object.__setattr__(self, "skip", tuple(self.skip))
        CheckpointConfig(self.num_bits, self.group_size)
        if self.method != "nfl" and self.learn is not None:
            raise FormatError(
                f"`learn` (`--learn-from`, `--steps`, ...) is for method 'nfl'; `method` is "
                f"{self.method!r}."
            )
        if self.method == "nfl":
            object.__setattr__(self, "learn", self.learn or LearnOptions())
        resolve_table(self.basis, self.table, self.num_bits, self.group_size)
        check_table_scope(self.basis, self.table_scope)
        if self.guided and self.basis not in BY_HESSIAN:
            raise FormatError(
                f"`guided` weights Hessians, which {self.basis!r} has none of: use one of "
                f"{BY_HESSIAN}, or 'nfl' that starts from one."
            )
        self._check_head()
        several = self.bits_by_layer or self.head_bits not in (None, self.num_bits)
        if several and self.table is not None and self.table_name == "custom":
            raise FormatError(
                "A table of your own has entries for one number of bits; layers of several take a "
                f"family: one of {FAMILIES}."
            )
        if self.scale_dtype not in (None, *SCALE_DTYPES):
            raise FormatError(
                f"`scale_dtype` is {self.scale_dtype!r}; expected one of {tuple(SCALE_DTYPES)}, or "
                "None for the model's own."
            )

    def _check_head(self) -> None:
        if self.head_bits is None and self.head_group_size is not None:
            raise FormatError(
                f"`head_group_size` is {self.head_group_size}, but the output head stays dense: "
                "give `head_bits` (`--head-bits`) too."
            )
        if self.head_bits is not None:
            try:
                QuantSpec(self.head_bits, self.head_group)
            except FormatError as error:
                raise FormatError(f"Of the output head: {error}") from error

    def dtype_of_scales(self, weights: Iterable[torch.dtype]) -> str:
        """Return the scales' dtype: as asked, else float16 if all weights are, else bfloat16."""
        own = "float16" if set(weights) == {torch.float16} else "bfloat16"
        return self.scale_dtype or own

    @property
    def head_group(self) -> int:
        """The output head's weights per scale that were asked for."""
        return self.group_size if self.head_group_size is None else self.head_group_size

    @property
    def basis(self) -> str:
        """The method that chooses codes: of "nfl" the one it starts from."""
        return self.learn.start if self.learn is not None else self.method

    @property
    def table_name(self) -> str:
        """The table's family, or "custom"."""
        if self.learn is not None and self.learn.tables:
            return "custom"
        if self.basis in FAMILIES:
            return self.basis
        name = "custom" if fits_table(self.basis, self.table) else self.table
        family = name.removesuffix(str(self.num_bits)) if isinstance(name, str) else ""
        return family if family in FAMILIES else "custom"


@dataclass(frozen=True)
class ModelPlan:
    """Which layers of a model are quantised, and how.

    Args:
        config: goes into the checkpoint; names the linears left dense and the overrides.
        shapes: full name of each layer to quantise -> (N, K).
        dense: full name of each linear layer or expert tensor left dense -> why.
        head: full name of the output head if it is one of ``shapes``, else empty.
    """

    config: CheckpointConfig
    shapes: Mapping[str, tuple[int, int]]
    dense: Mapping[str, str] = field(default_factory=dict)
    head: str = ""

    @property
    def body(self) -> dict[str, tuple[int, int]]:
        """``shapes`` without the output head: the layers of decoder blocks."""
        return {name: shape for name, shape in self.shapes.items() if name != self.head}

    @property
    def head_has_hessian(self) -> bool:
        """Whether the output head is quantised against the Hessian of its inputs."""
        return bool(self.head) and self.config.method in BY_HESSIAN


def plan_model(model: nn.Module, options: QuantizeOptions, prefix: str = "") -> ModelPlan:
    """Choose the layers to quantise: every `nn.Linear` but output heads, routers and skipped names.

    The output head is one of them if ``options`` has bits for it. A layer whose K is no multiple of
    the group size takes the largest smaller group that divides it, with a warning.

    Args:
        model: a model, on any device ("meta" suffices).
        options: what the user asked for.
        prefix: put before each name, for a module that is part of a model.

    Raises:
        FormatError: a layer that no group fits; the message names every such layer.
        UnsupportedProblemError: nothing is left to quantise, or a head that cannot be quantised.
    """
    linears = {
        prefix + name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    dense = why_dense(model, prefix)
    head = prefix + check_head(model) if options.head_bits is not None else ""
    dense.pop(head, None)
    for pattern in options.skip:
        matched = [name for name in linears if matches(name, pattern)]
        if head in matched:
            raise FormatError(
                f"`skip` pattern {pattern!r} leaves the output head `{head}` dense, and "
                f"`head_bits` asks for {options.head_bits} bits. Drop one of them."
            )
        dense |= dict.fromkeys(matched, "skipped by pattern")
        if not matched:
            warnings.warn(f"`skip` pattern {pattern!r} matches no linear layer.", stacklevel=3)
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in linears.items()
        if name not in dense
    }
    if not set(shapes) - {head}:
        raise UnsupportedProblemError(
            f"{type(model).__name__} has no linear layer to quantise ({len(linears)} in all, "
            f"{len(dense)} left dense: {', '.join(sorted(set(dense.values()))) or 'none found'})."
        )
    config = CheckpointConfig(
        quantized_experts=takes_experts(model, shapes, prefix),
        num_bits=options.num_bits,
        group_size=options.group_size,
        method=options.method,
        table=options.table_name,
        table_scope=_table_scope(options, shapes),
        scale_dtype=options.dtype_of_scales(linears[name].weight.dtype for name in shapes),
        modules_to_not_convert=tuple(name for name in linears if name in dense),
        overrides=_overrides(shapes, options, head),
        quantized_head=head,
    )
    return ModelPlan(config, shapes, dense, head)


def matches(name: str, pattern: str) -> bool:
    """Tell whether a module name, or its last components, fit a pattern with wildcards."""
    return fnmatch(name, pattern) or fnmatch(name, "*." + pattern)


def _overrides(
    shapes: Mapping[str, tuple[int, int]], options: QuantizeOptions, head: str
) -> dict[str, dict[str, int]]:
    """Return the layers that differ from the model's bits or group size, and in what.

    Raises:
        FormatError: bits for a layer that is not quantised, or a layer that no group fits.
    """
    body = {name: shape for name, shape in shapes.items() if name != head}
    unknown = sorted(set(options.bits_by_layer) - set(body))
    if unknown:
        advice = " Its bits are `head_bits`." if unknown[0] == head else ""
        raise FormatError(f"`bits_by_layer` names `{unknown[0]}`, which is not quantised.{advice}")
    overrides = fit_groups(body, options.group_size)
    for name, bits in options.bits_by_layer.items():
        if bits != options.num_bits:
            overrides.setdefault(name, {})["num_bits"] = bits
    if head:
        assert options.head_bits is not None, "a head is planned where it has bits"
        group = head_group(head, shapes[head], options.head_group)
        asked = {"num_bits": options.head_bits, "group_size": group}
        common = {"num_bits": options.num_bits, "group_size": options.group_size}
        own = {key: value for key, value in asked.items() if value != common[key]}
        overrides |= {head: own} if own else {}
    return overrides


def _table_scope(options: QuantizeOptions, shapes: Mapping[str, tuple[int, int]]) -> str:
    rows = resolve_table(options.basis, options.table, options.num_bits).shape[0]
    if rows == 1:
        return options.table_scope
    misfits = [f"`{name}` (N={N})" for name, (N, _) in shapes.items() if rows != N]
    if misfits:
        raise FormatError(
            f"`table` has {rows} rows, one per output; {len(misfits)} layers have another number "
            f"of outputs: {', '.join(misfits[:8])}. Skip them, or give one table for all rows."
        )
    return "row"


def empty_lut_linear(linear: nn.Linear, name: str, config: CheckpointConfig) -> LutLinear:
    """Return an unfilled `LutLinear` on the meta device that takes the place of ``linear``."""
    return LutLinear(
        linear.in_features,
        linear.out_features,
        config.spec_of(name),
        bias=linear.bias is not None,
        table_per_row=config.table_scope == "row",
        scale_dtype=SCALE_DTYPES[config.scale_dtype],
        dtype=linear.weight.dtype if linear.bias is None else linear.bias.dtype,
        device="meta",
    )


def quantize_model(
    model: nn.Module,
    num_bits: int = 4,
    group_size: int = 64,
    *,
    calibration: Tensor | None = None,
    progress: Callable[[str, int], Any] | None = None,
    **options: Any,
) -> ModelPlan:
    """Quantise a model in memory: each chosen `nn.Linear` is replaced by a `LutLinear`.

    Layers are quantised one at a time, where they are, and the dense weight is freed at once. With
    "gptq" and "lnq" decoder block by decoder block, each seeing its inputs as the quantised blocks
    before it give them.

    Args:
        model: any module, on CPU or CUDA; changed in place.
        num_bits: bits per weight.
        group_size: weights per scale; -1 for the whole row.
        calibration: for "gptq" and "lnq": token ids of training text, int64, shape (samples,
            sequence), from `flute.calibration.sample_windows`.
        progress: called with (layer name, weights quantised) after each layer.
        **options: the other fields of `QuantizeOptions`.

    Returns:
        What was quantised and what was left dense.

    Raises:
        FormatError: as `plan_model` and `quantize_weight`; layers done so far stay quantised.
        CalibrationError: `calibration` is missing or does not fit the model, or the model gives
            NaN.
        UnsupportedProblemError: as `plan_model`, the model itself is an `nn.Linear`, a layer to be
            calibrated is in no decoder block, or a model that `hadamard` cannot rotate.
    """
    request = QuantizeOptions(num_bits, group_size, **options)
    check_calibration(request.method, calibration)
    if isinstance(model, nn.Linear):
        raise UnsupportedProblemError(
            "`model` is an nn.Linear, which cannot be replaced in place. Use "
            "`LutLinear.from_quantized(flute.quantize(linear.weight), linear.bias)`."
        )
    if request.hadamard:
        rotate_model(model)
    if request.method not in CALIBRATED:
        split_experts(model)
    plan = plan_model(model, request)
    for name, weight in _quantized_layers(model, plan, request, calibration):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} was planned as nn.Linear"
        layer = LutLinear.from_quantized(weight, linear.bias)
        layer.train(linear.training)
        model.set_submodule(name, layer)
        if progress:
            progress(name, linear.in_features * linear.out_features)
    if plan.head:
        untie_head(model, plan.head)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):  # for save_pretrained to record
        config.quantization_config = plan.config.to_dict()
    return plan


def check_calibration(method: str, calibration: object) -> None:
    """Check that a method which needs calibration has it, and that no other is given any.

    Raises:
        CalibrationError: it is not so.
    """
    if method in CALIBRATED and calibration is None:
        raise CalibrationError(
            f"method={method!r} needs calibration text: give `calibration` (`--calibration`)."
        )
    if method not in CALIBRATED and calibration is not None:
        raise CalibrationError(
            f"method={method!r} uses no calibration text: drop it, or use one of {CALIBRATED}."
        )


def _quantized_layers(
    model: nn.Module, plan: ModelPlan, options: QuantizeOptions, calibration: Tensor | None
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield each planned layer, quantised, in an order that the method can work in."""
    if calibration is None:
        for name in plan.shapes:
            dense = model.get_parameter(f"{name}.weight").data
            yield name, quantize_weight(dense, name, plan.config, options.table)
        return
    body = list(plan.body)
    if options.learn is not None and options.learn.end_to_end:
        learned = quantize_end_to_end(
            *(model, plan.config, body, options.table, options.learn, calibration),
            guided=options.guided,
        )
        yield from learned.items()
    else:
        yield from _calibrated_layers(model, plan, options, calibration)
    if plan.head and not plan.head_has_hessian:
        dense = model.get_parameter(f"{plan.head}.weight").data
        yield plan.head, quantize_weight(dense, plan.head, head_config(plan.config), options.table)


def _calibrated_layers(
    model: nn.Module, plan: ModelPlan, options: QuantizeOptions, calibration: Tensor
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield the layers of the decoder blocks, block by block, then a head that has a Hessian."""
    walk = BlockWalk(
        *(model, list(plan.body), calibration),
        keep_dense=options.learn is not None,
        token_weights=output_weights(model, plan.body, calibration) if options.guided else None,
        keep_outputs=plan.head_has_hessian,
    )
    for block in walk.blocks:
        weights = {name: model.get_parameter(f"{name}.weight").data for name in block.layers}
        quantized = quantize_block(walk, block, weights, plan.config, options.table, options.learn)
        for name, weight in quantized.items():
            weights[name].copy_(dequantize(weight, weights[name].dtype))
        walk.advance(block)
        yield from quantized.items()
    if plan.head_has_hessian:
        hessian = head_hessian(model, plan.head, walk, calibration)
        dense = model.get_parameter(f"{plan.head}.weight").data
        parts = quantize_head(
            lambda start, stop: dense[start:stop],
            plan.shapes[plan.head],
            *(plan.head, plan.config, options.table, hessian),
        )
        yield plan.head, joined(list(parts))
