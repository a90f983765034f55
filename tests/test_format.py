"""The format: its invariants, the message of each broken one, and the JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from helpers import random_weight

from flute.errors import FluteError, FormatError
from flute.format import FORMAT_VERSION, CheckpointConfig, QuantizedWeight, QuantSpec

N, K = 3, 64
SPEC = QuantSpec(4, 32)


def parts(**changes):
    """Valid arguments of a QuantizedWeight, some replaced."""
    arguments = {
        "codes": torch.full((N, K), 15, dtype=torch.uint8),
        "scales": torch.ones(N, 2, dtype=torch.float16),
        "table": torch.arange(16.0).view(1, 16),
        "spec": SPEC,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize("num_bits", [0, 1, 5, 8, -4, "4", None, 4.0, True])
def test_spec_refuses_other_bits(num_bits):
    message = re.escape(f"`num_bits` is {num_bits!r}; expected one of (2, 3, 4).")
    with pytest.raises(FormatError, match=message):
        QuantSpec(num_bits, 64)


@pytest.mark.parametrize("group_size", [0, 1, 16, 48, 512, -2, "64", None, 64.0])
def test_spec_refuses_other_groups(group_size):
    message = re.escape(
        f"`group_size` is {group_size!r}; expected one of (32, 64, 128, 256), or -1 for the whole "
        "row."
    )
    with pytest.raises(FormatError, match=message):
        QuantSpec(4, group_size)


@pytest.mark.parametrize(
    ("num_bits", "group_size", "K", "groups", "words"),
    [
        (4, 32, 96, 3, 12),
        (3, 32, 96, 3, 9),
        (2, 256, 512, 2, 32),
        (3, -1, 11, 1, 2),
        (3, -1, 10, 1, 1),
        (2, -1, 17, 1, 2),
        (4, -1, 1, 1, 1),
        (4, 64, 0, 0, 0),
        (4, -1, 0, 0, 0),
    ],
)
def test_spec_counts(num_bits, group_size, K, groups, words):
    spec = QuantSpec(num_bits, group_size)
    assert spec.num_entries == 2**num_bits
    assert (spec.num_groups(K), spec.num_words(K)) == (groups, words)


def test_spec_names_the_row_that_no_group_divides():
    message = re.escape("K=100 is not a multiple of group_size=64. Choose a group size that")
    with pytest.raises(FormatError, match=message):
        QuantSpec(4, 64).num_groups(100)


def test_errors_are_value_errors_and_ours():
    with pytest.raises(ValueError, match="num_bits") as caught:
        QuantSpec(7)
    assert isinstance(caught.value, FluteError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codes": torch.zeros(N, K, dtype=torch.int64)},
            "`codes` is torch.int64 of shape (3, 64); expected torch.uint8 (N, K).",
        ),
        (
            {"codes": torch.zeros(K, dtype=torch.uint8)},
            "`codes` is torch.uint8 of shape (64,); expected torch.uint8 (N, K).",
        ),
        (
            {"codes": torch.full((N, K), 16, dtype=torch.uint8)},
            "`codes` holds 16; expected values below 16 for num_bits=4.",
        ),
        (
            {"scales": torch.ones(N, 3)},
            "`scales` has shape (3, 3); expected (N, K / group) = (3, 2) for N=3, K=64, "
            "group_size=32.",
        ),
        (
            {"scales": torch.ones(2 * N)},
            "`scales` has shape (6,); expected (N, K / group) = (3, 2)",
        ),
        (
            {"scales": torch.ones(N, 2, dtype=torch.float64)},
            "`scales` is torch.float64; expected float16, bfloat16 or float32.",
        ),
        (
            {"scales": torch.tensor([[1, 1], [1, torch.nan], [1, 1]])},
            "`scales` holds NaN or Inf; expected finite numbers.",
        ),
        (
            {"table": torch.ones(1, 8)},
            "`table` has shape (1, 8); expected (1, 16) or (3, 16) for num_bits=4, N=3.",
        ),
        ({"table": torch.ones(2, 16)}, "`table` has shape (2, 16); expected (1, 16) or (3, 16)"),
        ({"table": torch.ones(16)}, "`table` has shape (16,); expected (1, 16) or (3, 16)"),
        (
            {"table": torch.ones(1, 16, dtype=torch.float16)},
            "`table` is torch.float16; expected torch.float32.",
        ),
        (
            {"table": torch.full((3, 16), torch.inf)},
            "`table` holds NaN or Inf; expected finite numbers.",
        ),
        (
            {"table": torch.ones(1, 16, device="meta")},
            "`codes`, `scales` and `table` are on ['cpu', 'meta'].",
        ),
        (
            {"spec": QuantSpec(4, 128)},
            "K=64 is not a multiple of group_size=128.",
        ),
        ({"spec": QuantSpec(3, 32)}, "`codes` holds 15; expected values below 8 for num_bits=3."),
    ],
)
def test_quantized_weight_names_what_is_wrong(changes, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        QuantizedWeight(**parts(**changes))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_quantized_weight_counts_its_bytes(num_bits, per_row, scale_dtype):
    weight = random_weight(5, 96, QuantSpec(num_bits, 32), per_row=per_row, scale_dtype=scale_dtype)
    assert weight.shape == (5, 96)
    codes = 5 * 96 * num_bits // 8
    scales = 5 * 3 * scale_dtype.itemsize
    table = (5 if per_row else 1) * 2**num_bits * 4
    assert weight.num_bytes == codes + scales + table


def test_quantized_weight_rounds_a_ragged_row_up_to_words():
    weight = random_weight(2, 11, QuantSpec(3, -1), scale_dtype=torch.float16)
    assert weight.num_bytes == 2 * 2 * 4 + 2 * 2 + 8 * 4


def test_quantized_weight_cannot_be_changed():
    weight = QuantizedWeight(**parts())
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.spec = QuantSpec(2, 32)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_quantized_weight_may_be_empty(shape):
    spec = QuantSpec(4, 32)
    weight = random_weight(*shape, spec)
    assert weight.shape == shape
    assert weight.num_bytes == 16 * 4


def full_config():
    return CheckpointConfig(
        num_bits=3,
        group_size=128,
        method="nf",
        table="nf",
        table_scope="row",
        scale_dtype="float16",
        modules_to_not_convert=("lm_head",),
        overrides={"a.b": {"num_bits": 2}, "c": {"group_size": -1}},
    )


def test_config_round_trip_through_json():
    config = full_config()
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["quant_method"] == "flute"
    assert stored["format_version"] == FORMAT_VERSION == 1
    assert stored["modules_to_not_convert"] == ["lm_head"]
    assert CheckpointConfig.from_dict(stored) == config
    assert CheckpointConfig.from_dict(stored).to_dict() == config.to_dict()


def test_config_overrides_bits_and_group_by_full_name():
    config = full_config()
    assert config.spec_of("a.b") == QuantSpec(2, 128)
    assert config.spec_of("c") == QuantSpec(3, -1)
    assert config.spec_of("x.a.b") == QuantSpec(3, 128)


def test_config_ignores_keys_of_other_readers():
    stored = {**CheckpointConfig().to_dict(), "comment": "of a later minor release"}
    assert CheckpointConfig.from_dict(stored) == CheckpointConfig()


def test_config_of_another_method_is_refused():
    message = "`quant_method` is 'gptq'; expected 'flute'. `flute convert` reads other formats."
    with pytest.raises(FormatError, match=re.escape(message)):
        CheckpointConfig.from_dict({"quant_method": "gptq", "bits": 4})
    with pytest.raises(FormatError, match="`quant_method` is None; expected 'flute'"):
        CheckpointConfig.from_dict({})


def test_config_without_version_is_refused():
    stored = CheckpointConfig().to_dict()
    del stored["format_version"]
    with pytest.raises(FormatError, match="`quantization_config` has no `format_version`"):
        CheckpointConfig.from_dict(stored)


@pytest.mark.parametrize("version", [2, 10, "1", None, 1.5])
def test_newer_format_is_refused(version):
    stored = {**CheckpointConfig().to_dict(), "format_version": version}
    message = re.escape(
        f"The checkpoint has format version {version!r}; this package reads up to 1. Upgrade flute"
    )
    with pytest.raises(FormatError, match=message):
        CheckpointConfig.from_dict(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 5}, "`num_bits` is 5; expected one of (2, 3, 4)."),
        ({"group_size": 100}, "`group_size` is 100; expected one of (32, 64, 128, 256)"),
        ({"table_scope": "column"}, "`table_scope` is 'column'; expected 'tensor' or 'row'."),
        ({"scale_dtype": "fp16"}, "`scale_dtype` is 'fp16'; expected one of ('float16',"),
        ({"overrides": {"a": {"num_bits": 9}}}, "`num_bits` is 9; expected one of (2, 3, 4)."),
        ({"overrides": {"a": {"bits": 4}}}, "The override of `a` has unknown keys ['bits']."),
        ({"overrides": {"a": 4}}, "The override of `a` is 4; expected an object"),
        ({"overrides": ["a"]}, "`overrides` is ['a']; expected an object"),
        (
            {"modules_to_not_convert": "lm_head"},
            "`modules_to_not_convert` is 'lm_head'; expected a list of names.",
        ),
        (
            {"modules_to_not_convert": [1]},
            "`modules_to_not_convert` is [1]; expected a list of names.",
        ),
    ],
)
def test_config_names_what_is_wrong(changes, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        CheckpointConfig.from_dict({**CheckpointConfig().to_dict(), **changes})


def test_config_takes_null_for_nothing():
    """transformers writes null where nothing is listed."""
    stored = {**CheckpointConfig().to_dict(), "modules_to_not_convert": None, "overrides": None}
    assert CheckpointConfig.from_dict(stored) == CheckpointConfig()
