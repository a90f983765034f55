"""CPU kernels: variants against fp64 and the reference's bits, special values, extremes; layers."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, generator, packed_weight, random_weight, relative_error, run_python
from torch import nn

import flute
from flute import reference
from flute.cpu import library as cpu
from flute.cpu import products
from flute.errors import FormatError, UnsupportedProblemError
from flute.format import QuantizedWeight, QuantSpec
from flute.linear import LutLinear
from flute.ops import path_of

pytestmark = pytest.mark.usefixtures("cpu_kernels")
SPECS = [QuantSpec(b, g) for b in (2, 3, 4) for g in (32, 64, 128, 256, -1)]
TABLES = {
    "one": {},
    "per row": {"per_row": True},
    "ranges of tiles": {"table_ends": (16, 21)},
    "ranges": {"table_ends": (5, 21)},
}
ERROR = {torch.float32: 5e-4, torch.bfloat16: 4e-3, torch.float16: 8e-4}
"""Of fixed point: 5e-4, and the rounding of the result."""
EXACT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def variants():
    library = cpu._library()
    return () if isinstance(library, str) else library.usable


def ordered(weight, exact=False):
    packed = packed_weight(weight)
    codes, scales = products.order(packed, exact)
    return packed._replace(packed=codes, scales=scales)


def columns(spec):
    return 77 if spec.group_size == -1 else 256


def exact_product(x, weight, bias=None):
    """In fp64; the table rounded to the dtype of x."""
    table = weight.table.to(x.dtype).float()
    rounded = QuantizedWeight(weight.codes, weight.scales, table, weight.spec, weight.table_ends)
    values = reference.dequantize(rounded, torch.float32)
    out = x.double() @ values.double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_order_is_undone_and_dequantised_bit_for_bit(spec, tables, monkeypatch):
    for scale_dtype in DTYPES:
        weight = random_weight(21, columns(spec), spec, scale_dtype=scale_dtype, **TABLES[tables])
        stored, in_order = packed_weight(weight), ordered(weight)
        restored = products.restore(in_order)
        assert torch.equal(restored.packed, stored.packed)
        assert torch.equal(restored.scales, stored.scales)
        for name in variants():
            monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
            for dtype in DTYPES:
                out = products.dequantize(in_order, dtype)
                assert torch.equal(out, reference.dequantize(weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_by_all_variants(spec, tables, dtype, monkeypatch):
    K = columns(spec)
    weight = random_weight(21, K, spec, **TABLES[tables])
    in_order, bias = ordered(weight), torch.randn(21, generator=generator(1))
    for M in range(11):
        x = torch.randn(M, K, generator=generator(M, K)).to(dtype)
        exact = exact_product(x, weight, bias)
        outs = []
        for name in variants():
            monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
            monkeypatch.delenv("FLUTE_CPU_EXACT", raising=False)
            outs.append(products.multiply(x, in_order, bias))
            # Ratios of norms vary by a few tens of percent for 21 rows.
            assert relative_error(outs[-1], exact) <= 1.3 * ERROR[dtype]
            monkeypatch.setenv("FLUTE_CPU_EXACT", "1")
            assert relative_error(products.multiply(x, in_order, bias), exact) <= EXACT_ERROR[dtype]
        if M <= 8:  # with more, which of the two ways is faster depends on the CPU
            assert all(torch.equal(out, outs[0]) for out in outs), "results depend on the variant"
        if 0 < M <= 8:  # nor does a token depend on its neighbours
            alone = products.multiply(x[-1:], in_order, bias)
            assert torch.equal(alone, products.multiply(x, in_order, bias)[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_many_tokens(num_bits, tables, dtype, monkeypatch):
    """By kernels, in calls of up to 32, and by dequantised rows: K leaves parts of a unit over."""
    weight = random_weight(21, 333, QuantSpec(num_bits, -1), **TABLES[tables])
    in_order, x = ordered(weight), torch.randn(75, 333, generator=generator(1)).to(dtype)
    exact = exact_product(x, weight)
    for name in variants():
        monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
        for direct in (0, 100):
            monkeypatch.setattr(cpu, "direct_m", lambda direct=direct: direct)
            out = products.multiply(x, in_order, None)
            assert relative_error(out, exact) <= 1.3 * max(ERROR[dtype], 5e-4)
            if direct:
                for rows in (slice(31, 33), slice(64, 75)):  # nor does it depend on the call
                    assert torch.equal(out[rows], products.multiply(x[rows], in_order, None))


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_several_weights_at_once_are_as_one_by_one(num_bits):
    spec = QuantSpec(num_bits, 64)
    weights = [ordered(random_weight(N, 256, spec, seed=N)) for N in (21, 16, 48)]
    biases = [torch.randn(21, generator=generator(1)), None, torch.randn(48).half()]
    for M in (0, 1, 3, 40):
        x = torch.randn(M, 256, generator=generator(M)).bfloat16()
        outs = products.multiply_all(x, weights, biases)
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            assert torch.equal(out, products.multiply(x, weight, bias))


@pytest.mark.parametrize("kind", ["nf", "int", "fp"])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_error_of_fixed_point_on_real_tables(num_bits, kind):
    dense = torch.randn(256, 1024, generator=generator(num_bits))
    dense[:, 7] *= 30
    for group_size in (32, 128, -1):
        weight = flute.quantize(dense, method=kind, num_bits=num_bits, group_size=group_size)
        for outlier in (1, 10, 1000, 1e6):
            x = torch.randn(4, 1024, generator=generator(3))
            x[:, ::100] *= outlier
            out = products.multiply(x, ordered(weight), None)
            assert relative_error(out, exact_product(x, weight)) <= 5e-4


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_largest_sums_do_not_overflow(spec, sign, monkeypatch):
    """All codes are the largest entry and all x of a block are its largest: the bound is met."""
    K = 1024
    codes = torch.full((16, K), spec.num_entries - 1, dtype=torch.uint8)
    table = torch.zeros(1, spec.num_entries)
    table[0, -1] = sign
    scales = torch.ones(16, spec.num_groups(K))
    in_order = ordered(QuantizedWeight(codes, scales, table, spec))
    for name in variants():
        monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
        for value in (1.0, -3.0):
            out = products.multiply(torch.full((2, K), value), in_order, None)
            assert relative_error(out, torch.full((2, 16), sign * value * K)) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tables", ["one", "per row"])
@pytest.mark.parametrize("M", [3, 41])
def test_inf_and_nan_travel_as_in_torch(M, value, dtype, tables, monkeypatch):
    weight = random_weight(21, 256, QuantSpec(4, 64), **TABLES[tables])
    x = torch.randn(M, 256, generator=generator(1)).to(dtype)
    x[1, 77] = value
    dense = F.linear(x, reference.dequantize(weight, dtype))
    finite = ordered(weight)
    for name in variants():
        monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
        out = products.multiply(x, finite, None)
        assert torch.equal(out.isnan(), dense.isnan())
        assert torch.equal(out[out.isinf()], dense[dense.isinf()])
        assert not bool(out[1].isfinite().any())
        if cpu.direct_m() >= M:  # else torch sums, and its order depends on how many there are
            assert torch.equal(out[::2], products.multiply(x[::2], finite, None))


def test_an_old_cpu_runs_plain_c(monkeypatch):
    """Of one without the instructions of any variant, the library says that only plain C runs."""
    library = cpu._library()
    monkeypatch.setattr(cpu, "_library", lambda: library._replace(usable=("scalar",)))
    assert (cpu.variant(), cpu.direct_m()) == ("scalar", 8)
    assert cpu.describe().startswith("scalar (of scalar)")
    weight = random_weight(21, 256, QuantSpec(4, 64))
    x = torch.randn(20, 256, generator=generator(1))
    assert (
        relative_error(products.multiply(x, ordered(weight), None), exact_product(x, weight))
        <= 5e-4
    )
    monkeypatch.setenv("FLUTE_CPU_VARIANT", "avx512")
    with pytest.raises(UnsupportedProblemError, match=r"expected one of \('none', 'scalar'\)"):
        cpu.variant()


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_batches_of_size_zero(leading):
    _, layer = layer_of()
    out = layer(torch.zeros(*leading, 256))
    assert layer.cpu_order
    assert out.shape == (*leading, 21)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_numbers_at_the_ends_of_fp32(size):
    weight = random_weight(21, 256, QuantSpec(3, 64))
    x = torch.randn(2, 256, generator=generator(2)) * size
    assert (
        relative_error(products.multiply(x, ordered(weight), None), exact_product(x, weight))
        <= 5e-4
    )
    assert bool((products.multiply(x * 0, ordered(weight), None) == 0).all())


def test_a_table_that_16_bits_cannot_hold_is_exact():
    """One huge entry that no code uses would leave no digits to the others."""
    weight = random_weight(32, 256, QuantSpec(4, 64))
    weight.codes.clamp_(max=14)
    weight.table[0, 15] = 1e6
    x = torch.randn(2, 256, generator=generator(2))
    assert (
        relative_error(products.multiply(x, ordered(weight), None), exact_product(x, weight))
        <= 1e-6
    )
    weight.table.zero_()
    assert bool((products.multiply(x, ordered(weight), None) == 0).all())


def test_x_and_bias_of_odd_strides():
    weight = random_weight(21, 256, QuantSpec(4, 64))
    in_order = ordered(weight)
    x = torch.randn(4, 256, generator=generator(4))
    bias = torch.randn(42, generator=generator(5)).double()[::2]
    expected = products.multiply(x, in_order, bias.float())
    wide = torch.stack((x, torch.full_like(x, torch.nan)), -1)
    memory = torch.empty(4 * 256 + 1)
    memory[1:].view(4, 256).copy_(x)
    for strided in (x.T.contiguous().T, wide[..., 0], memory[1:].view(4, 256), x.flip(0).flip(0)):
        assert torch.equal(products.multiply(strided, in_order, bias), expected)
    assert torch.equal(
        products.multiply(x[:1].expand(4, 256), in_order, bias), expected[:1].expand(4, 21)
    )


@pytest.mark.parametrize("M", [1, 8])
def test_equal_for_any_number_of_threads(M):
    weight = random_weight(1000, 512, QuantSpec(4, 64))
    in_order, x = ordered(weight), torch.randn(M, 512, generator=generator(M))
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs += [products.multiply(x, in_order, None) for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_exact_by_argument_and_by_environment(monkeypatch):
    weight = random_weight(21, 256, QuantSpec(4, 64))
    x = torch.randn(2, 256, generator=generator(2))
    exact = exact_product(x, weight)
    assert relative_error(products.multiply(x, ordered(weight), None), exact) > 1e-6
    assert relative_error(products.multiply(x, ordered(weight, exact=True), None), exact) <= 1e-6
    model = nn.Sequential(LutLinear.from_quantized(weight))
    assert flute.prepare(model, exact=True) == 1
    assert relative_error(model(x), exact) <= 1e-6
    monkeypatch.setenv("FLUTE_CPU_EXACT", "1")
    assert relative_error(products.multiply(x, ordered(weight), None), exact) <= 1e-6


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for large pages")
def test_codes_of_a_large_weight_begin_at_a_large_page():
    weight = random_weight(2048, 4096, QuantSpec(4, 128))
    in_order = ordered(weight)
    assert in_order.packed.data_ptr() % (2 << 20) == 0
    assert torch.equal(products.restore(in_order).packed, packed_weight(weight).packed)


# ---- layers


def layer_of(spec=SPECS[-1], N=21, K=256, **kwargs):
    weight = random_weight(N, K, spec, **kwargs)
    return weight, LutLinear.from_quantized(weight, torch.randn(N, generator=generator(N)))


@pytest.mark.parametrize("tables", TABLES)
def test_a_layer_changes_order_and_back(tables):
    weight, layer = layer_of(QuantSpec(3, 64), **TABLES[tables])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(3, 256, generator=generator(1))
    out = layer(x)
    assert layer.cpu_order
    assert relative_error(out, exact_product(x, weight, layer.bias)) <= 6e-4
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(layer.dequantize(), reference.dequantize(weight))
    assert torch.equal(layer.quantized_weight().codes, weight.codes)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert not other.cpu_order
        assert torch.equal(other(x), out)
    layer.load_state_dict(before)
    assert not layer.cpu_order
    assert torch.equal(layer(x), out)
    assert torch.equal(layer.half().float()(x), layer(x))
    layer.to("meta")
    assert (layer.codes.dtype, layer.codes.ndim) == (torch.int32, 2)


def test_parameters_put_in_anew_are_reordered():
    _, layer = layer_of()
    other, fresh = layer_of(seed=1)
    x = torch.randn(2, 256, generator=generator(1))
    layer(x)
    for name in ("codes", "scales", "table"):
        setattr(layer, name, nn.Parameter(getattr(fresh, name).data, requires_grad=False))
    assert not layer.cpu_order
    assert relative_error(layer(x), exact_product(x, other, layer.bias)) <= 6e-4
    assert layer.cpu_order


@pytest.mark.parametrize("M", [2, 20])
def test_gradients(M):
    weight, layer = layer_of()
    x = torch.randn(M, 256, generator=generator(1)).requires_grad_()
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.cpu_order
    rows = reference.dequantize(weight).sum(0).expand(M, 256)
    assert relative_error(x.grad, rows) <= 1e-5
    assert torch.equal(layer.bias.grad, torch.full((21,), float(M)))


def test_compiled_and_exported():
    _, layer = layer_of()
    torch._dynamo.reset()
    flute.prepare(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 256, generator=generator(1))
    for M in (1, 4, 9, 0):
        assert torch.equal(compiled(x[:M]), layer(x[:M]))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(x[:4]), layer(x[:4]))


def test_the_layers_mark_for_dynamo_is_that_of_torch():
    """It is set by hand, since torch's decorator imports dynamo."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked)
    assert vars(marked).items() <= vars(LutLinear._settle_traced).items()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_without_prepare_runs_kernels(fullgraph):
    expected = layer_of()[1]
    layers = [layer_of()[1] for _ in range(2)]
    torch._dynamo.reset()
    x = torch.randn(3, 256, generator=generator(1))
    for layer in layers:  # the second meets code that is compiled already
        compiled = torch.compile(layer, fullgraph=fullgraph, backend="aot_eager")
        assert torch.equal(compiled(x), expected(x))
        assert layer.cpu_order
        assert torch.equal(compiled(x[:1]), expected(x[:1]))
        state = layer.state_dict()
        layer.load_state_dict(state)  # back in the order of storage
        assert not layer.cpu_order
        assert torch.equal(compiled(x), expected(x))
        assert layer.cpu_order


@pytest.mark.parametrize("strict", [True, False])
def test_exported_without_prepare(strict):
    weight, layer = layer_of()
    x = torch.randn(3, 256, generator=generator(1))
    program = torch.export.export(layer, (x,), strict=strict)
    out = program.module()(x)
    assert relative_error(out, exact_product(x, weight, layer.bias)) <= 6e-4
    assert relative_error(layer(x), exact_product(x, weight, layer.bias)) <= 6e-4


def test_the_op():
    _, layer = layer_of()
    flute.prepare(layer)
    x = torch.randn(3, 256, generator=generator(1))
    parts = (layer.codes.data, layer.scales.data, layer.table.data)
    args = (x, *parts, None, 4, -1, 21)
    result = torch.library.opcheck(torch.ops.flute.lut_gemm.default, args)
    assert set(result.values()) == {"SUCCESS"}
    with pytest.raises(FormatError, match="in CPU order for N=40"):
        torch.ops.flute.lut_gemm(*args[:-1], 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_weights_without_elements_stay_plain():
    for N, K in ((0, 64), (5, 0)):
        weight = random_weight(N, K, QuantSpec(4, 32))
        layer = LutLinear.from_quantized(weight)
        assert layer(torch.zeros(3, K)).shape == (3, N)
        assert not layer.cpu_order


def test_forward_mode_is_refused_by_a_layer_not_called_before():
    _, layer = layer_of()
    x = torch.randn(2, 256, generator=generator(1))
    with pytest.raises(UnsupportedProblemError, match="forward-mode"):
        torch.func.jvp(layer, (x,), (x,))


def test_which_path_runs_is_told(monkeypatch):
    cpu_device = torch.device("cpu")
    for name in variants():
        monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
        assert f"{name} kernels, fixed point" in path_of(cpu_device, torch.bfloat16)
        assert cpu.describe().startswith(name)
    monkeypatch.setenv("FLUTE_CPU_VARIANT", "none")
    assert "reference (PyTorch)" in path_of(cpu_device, torch.bfloat16)
    assert cpu.describe() == "none: FLUTE_CPU_VARIANT is 'none'"
    monkeypatch.setenv("FLUTE_CPU_VARIANT", "sse9")
    with pytest.raises(UnsupportedProblemError, match=r"FLUTE_CPU_VARIANT='sse9'; expected one of"):
        cpu.variant()


NO_COMPILER = """
import warnings, torch, flute
layer = flute.LutLinear.from_quantized(flute.quantize(torch.eye(64), group_size=32))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        out = layer(torch.eye(64))
    flute.prepare(layer)
    flute.LutLinear.from_quantized(flute.quantize(torch.eye(64), group_size=32))(torch.eye(64))
assert torch.equal(out.T, layer.dequantize()) and not layer.cpu_order
for warning in seen:
    print(warning.message)
"""


def test_without_a_compiler_torch_multiplies_and_one_warning_says_so(tmp_path):
    environment = {"PATH": str(tmp_path), "CC": "no-such-compiler", "FLUTE_CPU_VARIANT": ""}
    out = run_python(NO_COMPILER, FLUTE_CACHE_DIR=str(tmp_path / "cache"), **environment)
    assert out.count("slow path (PyTorch, in float32)") == 1
    assert "no C compiler (cc, gcc or clang) is on PATH; CC=no-such-compiler is not to be" in out
    assert len(out.splitlines()) == 1


def test_accelerate_may_offload_a_layer_that_has_run():
    """It brings back what the state dict holds, so the parameters must have that shape."""
    from accelerate import cpu_offload

    weight = random_weight(32, 256, QuantSpec(4, 64))
    model = torch.nn.Sequential(LutLinear.from_quantized(weight))
    x = torch.randn(3, 256, generator=generator(0))
    expected = model(x)
    assert model[0].cpu_order
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].codes.device.type == "meta"
    assert model[0].codes.shape == (32, 32)
    assert relative_error(model(x), expected.double()) < 5e-4
