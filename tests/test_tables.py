"""Tables: the published values, their constructions computed another way, and users' own."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flute.errors import FormatError
from flute.tables import NF4, TABLES, get_table, nf_quantiles

QLORA_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
"""Dettmers et al. 2023, appendix E, as printed there."""


def normal_quantile(probability: float) -> float:
    """By bisection of the error function: independent of the package's `statistics`."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def normal_float(num_bits: int, offset: float) -> list[float]:
    """QLoRA's construction: 2**(b-1) positive and 2**(b-1) - 1 negative quantiles, and zero."""
    half = 2 ** (num_bits - 1)
    positive = [offset + (0.5 - offset) * i / half for i in range(half)]
    negative = [offset + (0.5 - offset) * i / (half - 1) for i in range(half - 1)]
    values = [normal_quantile(p) for p in positive] + [-normal_quantile(p) for p in negative]
    return sorted(v / normal_quantile(offset) for v in [*values, 0.0])


def test_nf4_is_the_published_one():
    table = get_table("nf", 4)
    assert table.dtype == torch.float32
    assert table.tolist() == [QLORA_NF4]
    assert torch.equal(get_table("nf4", 4), table)
    assert list(NF4) == QLORA_NF4


def test_nf4_construction_gives_the_published_values():
    assert max(abs(a - b) for a, b in zip(nf_quantiles(4), QLORA_NF4, strict=True)) < 1e-6


@pytest.mark.parametrize(("num_bits", "offset"), [(4, 0.9677083), (3, 0.9330357), (2, 0.8541667)])
def test_nf_follows_its_construction(num_bits, offset):
    steps = 2**num_bits
    assert offset == pytest.approx(1 - (1 / (2 * (steps - 1)) + 1 / (2 * steps)) / 2, abs=1e-7)
    expected = torch.tensor([normal_float(num_bits, offset)])
    assert torch.allclose(get_table("nf", num_bits), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_nf_has_an_exact_zero_and_both_ends(num_bits):
    table = get_table("nf", num_bits)[0]
    assert table[2 ** (num_bits - 1) - 1] == 0.0
    assert (table[0], table[-1]) == (-1.0, 1.0)
    assert bool((table.diff() > 0).all())


def small_float(pattern: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Decode sign, exponent and mantissa; exponent 0 is subnormal, nothing is Inf or NaN."""
    width = exponent_bits + mantissa_bits
    sign = -1.0 if pattern >> width else 1.0
    exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (pattern & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("num_bits", "exponent_bits", "mantissa_bits", "bias"), [(4, 2, 1, 1), (3, 2, 0, 1)]
)
def test_fp_decodes_its_bit_patterns(num_bits, exponent_bits, mantissa_bits, bias):
    expected = [small_float(p, exponent_bits, mantissa_bits, bias) for p in range(2**num_bits)]
    assert get_table(f"fp{num_bits}", num_bits).tolist() == [expected]


def test_fp2_is_sign_and_one_exponent_bit():
    assert get_table("fp", 2).tolist() == [[0.0, 1.0, 0.0, -1.0]]


def test_fp4_reaches_six_both_ways():
    table = get_table("fp", 4)[0].tolist()
    assert table[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert table[9:] == [-0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_int_is_twos_complement_in_order(num_bits):
    half = 2 ** (num_bits - 1)
    assert get_table("int", num_bits).tolist() == [[float(v) for v in range(-half, half)]]


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("family", list(TABLES))
def test_a_family_may_carry_its_bits(family, num_bits):
    assert torch.equal(get_table(f"{family}{num_bits}", num_bits), get_table(family, num_bits))


VALUES = [3.0, -1.0, 0.25, 7.5]
ROWS = [VALUES, [1.0, 2.0, 3.0, 4.0], [0.0, 0.5, -0.5, 0.125]]


@pytest.mark.parametrize(("values", "num_rows"), [(VALUES, 1), (ROWS, 3)])
@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        torch.tensor,
        lambda v: torch.tensor(v, dtype=torch.float16),
        lambda v: torch.tensor(v, dtype=torch.float64),
        np.array,
        lambda v: np.array(v, dtype=np.float16),
        lambda v: np.array(v, dtype=">f8"),
        lambda v: np.flip(np.flip(np.array(v))),
        lambda v: torch.tensor(v, requires_grad=True),
    ],
)
def test_a_users_table_keeps_its_values_and_order(convert, values, num_rows):
    table = get_table(convert(values), 2)
    assert table.dtype == torch.float32
    assert table.shape == (num_rows, 4)
    assert table.tolist() == (values if num_rows > 1 else [values])
    assert not table.requires_grad


@pytest.mark.parametrize("convert", [torch.tensor, lambda v: np.array(v, dtype=np.float32)])
def test_a_users_table_is_copied(convert):
    mine = convert([VALUES])
    table = get_table(mine, 2)
    mine[:] = 0
    assert table.tolist() == [VALUES]


def test_a_read_only_array_does_no_harm(recwarn):
    mine = np.array(VALUES, dtype=np.float32)
    mine.flags.writeable = False
    assert get_table(mine, 2).tolist() == [VALUES]
    assert not recwarn.list


def test_integers_are_numbers():
    assert get_table([-2, -1, 0, 1], 2).tolist() == [[-2.0, -1.0, 0.0, 1.0]]


@pytest.mark.parametrize(("values", "num_rows"), [(VALUES, 1), (ROWS, 3)])
@pytest.mark.parametrize("suffix", [".json", ".txt", ".csv.txt", ".npy", ".safetensors"])
def test_a_table_from_a_file(tmp_path, suffix, values, num_rows):
    path = tmp_path / f"mine{suffix}"
    rows = values if num_rows > 1 else [values]
    if suffix == ".json":
        path.write_text(json.dumps(values))
    elif suffix == ".txt":
        path.write_text("# a comment\n" + "\n".join(" ".join(map(str, row)) for row in rows))
    elif suffix == ".csv.txt":
        path.write_text("\n".join(", ".join(map(str, row)) for row in rows) + "\n")
    elif suffix == ".npy":
        np.save(path, np.array(values))
    else:
        save_file({"table": torch.tensor(values)}, path)
    for given in (path, str(path)):
        assert get_table(given, 2).tolist() == rows


def test_a_text_file_may_hold_a_value_per_line(tmp_path):
    path = tmp_path / "column.txt"
    path.write_text("\n".join(map(str, VALUES)))
    assert get_table(path, 2).tolist() == [VALUES]


@pytest.mark.parametrize("num_bits", [1, 5, 8, "4"])
def test_other_bits_are_refused(num_bits):
    with pytest.raises(FormatError, match=re.escape(f"`num_bits` is {num_bits!r}; expected one")):
        get_table("nf", num_bits)


@pytest.mark.parametrize(
    ("table", "num_bits", "message"),
    [
        (VALUES, 3, "`table` has shape (1, 4); expected 8 entries (or N rows of them) for num_b"),
        ([[[1.0]]], 2, "`table` has shape (1, 1, 1); expected 4 entries"),
        (1.5, 2, "`table` has shape (); expected 4 entries"),
        ([], 2, "`table` has shape (1, 0); expected 4 entries"),
        (np.zeros((0, 4)), 2, "`table` has shape (0, 4); expected 4 entries"),
        ([1.0, 2.0, math.nan, 3.0], 2, "`table` holds NaN or Inf; expected finite numbers."),
        ([1.0, 2.0, -math.inf, 3.0], 2, "`table` holds NaN or Inf; expected finite numbers."),
        ([1.0, 2.0, 1e300, 3.0], 2, "`table` holds NaN or Inf; expected finite numbers."),
        ([2.0] * 4, 2, "`table` holds one value throughout; expected at least two."),
        ([VALUES, [0.0] * 4], 2, "`table` holds one value throughout; expected at least two."),
        ([1.0, [2.0], 3.0, 4.0], 2, "`table` is not a list of numbers: "),
        (["a", "b", "c", "d"], 2, "`table` is not a list of numbers: "),
        ([1.0, None, 2.0, 3.0], 2, "`table` is not a list of numbers: "),
        ({"table": VALUES}, 2, "`table` is not a list of numbers: "),
        ([1j, 2.0, 3.0, 4.0], 2, "`table` is not a list of numbers: "),
        (
            "nf3",
            4,
            "`table` is 'nf3'; expected one of ('int', 'fp', 'nf', 'bof', 'bof-s') (with or",
        ),
        ("normal", 4, "`table` is 'normal'; expected one of ('int', 'fp', 'nf', 'bof', 'bof-s')"),
        (
            "missing.json",
            4,
            "`table` is 'missing.json', and there is no such file; expected",
        ),
    ],
)
def test_a_bad_table_is_named(table, num_bits, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        get_table(table, num_bits)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "[1, 2, 3", "cannot be read as a table: Expecting"),
        ("t.json", '{"a": 1}', "is not a list of numbers: "),
        ("t.json", "[1, 2, NaN, 4]", "holds NaN or Inf"),
        ("t.json", "[1, 2, 3]", "has shape (1, 3); expected 4 entries"),
        ("t.txt", "1 2 three 4", "cannot be read as a table: "),
        ("t.txt", "1 2\n3\n", "cannot be read as a table: "),
        ("t.npy", "not numpy", "cannot be read as a table: "),
        ("t.safetensors", "not safetensors", "cannot be read as a table: "),
        ("t.csv", "1,2,3,4", "has suffix '.csv'; expected one of ('.json', '.txt', '.npy', "),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(FormatError, match=re.escape(f"`{path}` {message}")):
        get_table(path, 2)


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("")
    with pytest.raises(FormatError, match=re.escape(f"`{path}` has shape (1, 0); expected 4")):
        get_table(path, 2)


def test_a_folder_is_no_table(tmp_path):
    (tmp_path / "t.npy").mkdir()
    with pytest.raises(FormatError, match="cannot be read as a table: "):
        get_table(tmp_path / "t.npy", 2)


def test_pickles_are_not_read(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match=r"cannot be read as a table: .*allow_pickle"):
        get_table(path, 2)


@pytest.mark.parametrize("count", [0, 2])
def test_a_safetensors_file_must_hold_one_tensor(tmp_path, count):
    path = tmp_path / "t.safetensors"
    save_file({f"t{i}": torch.tensor(VALUES) + i for i in range(count)}, path)
    with pytest.raises(FormatError, match=f"it holds {count} tensors; expected one"):
        get_table(path, 2)
