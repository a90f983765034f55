"""gptq and lnq: against references written plainly, in fp64, and against each other."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from helpers import generator, squared_error
from torch import Tensor

import flute
from flute.blockwise import quantize_by_hessian
from flute.errors import FormatError
from flute.format import CheckpointConfig, QuantizedWeight, QuantSpec
from flute.methods import BY_HESSIAN, fit, gptq, hessian, lnq, mse
from flute.tables import get_table

BITS = (2, 3, 4)


def problem(N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (N, K) and the Hessian of correlated inputs of unequal size."""
    rng = generator(N, K, seed)
    mix = torch.randn(K, K, generator=rng) / K**0.5 + torch.eye(K)
    x = torch.randn(4 * K, K, generator=rng) @ mix * torch.rand(K, generator=rng)
    return torch.randn(N, K, generator=rng) * 0.02, x.T @ x


def output_error(weight: Tensor, H: Tensor, quantized: flute.QuantizedWeight) -> float:
    """Squared error of the layer's output over its square, in fp64."""
    H = hessian.damped(H).double()
    error = weight.double() - flute.dequantize(quantized).double()
    return float(((error @ H) * error).sum() / ((weight.double() @ H) * weight.double()).sum())


def gptq_column_by_column(weight: Tensor, H: Tensor, quantized: flute.QuantizedWeight) -> Tensor:
    """The codes that error feedback gives for these scales and table, in fp64.

    One column after the other, with the inverse of what is left of H taken anew for each.
    """
    H = hessian.damped(H).double()
    length = weight.shape[1] // quantized.scales.shape[1]
    rest, codes = weight.double().clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for j in range(weight.shape[1]):
        s = quantized.scales[:, j // length].double()
        candidates = quantized.table.double() * s[:, None]
        choice = (rest[:, j : j + 1] - candidates).abs().argmin(1)
        value = candidates.gather(1, choice[:, None])[:, 0]
        codes[:, j] = choice
        inverse = torch.linalg.inv(H[j:, j:])
        error = (rest[:, j] - value) / inverse[0, 0]
        rest[:, j:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize(("K", "group_size"), [(256, 32), (192, 64), (256, 256), (77, -1)])
@pytest.mark.parametrize("num_bits", BITS)
def test_gptq_is_error_feedback(num_bits, K, group_size):
    weight, H = problem(8, K)
    spec, table = QuantSpec(num_bits, group_size), get_table("nf", num_bits)
    quantized = gptq.quantize(weight, H, spec, table, torch.float32, reorder=False)
    same = gptq_column_by_column(weight, H, quantized) == quantized.codes
    assert same.double().mean() > 0.99  # a near tie, settled otherwise in fp64, changes its row


def test_gptq_finds_scales_on_the_updated_weights():
    weight, H = problem(8, 128)
    first = gptq.quantize(
        weight, H, QuantSpec(3, 64), get_table("nf", 3), torch.float32, reorder=False
    )
    plain = mse.quantize(weight, QuantSpec(3, 64), get_table("nf", 3), torch.float32)
    assert torch.allclose(first.scales[:, 0], plain.scales[:, 0])
    assert not torch.allclose(first.scales[:, 1], plain.scales[:, 1])


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_an_identity_hessian_gives_nearest_entries(method):
    """Without correlations nothing can be made up for."""
    weight, _ = problem(16, 128)
    quantized = flute.quantize(weight, 4, 64, method=method, hessian=torch.eye(128))
    plain = flute.quantize(weight, 4, 64, table=quantized.table)
    assert squared_error(weight, quantized) <= 1.02 * squared_error(weight, plain)


@pytest.mark.parametrize("num_bits", BITS)
def test_the_methods_stand_in_their_order(num_bits):
    weight, H = problem(64, 256)
    quantize = flute.quantize
    errors = [
        output_error(weight, H, quantized)
        for quantized in (
            quantize(weight, num_bits, method="nf"),
            quantize(weight, num_bits),
            quantize(weight, num_bits, method="gptq", table="nf", hessian=H),
            quantize(weight, num_bits, method="gptq", hessian=H),
            quantize(weight, num_bits, method="lnq", hessian=H),
            quantize(weight, num_bits, method="lnq", hessian=H, table_scope="row"),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.85 * errors[2]


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("per_row", [False, True])
def test_no_step_of_lnq_raises_the_error(num_bits, per_row):
    weight, H = problem(24, 192)
    full = hessian.damped(H)
    part = lnq.Part(slice(0, 24), weight, full)
    start = gptq.quantize(weight, H, QuantSpec(num_bits, 64), None, torch.float32)
    entries = start.table.expand(24, -1) if per_row else start.table
    ranks, scales = start.codes.long(), start.scales

    def error() -> float:
        values = lnq.values_of(entries, ranks) * scales.repeat_interleave(64, 1)
        difference = (weight - values).double()
        return float(((difference @ full.double()) * difference).sum())

    errors = [error()]
    for _ in range(3):
        entries, ranks = lnq._fit_entries([part], entries, ranks, scales)
        errors.append(error())
        scales = lnq._fit_scales(part, entries, ranks, scales)
        errors.append(error())
        ranks = lnq._descend(part, entries, ranks, scales)
        errors.append(error())
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.95 * errors[0]


def test_lnq_solves_for_the_table_exactly():
    """Rows of one table: as least squares over all weights at once, in fp64."""
    weight, H = problem(6, 64)
    start = gptq.quantize(weight, H, QuantSpec(2, 32), None, torch.float32)
    full, scales = hessian.damped(H), start.scales.repeat_interleave(32, 1)
    part = lnq.Part(slice(0, 6), weight, full)
    entries, ranks = lnq._fit_entries([part], start.table, start.codes.long(), start.scales)
    root = torch.linalg.cholesky(full.double()).T
    onehot = torch.nn.functional.one_hot(start.codes.long(), 4).double() * scales[:, :, None]
    design = (root @ onehot).flatten(0, 1)
    target = (weight.double() @ root.T).flatten()
    exact = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    assert torch.allclose(entries[0].double(), exact.sort()[0], atol=1e-4)
    assert torch.equal(entries[0][ranks], exact.float()[start.codes.long()]) or torch.allclose(
        entries[0][ranks], exact.float()[start.codes.long()], atol=1e-4
    )


@pytest.mark.parametrize("table_scope", ["tensor", "row"])
def test_groups_of_rows_with_hessians_of_their_own(table_scope):
    """With a table per row each group is what it is by itself; a shared one serves all groups."""
    weight, _ = problem(24, 128)
    hessians = torch.stack([problem(24, 128, seed)[1] * (1 + seed) for seed in (3, 4, 5)])
    quantized = flute.quantize(
        weight, 3, method="lnq", hessian=hessians, table_scope=table_scope, table="nf"
    )
    swapped = flute.quantize(
        weight, 3, method="lnq", hessian=hessians.roll(1, 0), table_scope=table_scope, table="nf"
    )
    for i, own in enumerate(hessians):
        rows = slice(8 * i, 8 * i + 8)
        alone = flute.quantize(
            weight[rows], 3, method="lnq", hessian=own, table_scope=table_scope, table="nf"
        )
        errors = [
            output_error(weight[rows], own, values)
            for values in (alone, part_of(quantized, rows), part_of(swapped, rows))
        ]
        if table_scope == "row":
            assert torch.equal(quantized.codes[rows], alone.codes)
            assert torch.allclose(quantized.table[rows], alone.table, atol=1e-5)
        assert errors[1] < 1.1 * errors[0]
        assert errors[1] < 0.9 * errors[2]


def part_of(quantized, rows):
    table = quantized.table if len(quantized.table) == 1 else quantized.table[rows]
    return QuantizedWeight(quantized.codes[rows], quantized.scales[rows], table, quantized.spec)


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_one_hessian_per_group_of_rows_equals_one_for_all_if_they_are_equal(method):
    weight, H = problem(24, 128)
    whole = flute.quantize(weight, 3, method=method, hessian=H, table="nf")
    parts = flute.quantize(weight, 3, method=method, hessian=H.expand(3, -1, -1), table="nf")
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_what_comes_out_fits_the_format(method):
    weight, H = problem(12, 128)
    for group_size in (32, 64, 128, -1):
        for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
            quantized = flute.quantize(
                weight, 3, group_size, method=method, hessian=H, scale_dtype=scale_dtype
            )
            assert quantized.scales.dtype == scale_dtype
            assert quantized.table.shape == (1, 8)
            assert float(quantized.table.abs().max()) == pytest.approx(1)


@pytest.mark.parametrize("reorder", [False, True])
def test_reordering_keeps_groups_and_a_given_table(reorder):
    weight, H = problem(8, 128)
    table = torch.tensor([[0.3, -1.0, 1.0, -0.35]])
    quantized = gptq.quantize(weight, H, QuantSpec(2, 32), table, torch.float32, reorder=reorder)
    assert torch.equal(quantized.table, table)
    plain = mse.quantize(weight, QuantSpec(2, 32), table, torch.float32)
    assert output_error(weight, H, quantized) < 0.9 * output_error(weight, H, plain)


def test_tables_per_row_are_kept_by_gptq_and_learned_by_lnq():
    weight, H = problem(6, 64)
    rows = get_table("nf", 3).repeat(6, 1) * torch.linspace(0.5, 2, 6)[:, None]
    kept = flute.quantize(weight, 3, method="gptq", table=rows, hessian=H)
    assert torch.equal(kept.table, rows)
    learned = flute.quantize(weight, 3, method="lnq", hessian=H, table_scope="row")
    assert learned.table.shape == (6, 8)
    assert len(learned.table.unique(dim=0)) == 6


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_repeatable_and_indifferent_to_the_hessians_scale(method):
    weight, H = problem(8, 64)
    once = flute.quantize(weight, 3, method=method, hessian=H)
    again = flute.quantize(weight, 3, method=method, hessian=H)
    large = flute.quantize(weight, 3, method=method, hessian=H * 1024)
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.table, again.table)
    assert torch.equal(once.codes, large.codes)


# ---- the fitted table

REACHED = {4: 0.0069, 3: 0.0292, 2: 0.111}
"""Relative squared error of Gaussian weights in groups of 64 with a table fitted to them."""


@pytest.mark.parametrize("num_bits", BITS)
def test_a_fitted_table_reaches_the_least_error_of_gaussian_weights(num_bits):
    weight = torch.randn(64, 1024, generator=generator(1))
    spec = QuantSpec(num_bits, 64)
    table = fit.fit_table(weight, spec, get_table("nf", num_bits))
    error = squared_error(weight, mse.quantize(weight, spec, table, torch.float32))
    assert error <= 1.01 * REACHED[num_bits]


def test_columns_of_no_importance_have_no_say_in_the_table():
    weight = torch.randn(32, 128, generator=generator(2))
    weight[:, 64:] = weight[:, 64:].sign() * weight[:, 64:].abs().sqrt()
    importance = torch.cat((torch.zeros(64), torch.ones(64)))
    spec, start = QuantSpec(2, 64), get_table("nf", 2)
    table = fit.fit_table(weight, spec, start, importance)
    assert torch.allclose(table, fit.fit_table(weight[:, 64:].contiguous(), spec, start), atol=1e-5)
    assert not torch.allclose(table, fit.fit_table(weight, spec, start), atol=1e-2)


def test_zero_weights_and_an_entry_that_nothing_takes():
    table = fit.fit_table(torch.zeros(4, 64), QuantSpec(3, 32), get_table("nf", 3))
    assert torch.allclose(table, get_table("nf", 3))
    for method in BY_HESSIAN:
        quantized = flute.quantize(torch.zeros(4, 64), 3, 32, method=method, hessian=torch.eye(64))
        assert bool((flute.dequantize(quantized) == 0).all())


# ---- hard Hessians


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_dead_columns_are_rounded_and_disturb_nobody(method):
    weight, H = problem(8, 128)
    H[5] = H[:, 5] = H[70] = H[:, 70] = 0
    quantized = flute.quantize(weight, 4, 64, method=method, hessian=H)
    error = (flute.dequantize(quantized) - weight).abs()
    step = quantized.table.sort()[0].diff().max() * quantized.scales.float().abs().max()
    assert float(error[:, [5, 70]].max()) <= float(step)
    assert output_error(weight, H, quantized) < 0.01


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_inputs_that_were_never_active_are_quantised_as_without_data(method):
    weight, _ = problem(8, 128)
    quantized = flute.quantize(weight, 4, 64, method=method, hessian=torch.zeros(128, 128))
    assert squared_error(weight, quantized) < 0.0085


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_too_few_samples_are_damped(method):
    """Three inputs for 128 columns: the Hessian alone has no inverse."""
    weight, _ = problem(8, 128)
    x = torch.randn(3, 128, generator=generator(3))
    quantized = flute.quantize(weight, 4, 64, method=method, hessian=x.T @ x)
    assert output_error(weight, x.T @ x, quantized) < 0.005


def test_a_hessian_that_is_not_positive_definite_raises_the_damping():
    weight, _ = problem(4, 64)
    H = torch.eye(64)
    H[0, 1] = H[1, 0] = 1.05
    with pytest.warns(UserWarning, match="not positive definite with damping 0.01; raised to"):
        quantized = flute.quantize(weight, 4, method="gptq", hessian=H)
    assert bool(torch.isfinite(flute.dequantize(quantized)).all())


@pytest.mark.parametrize("method", BY_HESSIAN)
def test_raised_damping_names_its_layer_once(method):
    weight, _ = problem(4, 64)
    H = torch.eye(64)
    H[0, 1] = H[1, 0] = 1.05
    config = CheckpointConfig(method=method)
    with pytest.warns(UserWarning, match="positive definite") as told:
        quantize_by_hessian({"blocks.3.down": weight}, {"blocks.3.down": H}, config, None)
    assert [str(w.message).partition(" is ")[0] for w in told] == ["The Hessian of `blocks.3.down`"]


def test_a_hessian_that_nothing_makes_positive_definite_is_refused():
    H = torch.eye(64)
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(FormatError, match="not positive definite, even with damping 10"):
        flute.quantize(torch.ones(2, 64), method="gptq", hessian=H)


@pytest.mark.parametrize("method", BY_HESSIAN)
@pytest.mark.parametrize(
    ("H", "message"),
    [
        (None, "needs `hessian`: the sum of x x' over inputs, (K, K)."),
        (torch.eye(32), "`hessian` has shape (32, 32); expected (K, K) = (64, 64)"),
        (torch.full((64, 64), torch.nan), "`hessian` holds NaN or Inf"),
        (-torch.eye(64), "`hessian` has a negative diagonal"),
    ],
)
def test_bad_hessians_are_named(method, H, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        flute.quantize(torch.ones(4, 64), method=method, hessian=H)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hessian": torch.eye(64)}, "method='mse' uses no `hessian`: drop it"),
        (
            {"table_scope": "row"},
            "only 'lnq' learns a table per row (or 'nfl' that starts from it",
        ),
        ({"table_scope": "head"}, "`table_scope` is 'head'; expected one of ('tensor', 'row')."),
    ],
)
def test_arguments_that_contradict_the_method(arguments, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        flute.quantize(torch.ones(4, 64), **arguments)
