"""Weights for vLLM's layers: made, loaded as vLLM does it, and compared with what was given."""

from __future__ import annotations

import torch

from flute.format import CheckpointConfig, PackedWeight
from flute.ops import lut_gemm
from flute.pack import pack_codes
from flute.reference import dequantize_packed


def quantization(spec, **changes):
    from flute.integrations.vllm_config import FluteQuantizationConfig

    config = CheckpointConfig(spec.num_bits, spec.group_size, **changes)
    made = FluteQuantizationConfig.from_config(config.to_dict())
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return made


def packed(weight):
    codes = pack_codes(weight.codes, weight.spec.num_bits)
    return PackedWeight(codes, weight.scales, weight.table, weight.spec, *weight.shape)


def rows_of(weight, rows):
    per_row = weight.has_row_tables
    return weight._replace(
        packed=weight.packed[rows],
        scales=weight.scales[rows],
        table=weight.table[rows] if per_row else weight.table,
        N=len(range(*rows.indices(weight.N))),
    )


def fill(layer, weights, ids):
    for weight, i in zip(weights, ids, strict=True):
        for name, tensor in (
            ("codes", weight.packed),
            ("scales", weight.scales),
            ("table", weight.table),
        ):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *([] if i is None else [i]))
    layer.quant_method.process_weights_after_loading(layer)


def check(layer, expected, K):
    """The layer holds the weight bit for bit, and multiplies by it."""
    method = layer.quant_method
    loaded = (layer.codes.data, layer.scales.data, layer.table.data)
    assert torch.equal(loaded[0], expected.packed)
    assert torch.equal(loaded[1], expected.scales)
    found = PackedWeight(*loaded, method.spec, len(loaded[0]), K, method.table_ends)
    dense = dequantize_packed(expected, torch.float32)
    assert torch.equal(dequantize_packed(found, torch.float32), dense)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    weight = (expected.packed, expected.scales, expected.table, method.spec)
    out = method.apply(layer, x)
    assert torch.equal(out, lut_gemm(x, *weight, table_ends=expected.table_ends))
