"""`FluteConfig`: what users pass as ``quantization_config``, and what config.json holds as that.

One class has both roles, as transformers will have it:

    request     FluteConfig(...), or the same as a dict   -> options     (a dense model: to be done)
    checkpoint  a dict with a `format_version`            -> checkpoint  (as written with the model)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from flute.errors import FormatError
from flute.format import CheckpointConfig
from flute.methods import CALIBRATED
from flute.model import QuantizeOptions
from flute.tables import TableLike, get_table

_REQUEST_KEYS = (
    "num_bits",
    "group_size",
    "method",
    "table",
    "scale_dtype",
    "modules_to_not_convert",
    "head_bits",
    "head_group_size",
)


class FluteConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to quantise a model to while it loads, or what a loaded checkpoint is quantised to.

    Pass it as ``from_pretrained(dense, quantization_config=FluteConfig(...))``. Once a model is
    loaded, ``model.config.quantization_config`` is another `FluteConfig` that describes that model.

    Args:
        num_bits: bits per weight: 2, 3 or 4.
        group_size: weights per scale: 32, 64, 128, 256, or -1 for the whole row.
        method: a name in `flute.methods.METHODS`.
        table: table of the method, by name, list, tensor or file; None is the method's own.
        scale_dtype: "float16", "bfloat16" or "float32"; None is the model's own 16-bit dtype.
        modules_to_not_convert: patterns of layer names to leave dense, such as "lm_head" or
            "*.layers.0.*"; MoE routers stay dense in any case.
        head_bits: bits per weight of the output head, which stays dense if None. One that is tied
            to the embedding gets a weight of its own; the embedding stays dense.
        head_group_size: weights per scale of the head; None is ``group_size``.

    Attributes:
        options: the request; None for a config read from a quantised checkpoint.
        checkpoint: what the model is quantised to; None until a model has been planned.

    Raises:
        FormatError: a value out of range, or a table that does not fit.
    """

    def __init__(
        self,
        num_bits: int = 4,
        group_size: int = 64,
        method: str = "mse",
        table: TableLike | None = None,
        scale_dtype: str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        head_bits: int | None = None,
        head_group_size: int | None = None,
    ) -> None:
        if isinstance(modules_to_not_convert, str):
            raise FormatError(
                f"`modules_to_not_convert` is {modules_to_not_convert!r}; expected a list of "
                f"patterns: [{modules_to_not_convert!r}]."
            )
        if method in CALIBRATED:
            raise FormatError(
                f"method={method!r} needs calibration text, which a model that is being loaded has "
                "not: use `flute quantize --calibration`, or `flute.quantize_model` afterwards."
            )
        self.quant_method = "flute"
        options = QuantizeOptions(
            *(num_bits, group_size, method, table, scale_dtype),
            tuple(modules_to_not_convert or ()),
            head_bits=head_bits,
            head_group_size=head_group_size,
        )
        if options.table_name == "custom" and table is not None:
            options = replace(options, table=get_table(table, num_bits, group_size))
        self.options: QuantizeOptions | None = options
        self.checkpoint: CheckpointConfig | None = None

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read ``quantization_config``: of a quantised checkpoint, or a request written as a dict.

        Raises:
            FormatError: unknown keys, a newer format version, or a value out of range.
        """
        if "format_version" in config_dict:
            config = cls()
            config.options, config.checkpoint = None, CheckpointConfig.from_dict(config_dict)
        else:
            request = {key: value for key, value in config_dict.items() if key != "quant_method"}
            unknown = sorted(set(request) - set(_REQUEST_KEYS))
            if unknown:
                raise FormatError(
                    "`quantization_config` has no `format_version`, as that of a quantised "
                    f"checkpoint has, and the keys {unknown}; to quantise a dense model, expected "
                    f"{_REQUEST_KEYS}."
                )
            config = cls(**request)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for config.json; until a model is planned, the request."""
        if self.checkpoint is not None:
            return self.checkpoint.to_dict()
        options = self.options
        assert options is not None, "a FluteConfig has options or a checkpoint"
        table = options.table
        return {
            "quant_method": self.quant_method,
            "num_bits": options.num_bits,
            "group_size": options.group_size,
            "method": options.method,
            "table": table.tolist() if isinstance(table, Tensor) else table,
            "scale_dtype": options.scale_dtype,
            "modules_to_not_convert": list(options.skip),
            "head_bits": options.head_bits,
            "head_group_size": options.head_group_size,
        }
