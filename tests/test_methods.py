"""Methods: every entry of METHODS by the same tests; codes and scales against brute force."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import DEMO_MODEL, DTYPES, generator, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import flute
from flute.errors import FormatError
from flute.format import QuantSpec
from flute.methods import (
    CALIBRATED,
    METHODS,
    check_finite,
    fits_table,
    mse,
    quantize,
    resolve_table,
    table_for,
)
from flute.methods.nearest import midpoints, nearest_codes
from flute.tables import get_table

BITS = (2, 3, 4)
GROUPS = (32, 64, 128, 256, -1)
ABSMAX = ("nf", "int", "fp", "bof", "bof-s")
METHODS_AND_SCOPES = [
    (method, per_row)
    for method in METHODS
    for per_row in (False, True)
    if not (per_row and method in ABSMAX)  # these bring their own table
]


def gaussian(N: int, K: int, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=generator(N, K, seed))


def odd_table(num_bits: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Unsorted, lopsided, with a duplicate."""
    table = torch.randn(rows, 2**num_bits, generator=generator(num_bits, rows, seed)) + 0.2
    table[:, 1] = table[:, -1]
    return table


def own_table(method: str, num_bits: int):
    """What to pass as `table` for a method to work."""
    return odd_table(num_bits) if method == "table" else None


def nearest_by_force(values: Tensor, table: Tensor) -> Tensor:
    """Distance to the nearest entry, (N, L), in fp64."""
    entries = table.double().expand(len(values), -1)
    return (values.double()[:, :, None] - entries[:, None, :]).abs().amin(2)


def scales_by_weight(quantized) -> Tensor:
    length = quantized.shape[1] // quantized.scales.shape[1]
    return quantized.scales.double().repeat_interleave(length, 1)


# ---- every method


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(("method", "per_row"), METHODS_AND_SCOPES)
def test_each_weight_takes_its_nearest_entry(method, num_bits, group_size, per_row):
    K = 77 if group_size == -1 else 256
    weight = gaussian(6, K)
    table = odd_table(num_bits, 6) if per_row else own_table(method, num_bits)
    quantized = quantize(weight, num_bits, group_size, method=method, table=table)
    assert quantized.shape == (6, K)
    assert quantized.spec == QuantSpec(num_bits, group_size)
    assert quantized.scales.dtype == torch.bfloat16
    if not fits_table(method, table):
        own = resolve_table(method, table, num_bits, group_size)
        assert torch.equal(quantized.table, own)
    values = quantized.table.double().expand(6, -1).gather(1, quantized.codes.long())
    scaled = weight.double() / scales_by_weight(quantized)
    best = nearest_by_force(scaled, quantized.table)
    assert bool(((values - scaled).abs() <= best * (1 + 1e-5) + 1e-6).all())


LIMITS = {
    ("mse", None): (0.0069, 0.0292, 0.111),
    ("mse", "nf"): (0.0070, 0.0295, 0.133),
    ("mse", "int"): (0.0083, 0.0315, 0.1255),
    ("mse", "fp"): (0.0095, 0.0405, 0.186),
    ("nf", None): (0.0087, 0.0396, 0.324),
    ("int", None): (0.0118, 0.0640, 0.523),
    ("fp", None): (0.0114, 0.0520, 0.523),
    ("bof", None): (0.0082, 0.0397, 0.320),
    ("bof-s", None): (0.0075, 0.0315, 0.141),
    ("table", "nf"): (0.0087, 0.0396, 0.324),
}
"""Squared error over squared norm of Gaussian weights, group 64, at 4, 3 and 2 bits."""


def test_every_method_has_a_limit():
    assert {method for method, _ in LIMITS} == set(METHODS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(("method", "table"), LIMITS)
def test_error_on_gaussian_weights(method, table, num_bits, dtype):
    weight = gaussian(64, 1024).mul(0.02).to(dtype)
    quantized = quantize(weight, num_bits, 64, method=method, table=table)
    limit = LIMITS[method, table][4 - num_bits]
    assert 0.9 * limit < squared_error(weight, quantized) <= limit


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_scale_dtypes(method, scale_dtype):
    weight = gaussian(8, 128)
    table = own_table(method, 4)
    quantized = quantize(weight, 4, 64, method=method, table=table, scale_dtype=scale_dtype)
    wide = quantize(weight, 4, 64, method=method, table=table, scale_dtype=torch.float32)
    assert quantized.scales.dtype == scale_dtype
    assert squared_error(weight, quantized) <= 1.02 * squared_error(weight, wide)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(("method", "per_row"), METHODS_AND_SCOPES)
def test_rows_are_independent(method, num_bits, per_row):
    """A matrix may be quantised in blocks of rows, of any size, to the same bits."""
    weight = gaussian(37, 192)
    table = odd_table(num_bits, 37) if per_row else own_table(method, num_bits)
    if fits_table(method, table):
        table = table_for(method, weight, QuantSpec(num_bits, 64), table)
    whole = quantize(weight, num_bits, 64, method=method, table=table)
    for start, stop in ((0, 1), (1, 8), (8, 36), (36, 37)):
        part_table = table[start:stop] if per_row else table
        part = quantize(weight[start:stop], num_bits, 64, method=method, table=part_table)
        assert torch.equal(part.codes, whole.codes[start:stop])
        assert torch.equal(part.scales, whole.scales[start:stop])


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_threads_make_no_difference(method, monkeypatch):
    weight, table = gaussian(60, 640), own_table(method, 4)
    first = quantize(weight, 4, 64, method=method, table=table)
    monkeypatch.setattr(mse, "_BLOCK", {"cpu": 5 * 640})
    torch.set_num_threads(2)
    try:
        second = quantize(weight, 4, 64, method=method, table=table)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


@pytest.mark.parametrize("method", METHODS)
def test_any_strides_and_gradients(method):
    weight, table = gaussian(64, 96), own_table(method, 4)
    expected = quantize(weight, 4, 32, method=method, table=table)
    wide = torch.stack((weight, weight + 1), -1)
    parameter = torch.nn.Parameter(weight.clone())
    for same in (weight.T.contiguous().T, wide[..., 0], parameter):
        quantized = quantize(same, 4, 32, method=method, table=table)
        assert torch.equal(quantized.codes, expected.codes)
        assert torch.equal(quantized.scales, expected.scales)
        assert not quantized.scales.requires_grad
    assert torch.equal(weight, gaussian(64, 96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_weights_are_read_exactly(method, dtype):
    weight, table = gaussian(8, 128).to(dtype), own_table(method, 3)
    low = quantize(weight, 3, 64, method=method, table=table)
    wide = quantize(weight.float(), 3, 64, method=method, table=table)
    assert torch.equal(low.codes, wide.codes)
    assert torch.equal(low.scales, wide.scales)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("method", ABSMAX)
def test_absmax_is_idempotent(method, num_bits, group_size, scale_dtype):
    """Quantising a quantised weight changes nothing at all."""
    arguments = {"method": method, "scale_dtype": scale_dtype}
    once = quantize(gaussian(16, 256), num_bits, group_size, **arguments)
    twice = quantize(flute.dequantize(once), num_bits, group_size, **arguments)
    assert torch.equal(flute.dequantize(twice), flute.dequantize(once))
    assert torch.equal(twice.scales, once.scales)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("table", ["nf", "int", "fp"])
def test_mse_finds_what_absmax_can_reproduce(table, num_bits):
    """Weights that lie on the grid are matched to rounding."""
    grid = quantize(gaussian(16, 256), num_bits, 64, method=table, scale_dtype=torch.float32)
    weight = flute.dequantize(grid)
    again = quantize(weight, num_bits, 64, method="mse", table=table, scale_dtype=torch.float32)
    assert squared_error(weight, again) <= 1e-10


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("method", ["nf", "int", "fp", "bof"])
def test_absmax_clips_nothing(method, num_bits):
    weight = gaussian(16, 256)
    weight[:, ::64] *= 4  # each group's largest, of either sign
    quantized = quantize(weight, num_bits, 64, method=method, scale_dtype=torch.float32)
    reach = {"int": 2 ** (num_bits - 1) - 1, "fp": {4: 6, 3: 4, 2: 1}[num_bits]}.get(method, 1)
    largest = weight.view(16, 4, 64).abs().amax(2)
    assert torch.allclose(quantized.scales * reach, largest, rtol=1e-6)


def test_bof_s_takes_the_largest_weight_to_one():
    weight = gaussian(16, 256)
    weight[:, ::64] = weight[:, ::64].sign() * 8
    quantized = quantize(weight, 3, 64, method="bof-s", scale_dtype=torch.float32)
    assert torch.equal(quantized.scales, weight[:, ::64])
    assert torch.equal(flute.dequantize(quantized)[:, ::64], weight[:, ::64])


# ---- hard weights


HARD = {
    "zeros": lambda: torch.zeros(4, 128),
    "a zero group": lambda: gaussian(4, 128).index_fill(1, torch.arange(64), 0.0),
    "an outlier": lambda: gaussian(4, 128).index_fill(1, torch.tensor([5]), 1e4),
    "a negative outlier": lambda: gaussian(4, 128).index_fill(1, torch.tensor([5]), -1e4),
    "constant rows": lambda: torch.tensor([[0.3], [-0.3], [1e-5], [70.0]]).expand(4, 128),
    "positive only": lambda: gaussian(4, 128).abs() + 0.1,
    "negative only": lambda: -gaussian(4, 128).abs() - 0.1,
    "signs": lambda: gaussian(4, 128).sign(),
    "one weight each": lambda: (
        torch.eye(4).repeat_interleave(32, 1) * (torch.arange(128) % 32 == 3)
    ),
    "uniform": lambda: torch.rand(4, 128, generator=generator(0)) - 0.5,
    "heavy tails": lambda: gaussian(4, 128) / gaussian(4, 128, 1),
    "negative zeros": lambda: -torch.zeros(4, 128),
}


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("table", ABSMAX)
@pytest.mark.parametrize("name", HARD)
def test_mse_is_no_worse_than_absmax_on_hard_weights(name, table, num_bits, scale_dtype):
    weight = HARD[name]().clone()
    for group_size in (64, -1):
        errors = []
        for method, its_table in ((table, None), ("mse", table)):
            quantized = quantize(
                weight,
                num_bits,
                group_size,
                method=method,
                table=its_table,
                scale_dtype=scale_dtype,
            )
            dense = flute.dequantize(quantized)
            assert bool(torch.isfinite(dense).all())
            assert bool((dense.view(-1)[weight.view(-1) == 0].abs() <= weight.abs().max()).all())
            errors.append(float((dense.double() - weight.double()).square().sum()))
        rounding = {torch.float16: 2**-22, torch.bfloat16: 2**-16, torch.float32: 1e-8}[scale_dtype]
        assert errors[1] <= errors[0] + rounding * float(weight.double().square().sum())


@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_stay_zero(method):
    weight = gaussian(3, 96)
    weight[:, 32:64] = 0
    quantized = quantize(weight, 4, 32, method=method, table=own_table(method, 4))
    assert bool((flute.dequantize(quantized)[:, 32:64] == 0).all())
    assert bool((flute.dequantize(quantized)[:, :32] != 0).any())


MAGNITUDES = (1e-39, 1e-37, 1e-30, 1e-21, 1e-19, 1e-9, 1e6, 1e18, 1e25, 1e37)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("method", ["mse", *ABSMAX])
def test_any_magnitude_is_quantised_alike(method, magnitude):
    """Squares of 1e25 overflow and those of 1e-25 vanish in fp32: neither may matter."""
    unit = gaussian(8, 128)
    weight = unit * magnitude
    wanted = squared_error(unit, quantize(unit, 4, 64, method=method, scale_dtype=torch.float32))
    for scale_dtype in (torch.float32, torch.bfloat16):
        slack = 1.2 if magnitude < 1e-38 else 1.03  # bits are lost even in bfloat16 down there
        quantized = quantize(weight, 4, 64, method=method, scale_dtype=scale_dtype)
        assert squared_error(weight, quantized) <= slack * wanted


@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1e4])
@pytest.mark.parametrize("method", ["mse", *ABSMAX])
def test_magnitudes_that_fp16_scales_can_hold(method, magnitude):
    unit = gaussian(8, 128)
    wanted = squared_error(unit, quantize(unit, 4, 64, method=method, scale_dtype=torch.float32))
    got = quantize(unit * magnitude, 4, 64, method=method, scale_dtype=torch.float16)
    assert squared_error(unit * magnitude, got) <= 1.1 * wanted


@pytest.mark.parametrize("method", METHODS)
def test_scales_beyond_fp16_are_refused(method):
    table = own_table(method, 4)
    message = r"A group needs the scale .*; torch\.float16 ends at 6\.55e\+04\. Store wider scales"
    with pytest.raises(FormatError, match=message):
        quantize(gaussian(4, 64) * 1e6, method=method, table=table, scale_dtype=torch.float16)


def test_a_tiny_table_needs_scales_beyond_fp16():
    with pytest.raises(FormatError, match="or use a table of larger numbers"):
        quantize(gaussian(4, 64), table=(get_table("nf", 4) * 1e-6), scale_dtype=torch.float16)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "bof-s"])  # its table lacks -1
def test_the_largest_fp16_weights_fit_fp16_scales(method):
    weight = torch.full((2, 64), 65504.0, dtype=torch.float16)
    weight[:, ::2] = -65504.0
    table = "nf" if method == "table" else None
    quantized = quantize(weight, method=method, table=table, scale_dtype=torch.float16)
    assert squared_error(weight, quantized) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_scales_that_vanish_in_fp16_are_told(method):
    weight = torch.cat((gaussian(4, 64), gaussian(4, 64) * 1e-10), 1)
    table = own_table(method, 4)
    with pytest.warns(UserWarning, match=r"4 of 8 groups need scales too small for torch\.float16"):
        quantized = quantize(weight, method=method, table=table, scale_dtype=torch.float16)
    dense = flute.dequantize(quantized)
    assert bool((dense[:, 64:] == 0).all())
    assert (
        squared_error(weight[:, :64], quantize(weight[:, :64], method=method, table=table)) < 0.05
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(1, 64, 64), (5, 1, -1), (1, 1, -1), (1, 33, -1)]
)
def test_small_shapes(N, K, group_size, method):
    weight, table = gaussian(N, K), own_table(method, 4)
    quantized = quantize(
        weight, 4, group_size, method=method, table=table, scale_dtype=torch.float32
    )
    assert quantized.shape == (N, K)
    assert quantized.scales.shape == (N, 1)
    if K == 1 and method != "table":
        assert torch.allclose(flute.dequantize(quantized), weight, rtol=1e-5)


# ---- the error-minimising search


@pytest.mark.parametrize("num_bits", BITS)
def test_mse_beats_absmax_on_every_layer_of_the_shipped_model(num_bits):
    layers = {
        name: weight
        for name, weight in load_file(DEMO_MODEL / "model.safetensors").items()
        if weight.ndim == 2 and "embed" not in name
    }
    assert len(layers) == 42
    for name, weight in layers.items():
        errors = {
            method: squared_error(weight, quantize(weight, num_bits, 64, method=method))
            for method in ("mse", "nf")
        }
        assert errors["mse"] < 0.95 * errors["nf"], name


def least_error_by_force(groups: Tensor, table: Tensor) -> Tensor:
    """Least squared error of each group over 1200 scales of either sign, each then made optimal."""
    groups, entries = groups.double(), table.double()
    best = torch.full((len(groups),), torch.inf, dtype=torch.float64)
    largest = groups.abs().amax(1) / entries.abs().max()
    for ratio in torch.linspace(0.15, 1.6, 1200).tolist():
        for sign in (1, -1):
            scales = (sign * ratio * largest)[:, None]
            distance = (groups / scales)[:, :, None] - entries.view(1, 1, -1)
            values = entries.view(-1)[distance.abs().argmin(2)]
            optimum = (groups * values).sum(1) / values.square().sum(1).clamp_min(1e-30)
            error = (groups - optimum[:, None] * values).square().sum(1)
            best = torch.minimum(best, error)
    return best


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("table", ["nf", "int", "fp", "odd"])
def test_mse_is_within_a_percent_of_brute_force(table, num_bits):
    groups = torch.cat((gaussian(24, 32), gaussian(8, 32) ** 3))
    entries = odd_table(num_bits) if table == "odd" else get_table(table, num_bits)
    quantized = quantize(
        groups, num_bits, 32, method="mse", table=entries, scale_dtype=torch.float32
    )
    best = least_error_by_force(groups, entries)
    errors = (flute.dequantize(quantized).double() - groups.double()).square().sum(1)
    assert float(errors.sum()) <= 1.01 * float(best.sum())
    assert bool((errors <= 1.4 * best + 1e-9).all())


def test_mse_uses_the_sign_of_a_lopsided_table():
    """Weights of the shape -(0, 1, 2, 4): only a negative scale fits the table (0, 1, 2, 4)."""
    weight = -torch.tensor([0.0, 1.0, 2.0, 4.0]).repeat(2, 16)
    quantized = quantize(weight, 2, 64, method="mse", table=[0.0, 1.0, 2.0, 4.0])
    assert quantized.scales.tolist() == [[-1.0], [-1.0]]
    assert torch.equal(flute.dequantize(quantized), weight)


# ---- nearest codes


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 4), st.booleans(), st.integers(0, 9999))
def test_nearest_codes_against_brute_force(num_bits, N, per_row, seed):
    rng = generator(seed, N, num_bits)
    table = torch.randint(-6, 7, (N if per_row else 1, 2**num_bits), generator=rng) / 2
    values = torch.randint(-80, 81, (N, 33), generator=rng) / 16  # with many ties
    codes = nearest_codes(values, table)
    assert codes.dtype == torch.uint8
    picked = table.expand(N, -1).gather(1, codes.long())
    assert torch.equal((values - picked).abs().double(), nearest_by_force(values, table))


TABLES_HARD_TO_SEARCH = {
    "nf": lambda: get_table("nf", 4),
    "int": lambda: get_table("int", 4),
    "fp": lambda: get_table("fp", 3),
    "random": lambda: odd_table(4),
    "far from zero": lambda: torch.arange(16.0).view(1, 16) + 1e6,
    "next floats": lambda: torch.tensor([[1.0, 1.0 + 2**-23, 1.0 + 2**-22, 2.0]]),
    "all scales": lambda: torch.tensor([[-1e30, -1e-30, 0.0, 1e-38, 1e-10, 1.0, 1e20, 3e38]]),
    "tiny": lambda: get_table("nf", 4) * 1e-38,
    "huge": lambda: get_table("nf", 4) * 3e38,
    "two values": lambda: torch.tensor([[1.0, 1.0, 1.0, -1.0]]),
}


@pytest.mark.parametrize("name", TABLES_HARD_TO_SEARCH)
def test_codes_change_exactly_at_the_midpoints(name):
    """At a midpoint, one float beside it, and as far out as floats go; more than fit one chunk."""
    table = TABLES_HARD_TO_SEARCH[name]()
    entries = table.sort(dim=1)[0]
    bounds = midpoints(entries)[0]
    up, down = (torch.nextafter(bounds, torch.full_like(bounds, s * torch.inf)) for s in (1, -1))
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    values = torch.cat((bounds, up, down, entries[0], edges)).clamp(-3.4e38, 3.4e38)
    values = values.repeat(40_000 // len(values) + 1).view(1, -1)
    picked = table.gather(1, nearest_codes(values, table).long())
    assert torch.equal(picked[0], entries[0][torch.bucketize(values[0], bounds)])


@pytest.mark.parametrize("per_row", [False, True])
def test_a_tie_takes_the_smaller_entry(per_row):
    table = torch.tensor([[3.0, -1.0, 1.0, 0.0]]).expand(2 if per_row else 1, 4)
    values = torch.tensor([[2.0, 0.5, -0.5, 9.0], [-9.0, 0.0, 1.0, 3.0]])
    assert nearest_codes(values, table).tolist() == [[2, 3, 1, 0], [1, 3, 2, 0]]


def test_midpoints_do_not_overflow():
    entries = torch.tensor([[-3e38, 2e38, 3e38]])
    assert midpoints(entries).tolist() == [[pytest.approx(-5e37), pytest.approx(2.5e38)]]


# ---- messages


def with_value(value: float, shape=(4, 64), at=(2, 7)) -> Tensor:
    weight = torch.ones(shape)
    weight[at] = value
    return weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_named(method, value):
    message = re.escape(
        f"`weight` holds NaN or Inf (1 found), the first ({value}) at (2, 7). Such a weight"
    )
    with pytest.raises(FormatError, match=message):
        quantize(with_value(value), method=method, table=own_table(method, 4))


def test_the_position_counts_from_the_first_row():
    bad = with_value(torch.nan)
    bad[3, 0] = torch.inf
    with pytest.raises(
        FormatError, match=re.escape("`w` holds NaN or Inf (2 found), the first (n")
    ):
        check_finite(bad, "w", 100)
    with pytest.raises(FormatError, match=re.escape("at (102, 7)")):
        check_finite(bad, "w", 100)
    with pytest.raises(FormatError, match=re.escape("at (12,)")):
        check_finite(bad[2], "w", 5)
    with pytest.raises(FormatError, match=re.escape("at ()")):
        check_finite(bad[2, 7], "w")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(64), "`weight` has shape (64,); expected (N, K), not empty."),
        (torch.ones(2, 4, 64), "`weight` has shape (2, 4, 64); expected (N, K), not empty."),
        (torch.ones(0, 64), "`weight` has shape (0, 64); expected (N, K), not empty."),
        (torch.ones(4, 0), "`weight` has shape (4, 0); expected (N, K), not empty."),
        (torch.ones(4, 64, dtype=torch.int8), "`weight` is torch.int8; expected float16, bfloat"),
        (torch.ones(4, 64, dtype=torch.float64), "`weight` is torch.float64; expected float16"),
        (torch.ones(4, 64).to(torch.float8_e4m3fn), "`weight` is torch.float8_e4m3fn; expected"),
        (torch.ones(4, 65), "K=65 is not a multiple of group_size=64."),
    ],
)
def test_bad_weights_are_named(method, weight, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        quantize(weight, method=method, table=own_table(method, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gptq9"}, f"`method` is 'gptq9'; expected one of {(*METHODS, *CALIBRATED)}."),
        ({"method": "int", "table": "nf"}, "method='int' always uses the int table; drop `table`"),
        ({"method": "nf", "table": [0.0] * 16}, "method='nf' always uses the nf table"),
        (
            {"method": "table"},
            "method='table' needs `table` (`--table`): a name, a list",
        ),
        ({"table": [1.0, 2.0]}, "`table` has shape (1, 2); expected 16 entries"),
        ({"num_bits": 8}, "`num_bits` is 8; expected one of (2, 3, 4)."),
        ({"group_size": 16}, "`group_size` is 16; expected one of (32, 64, 128, 256)"),
        (
            {"table": torch.ones(3, 16).cumsum(1)},
            "`table` has shape (3, 16); expected (1, 16) or (4, 16) for num_bits=4, N=4.",
        ),
        (
            {"scale_dtype": torch.float64},
            "`scale_dtype` is torch.float64; expected float16, bfloat16 or float32.",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        quantize(torch.ones(4, 64), **arguments)


@pytest.mark.parametrize("method", ABSMAX)
def test_a_method_may_be_given_its_own_table(method):
    weight = gaussian(2, 64)
    named = quantize(weight, method=method, table=method)
    assert torch.equal(named.codes, quantize(weight, method=method).codes)
    if method != "bof-s":  # its scales have signs
        assert torch.equal(named.codes, quantize(weight, method="table", table=f"{method}4").codes)


def test_the_default_is_mse_with_a_fitted_table_and_groups_of_64():
    weight = gaussian(4, 128)
    plain = quantize(weight)
    table = table_for("mse", weight, QuantSpec(4, 64), None)
    spelled = quantize(weight, 4, 64, method="mse", table=table, scale_dtype=torch.bfloat16)
    for name in ("codes", "scales", "table"):
        assert torch.equal(getattr(plain, name), getattr(spelled, name))
    assert plain.spec == QuantSpec(4, 64)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_makes_no_difference(method):
    weight, table = gaussian(40, 256), own_table(method, 3)
    expected = quantize(weight, 3, 64, method=method, table=table)
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantized = quantize(weight, 3, 64, method=method, table=table)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(quantized.table, expected.table)
    assert torch.equal(quantized.scales, expected.scales)
    assert torch.equal(quantized.codes, expected.codes)
