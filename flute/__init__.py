"""FLUTE: a lookup-table engine for quantised language models.

    weight[n, k] = table[codes[n, k]] * scales[n, k // group_size]

Importing this package prints nothing and touches no GPU. If transformers is installed,
``AutoModelForCausalLM.from_pretrained`` loads FLUTE checkpoints from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flute.errors import (
    CheckpointError,
    ChecksumError,
    FluteError,
    FormatError,
    UnsupportedProblemError,
)
from flute.format import QuantizedWeight, QuantSpec
from flute.integrations import autoload as _autoload
from flute.linear import LutLinear
from flute.methods import quantize
from flute.model import quantize_model
from flute.ops import lut_gemm
from flute.pack import pack_codes, unpack_codes
from flute.prepare import prepare
from flute.reference import dequantize
from flute.tables import get_table
from flute.version import __version__ as __version__

if TYPE_CHECKING:
    from flute.integrations.huggingface import FluteConfig, from_pretrained

__all__ = [
    "CheckpointError",
    "ChecksumError",
    "FluteConfig",
    "FluteError",
    "FormatError",
    "LutLinear",
    "QuantSpec",
    "QuantizedWeight",
    "UnsupportedProblemError",
    "dequantize",
    "from_pretrained",
    "get_table",
    "lut_gemm",
    "pack_codes",
    "prepare",
    "quantize",
    "quantize_model",
    "unpack_codes",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    if name in ("FluteConfig", "from_pretrained"):
        from flute.integrations import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module 'flute' has no attribute {name!r}")


_autoload.install()
