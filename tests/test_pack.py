"""Packing: every width against a bit stream written with Python's own integers."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import generator
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flute.errors import FormatError
from flute.pack import pack_codes, unpack_codes

BITS = (2, 3, 4)


def random_codes(N: int, K: int, num_bits: int, seed: int = 0) -> torch.Tensor:
    rng = generator(N, K, num_bits, seed)
    codes = torch.randint(0, 2**num_bits, (N, K), generator=rng, dtype=torch.uint8)
    if codes.numel():
        codes[0, 0] = codes[-1, -1] = 2**num_bits - 1
    return codes


def bit_stream(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The oracle: a row is one little-endian integer, code k at bit k * num_bits."""
    num_words = -(-codes.shape[1] * num_bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << (k * num_bits) for k, code in enumerate(row))
        stream = number.to_bytes(num_words * 4, "little")
        rows.append(
            [
                int.from_bytes(stream[i : i + 4], "little", signed=True)
                for i in range(0, len(stream), 4)
            ]
        )
    return torch.tensor(rows, dtype=torch.int32).view(codes.shape[0], num_words)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 5), st.integers(1, 130), st.integers(0, 99))
@example(3, 0, 64, 0)
@example(4, 3, 0, 0)
@example(2, 0, 0, 0)
def test_packing_is_the_bit_stream_and_unpacking_undoes_it(num_bits, N, K, seed):
    codes = random_codes(N, K, num_bits, seed)
    packed = pack_codes(codes, num_bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, bit_stream(codes, num_bits))
    assert packed.is_contiguous()
    restored = unpack_codes(packed, num_bits, K)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("num_bits", BITS)
def test_all_codes_at_every_row_length(num_bits):
    for K in range(1, 131):
        codes = (torch.arange(2 * K).view(2, K) * 7 % 2**num_bits).to(torch.uint8)
        packed = pack_codes(codes, num_bits)
        assert torch.equal(packed, bit_stream(codes, num_bits)), K
        assert torch.equal(unpack_codes(packed, num_bits, K), codes), K


@pytest.mark.parametrize("num_bits", BITS)
def test_a_cut_at_32_codes_is_a_slice_of_words(num_bits):
    codes = random_codes(3, 160, num_bits)
    packed = pack_codes(codes, num_bits)
    for start in range(0, 160, 32):
        for stop in range(start + 32, 161, 32):
            words = packed[:, start * num_bits // 32 : stop * num_bits // 32]
            assert torch.equal(words, pack_codes(codes[:, start:stop], num_bits))
            assert torch.equal(unpack_codes(words, num_bits, stop - start), codes[:, start:stop])


@pytest.mark.parametrize("num_bits", BITS)
def test_rows_are_independent(num_bits):
    codes = random_codes(5, 77, num_bits)
    packed = pack_codes(codes, num_bits)
    for n in range(5):
        assert torch.equal(packed[n : n + 1], pack_codes(codes[n : n + 1], num_bits))


@pytest.mark.parametrize("num_bits", BITS)
def test_padding_bits_are_zero(num_bits):
    K = 33
    packed = pack_codes(torch.full((1, K), 2**num_bits - 1, dtype=torch.uint8), num_bits)
    number = int.from_bytes(packed.numpy().tobytes(), "little")
    assert number == (1 << (K * num_bits)) - 1


@pytest.mark.parametrize("num_bits", BITS)
def test_padding_bits_are_ignored(num_bits):
    codes = random_codes(2, 37, num_bits)
    packed = pack_codes(codes, num_bits)
    used = 37 * num_bits % 32
    packed[:, -1] |= -1 << used
    assert torch.equal(unpack_codes(packed, num_bits, 37), codes)


@pytest.mark.parametrize("num_bits", BITS)
def test_strided_input(num_bits):
    codes = random_codes(64, 40, num_bits)
    assert torch.equal(pack_codes(codes.T, num_bits), bit_stream(codes.T, num_bits))
    assert torch.equal(
        pack_codes(codes[::2, 1:35], num_bits), bit_stream(codes[::2, 1:35], num_bits)
    )
    packed = pack_codes(codes, num_bits)
    wide = torch.stack((packed, ~packed), -1)
    assert torch.equal(unpack_codes(wide[..., 0], num_bits, 40), codes)
    assert torch.equal(unpack_codes(packed.T.contiguous().T, num_bits, 40), codes)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("N", [1, 3])
def test_a_column_of_one_word_with_an_odd_stride(N, num_bits):
    """torch calls it contiguous, yet refuses to view it as bytes."""
    codes = random_codes(N, 8, num_bits)
    packed = pack_codes(codes, num_bits)
    column = torch.as_strided(packed.clone(), (N, 1), (1, 7))
    assert torch.equal(unpack_codes(column, num_bits, 8), codes)


@pytest.mark.parametrize("num_bits", BITS)
def test_input_is_left_alone(num_bits):
    codes = random_codes(3, 64, num_bits)
    before, packed = codes.clone(), pack_codes(codes, num_bits)
    kept = packed.clone()
    unpack_codes(packed, num_bits, 64).zero_()
    assert torch.equal(codes, before)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize(
    ("codes", "num_bits", "message"),
    [
        (
            torch.zeros(2, 8, dtype=torch.int64),
            4,
            "`codes` is torch.int64 of shape (2, 8); expected torch.uint8 (N, K).",
        ),
        (
            torch.zeros(8, dtype=torch.uint8),
            4,
            "`codes` is torch.uint8 of shape (8,); expected torch.uint8 (N, K).",
        ),
        (
            torch.zeros(1, 2, 8, dtype=torch.uint8),
            4,
            "`codes` is torch.uint8 of shape (1, 2, 8); expected torch.uint8 (N, K).",
        ),
        (
            torch.zeros(2, 8, dtype=torch.uint8),
            5,
            "`num_bits` is 5; expected one of (2, 3, 4).",
        ),
        (
            torch.full((2, 8), 8, dtype=torch.uint8),
            3,
            "`codes` holds 8; expected values below 8 for num_bits=3.",
        ),
    ],
)
def test_pack_names_what_is_wrong(codes, num_bits, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        pack_codes(codes, num_bits)


@pytest.mark.parametrize(
    ("packed", "num_bits", "K", "message"),
    [
        (
            torch.zeros(2, 4, dtype=torch.int32),
            4,
            64,
            "`codes` is torch.int32 of shape (2, 4); expected torch.int32 (N, 8) for K=64, num_b",
        ),
        (torch.zeros(2, 4, dtype=torch.int32), 3, 43, "expected torch.int32 (N, 5) for K=43"),
        (torch.zeros(2, 4, dtype=torch.int32), 3, 32, "expected torch.int32 (N, 3) for K=32"),
        (torch.zeros(2, 4, dtype=torch.int64), 4, 32, "`codes` is torch.int64 of shape (2, 4)"),
        (torch.zeros(4, dtype=torch.int32), 4, 32, "`codes` is torch.int32 of shape (4,)"),
        (
            torch.zeros(2, 4, dtype=torch.int32),
            8,
            16,
            "`num_bits` is 8; expected one of (2, 3, 4).",
        ),
    ],
)
def test_unpack_names_what_is_wrong(packed, num_bits, K, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        unpack_codes(packed, num_bits, K)
