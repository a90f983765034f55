"""Kernels on a GPU: the three oracles, repetition, graphs, streams, compilation, saving."""

from __future__ import annotations

import copy
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DEMO_MODEL, TOLERANCE, random_weight, relative_error

import flute
from flute import cuda, launchers
from flute.device import gpu_of
from flute.errors import UnsupportedProblemError
from flute.format import PackedWeight, QuantizedWeight, QuantSpec, table_per_row
from flute.jit.cache import load_or_compile
from flute.plans import KernelPlan, SplitPlan
from flute.stream import quantize_checkpoint

CUDA = torch.device("cuda")
KS = [32, 64, 96, 160, 256, 512, 1024, 3584, 4096, 4608, 11008]
NS = [1, 2, 15, 16, 17, 33, 100, 127, 256, 500, 1000, 2049]
MS = [1, 1, 2, 3, 5, 8, 9, 16, 17, 24, 31, 32, 33, 64, 65, 96, 97, 130, 200, 300, 600, 2100]


def make(N, K, spec, *, bias=None, **kwargs):
    """A random layer on the GPU, in kernel order."""
    layer = flute.LutLinear.from_quantized(random_weight(N, K, spec, **kwargs), bias).to(CUDA)
    layer.to_kernel_order()
    layer._settled = True
    return layer


def random_case(rng):
    """Arguments of `check`."""
    group = rng.choice([32, 64, 128, 256, -1])
    K = rng.choice([k for k in KS if group == -1 or k % group == 0])
    spec, dtype = QuantSpec(rng.choice([2, 3, 4]), group), rng.choice(list(TOLERANCE)[:2])
    scale_dtype = rng.choice([dtype, dtype, torch.float32])
    M, N, with_bias = rng.choice(MS), rng.choice(NS), rng.random() < 0.3
    tables = rng.choice(["one", "one", "row", "ranges"])
    if tables == "ranges":
        whole = range(16, N, 16)
        tables = (*sorted(rng.sample(whole, min(len(whole), rng.randrange(8)))), N)
    return spec, dtype, scale_dtype, tables, with_bias, rng.randrange(1 << 30), M, N, K


def tables_of(tables):
    """What `random_weight` takes for the tables of a case."""
    return {"table_ends": tables} if isinstance(tables, tuple) else {"per_row": tables == "row"}


def compile_for(cases):
    """Fill the cache of compiled kernels, in parallel."""
    gpu, sources = gpu_of(torch.device("cuda", 0)), {}
    for spec, dtype, scale_dtype, tables, _, _, M, N, K in cases:
        scales, table = torch.empty(0, dtype=scale_dtype), torch.empty(1 + (tables == "row"), 0)
        ends = tables if isinstance(tables, tuple) else ()
        weight = PackedWeight(scales, scales, table, spec, N, K, ends)
        problem = launchers.problem_of(weight, M, dtype)
        sources[launchers.dequantize_source(problem)] = None
        plan = launchers.choose(problem, weight.table_ends, gpu)
        sizes = [M]
        if isinstance(plan, SplitPlan):
            sizes = [m for m in (plan.tokens, M % plan.tokens) if m]
        for m in sizes:
            plan = launchers.choose(problem._replace(m=m), weight.table_ends, gpu)
            if isinstance(plan, KernelPlan):
                sources[launchers.source_of(plan)] = None
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(lambda source: load_or_compile(source, gpu.arch), sources))
    return len(sources)


def check(spec, dtype, scale_dtype, tables, with_bias, seed, M, N, K):
    """The oracles on one problem; returns what broke."""
    bias = torch.randn(N).to(dtype) if with_bias else None
    kind = tables_of(tables)
    layer = make(N, K, spec, bias=bias, scale_dtype=scale_dtype, seed=seed, **kind)
    dense = layer.dequantize(dtype)
    if not torch.equal(cuda.dequantize(layer.packed_weight(), dtype), dense):
        return "dequantise"
    x = torch.randn(M, K, device=CUDA).to(dtype)
    out = layer(x)
    if not torch.equal(out, layer(x)):
        return "repetition"
    rounded = layer.table.to(dtype).double()
    if layer.table_ends:
        rounded = table_per_row(rounded, layer.table_ends)
    values = rounded.expand(N, -1).gather(1, layer.quantized_weight().codes.long())
    groups = spec.num_groups(K)
    scales = layer._plain().scales.double()
    exact = x.double() @ (values.view(N, groups, -1) * scales[..., None]).flatten(1).T
    theirs = torch.nn.functional.linear(x, dense, layer.bias)
    if bias is not None:
        exact = exact + layer.bias.double()
    error, other = relative_error(out, exact), relative_error(theirs, exact)
    if error > TOLERANCE[dtype] or (error > 1.5 * other and M * N > 200):
        return f"error {error:.2e} against {other:.2e}"
    if bias is None:
        picked = torch.randint(0, K, (M,), device=CUDA)
        eye = torch.nn.functional.one_hot(picked, K).to(dtype)
        if not torch.equal(layer(eye), dense[:, picked].T):
            return "identity"
    return ""


def test_random_problems_by_the_three_oracles():
    rng, failures = random.Random(0), []
    cases = [random_case(rng) for _ in range(220)]
    compile_for(cases)
    for case in cases:
        broken = check(*case)
        if broken:
            failures.append((broken, case))
    assert not failures, (len(failures), failures[:10])


@pytest.mark.parametrize("K", [32, 160, 256, 2304, 3584])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_ranks_of_a_cluster_with_unequal_shares_of_k(num_bits, K):
    """Narrow weights take clusters of two blocks; with one panel, or an odd number, K splits so."""
    for N in (2048, 2049):
        case = (QuantSpec(num_bits, -1), torch.float16, torch.float16, "one", True, N + K, 1, N, K)
        assert check(*case) == ""


def test_many_tokens_are_slabs_of_the_same_product():
    M, N, K = 5000, 1000, 8192
    layer = make(N, K, QuantSpec(3, 128), bias=torch.randn(N).half())
    x = torch.randn(M, K, device=CUDA).half()
    problem = launchers.problem_of(layer.packed_weight(), M, torch.float16)
    assert launchers.choose(problem, (), gpu_of(torch.device("cuda", 0))) == SplitPlan(2560)
    expected = torch.nn.functional.linear(x, layer.dequantize(torch.float16), layer.bias)
    assert relative_error(layer(x), expected.double()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("M", [1, 8, 16, 32, 40, 100])
def test_inf_and_nan_pass_as_in_torch(M):
    layer = make(100, 512, QuantSpec(4, 64))
    x = torch.randn(M, 512, device=CUDA).half()
    x[0, 7], x[-1, 300] = float("inf"), float("nan")
    expected = x.double() @ layer.dequantize(torch.float16).double().T
    out = layer(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("M", [1, 13])
def test_repeated_on_two_streams_at_once(M):
    layer = make(1000, 4096, QuantSpec(3, 128))
    x = torch.randn(M, 4096, device=CUDA).half()
    expected = layer(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outs = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 2]):
            outs.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


ENDS = [
    (16, 33),
    (16, 32, 48),
    (16, 48, 64, 500),
    (1024, 1280, 1536),
    tuple(range(16, 129, 16)),
    (16, 32, 48, 64, 80, 96, 112, 1000),
]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("num_bits", "M"), [(4, 1), (3, 5), (2, 16), (4, 33), (2, 1), (3, 100)])
def test_a_table_per_range_of_rows(num_bits, M, ends):
    """Each range is that of a layer of the same size with its table alone."""
    N, spec = ends[-1], QuantSpec(num_bits, 64)
    weight = random_weight(N, 1024, spec, table_ends=ends, scale_dtype=torch.float16)
    layer = flute.LutLinear.from_quantized(weight).to(CUDA)
    layer.to_kernel_order()
    x = torch.randn(M, 1024, device=CUDA).half()
    out = layer(x)
    dense = cuda.dequantize(layer.packed_weight(), torch.float16)
    assert torch.equal(dense.cpu(), flute.dequantize(weight, torch.float16))
    start = 0
    for table, end in zip(weight.table, ends, strict=True):
        alone = QuantizedWeight(weight.codes, weight.scales, table[None], spec)
        single = flute.LutLinear.from_quantized(alone).to(CUDA)
        ours, theirs = out[:, start:end], single(x)[:, start:end]
        if M <= 16:  # of more, ranges that end within 64 rows take another kernel
            assert torch.equal(ours, theirs)
        else:
            assert relative_error(ours, theirs.double()) <= TOLERANCE[torch.float16]
        start = end
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("M", [1, 7, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_three_layers_in_one(M, bias):
    spec = QuantSpec(4, 128)
    layers = []
    for i, N in enumerate((64, 16, 21)):
        weight = random_weight(N, 512, spec, seed=i, scale_dtype=torch.float16)
        b = torch.randn(N).half() if bias else None
        layers.append(flute.LutLinear.from_quantized(weight, b).to(CUDA))
    fused = flute.LutLinear.concat(layers)
    assert fused.table_ends == (64, 80, 101)
    x = torch.randn(M, 512, device=CUDA).half()
    assert torch.equal(fused(x), torch.cat([layer(x) for layer in layers], -1))
    assert fused.kernel_order
    compiled = torch.compile(fused, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(compiled(x).clone(), fused(x))


def test_ranges_that_kernels_do_not_take_get_a_table_per_row():
    weight = random_weight(40, 256, QuantSpec(4, 64), table_ends=(3, 40), scale_dtype=torch.float16)
    layer = flute.LutLinear.from_quantized(weight).to(CUDA)
    x = torch.randn(2, 256, device=CUDA).half()
    assert flute.prepare(layer, dtype=torch.float16) == 1
    exact = x.double() @ flute.dequantize(weight, torch.float16).to(CUDA).double().T
    assert relative_error(layer(x), exact) <= TOLERANCE[torch.float16]


def test_threads_on_streams_of_their_own():
    """The layer is the first that these threads do on the GPU; each has its own x."""
    layer = make(1000, 4096, QuantSpec(4, 128), scale_dtype=torch.float16)
    xs = [torch.randn(1 + i % 2, 4096, device=CUDA).half() for i in range(4)]
    expected = [layer(x) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    wrong, barrier = [], threading.Barrier(len(xs))

    def work(i):
        barrier.wait()
        first = layer(xs[i])  # on the default stream, with no context yet
        with torch.cuda.stream(streams[i]):
            outs = [layer(xs[i]) for _ in range(200)]
        streams[i].synchronize()
        torch.cuda.synchronize()
        wrong.extend(i for out in (first, *outs) if not torch.equal(out, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_are_as_of_any_operation():
    layer = make(40, 512, QuantSpec(4, 64))
    x = torch.randn(2, 512, device=CUDA).half()
    for _ in range(2):
        out = layer(x)
        assert (out.shape, out.stride(), out.device) == ((2, 40), (40, 1), x.device)
        assert not out.requires_grad
        assert out.add_(1)._version == 1
        with torch.inference_mode():
            assert layer(x).is_inference()
    layer(x[None])
    assert layer(x[None]).stride() == (80, 40, 1)
    free = torch.cuda.memory_allocated()
    for _ in range(50):
        layer(x)
    assert torch.cuda.memory_allocated() == free


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_layers_on_two_gpus():
    layers = [make(100, 512, QuantSpec(4, 64)).to(f"cuda:{i}") for i in range(2)]
    x = torch.randn(3, 512, device=CUDA).half()
    outs = [layer(x.to(layer.codes.device)) for layer in layers for _ in range(3)]
    assert all(torch.equal(out.to(CUDA), outs[0]) for out in outs)
    with pytest.raises(flute.FormatError, match="is on cuda:1; expected cuda:0"):
        layers[1](x)


@pytest.mark.parametrize(
    ("bits", "per_row", "M", "N", "K"),
    [
        (3, False, 8, 8192, 28672),
        (4, False, 1, 28672, 4096),
        (2, False, 8, 8192, 8192),
        (4, True, 1, 8192, 4096),
        (2, True, 5, 4096, 14336),
    ],
)
def test_large_problems_repeat(bits, per_row, M, N, K):
    """Copies into a slot must not overtake reads of it: seen in 4 % of runs, under load only."""
    layer = make(N, K, QuantSpec(bits, 128), per_row=per_row, scale_dtype=torch.float16)
    x = torch.randn(M, K, device=CUDA).half()
    expected = layer(x)
    exact = x.double() @ layer.dequantize(torch.float16).double().T
    assert relative_error(expected, exact) < TOLERANCE[torch.float16]
    assert sum(not torch.equal(layer(x), expected) for _ in range(200)) == 0


def test_odd_arguments():
    layer = make(33, 512, QuantSpec(4, 64))
    x = torch.randn(6, 1025, device=CUDA).half()
    view = x[:, 1:513]  # neither contiguous nor aligned
    assert torch.equal(layer(view), layer(view.contiguous()))
    flat = torch.randn(2 * 512 + 1, device=CUDA).half()[1:].view(2, 512)
    assert torch.equal(layer(flat), layer(flat.clone()))
    assert layer(x[:0, :512]).shape == (0, 33)
    assert layer(x[0, :512]).shape == (33,)
    assert layer(torch.randn(3, 512, device=CUDA)).dtype == torch.float32


def test_gradient_and_autocast():
    layer = make(64, 512, QuantSpec(4, 64))
    x = torch.randn(3, 512, device=CUDA).half().requires_grad_()
    layer(x).float().square().sum().backward()
    dense = layer.dequantize(torch.float16)
    y = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(y, dense).float().square().sum().backward()
    assert relative_error(x.grad, y.grad) < 5e-3
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer(x.detach().float()).dtype == torch.bfloat16


def chain():
    return torch.nn.Sequential(
        *(make(1024, 1024, QuantSpec(4, 128), seed=i, scale_dtype=torch.float16) for i in range(6))
    )


@pytest.mark.parametrize("M", [1, 8, 20])
def test_dependent_chain_in_a_graph(M):
    """Each kernel starts while the one before, which writes its x, still runs."""
    model = chain()
    x = torch.randn(M, 1024, device=CUDA).half() / 100
    eager = model(x)
    stepwise = x
    for layer in model:
        stepwise = layer(stepwise)
        torch.cuda.synchronize()
    assert torch.equal(eager, stepwise)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    for _ in range(20):
        x.copy_(torch.randn_like(x) / 100)
        graph.replay()
        captured = out.clone()
        assert torch.equal(captured, model(x))


def test_reduce_overhead():
    model = chain()
    x = torch.randn(2, 1024, device=CUDA).half() / 100
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        assert torch.equal(compiled(x).clone(), expected)


def test_capture_before_compiling_names_prepare():
    layer = make(48, 1312, QuantSpec(2, 32), scale_dtype=torch.float32, per_row=True)
    launchers._launchers.clear()
    launchers._functions.clear()
    x = torch.randn(1, 1312, device=CUDA).half()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UnsupportedProblemError, match=r"flute\.prepare"), torch.cuda.graph(graph):
        layer(x)
    assert flute.prepare(layer, dtype=torch.float16) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    graph.replay()
    assert torch.equal(out, layer(x))


def test_a_layer_changes_order_at_its_first_call_and_back():
    weight = random_weight(33, 512, QuantSpec(3, 64))
    layer, plain = (flute.LutLinear.from_quantized(weight) for _ in range(2))
    layer.to(CUDA)
    assert not layer.kernel_order
    layer(torch.randn(1, 512, device=CUDA))
    assert not layer.kernel_order  # fp32 takes no kernel
    layer(torch.randn(1, 512, device=CUDA).half())
    assert layer.kernel_order
    state = layer.state_dict()
    assert all(torch.equal(state[k].cpu(), v) for k, v in plain.state_dict().items())
    copied = copy.deepcopy(layer)
    assert not copied.kernel_order
    layer.cpu()
    assert torch.equal(layer.codes, plain.codes)
    assert torch.equal(layer.scales, plain.scales)
    ragged = flute.LutLinear.from_quantized(random_weight(9, 77, QuantSpec(4, -1))).to(CUDA)
    ragged(torch.randn(1, 77, device=CUDA).half())
    assert not ragged.kernel_order


def test_prepared_model_saved_and_moved(tmp_path):
    quantize_checkpoint(DEMO_MODEL, tmp_path / "q", device="cuda")
    model = flute.from_pretrained(tmp_path / "q", device_map="cuda")
    layers = [m for m in model.modules() if isinstance(m, flute.LutLinear)]
    assert all(layer.kernel_order for layer in layers)
    ids = torch.arange(40, device=CUDA)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = flute.from_pretrained(tmp_path / "saved", device_map="cuda")  # verifies checksums
    assert torch.equal(again(ids).logits, expected)
    model.cpu()
    fresh = flute.from_pretrained(tmp_path / "q", device_map="cpu")
    assert not any(layer.kernel_order for layer in layers)
    assert torch.equal(model(ids.cpu()).logits, fresh(ids.cpu()).logits)


def test_doctor_names_the_paths():
    from flute.ops import path_of

    path = path_of(torch.device("cuda", 0), torch.float16)
    assert "decode kernels for sm_" in path
    assert ("batch kernels" in path) == (torch.cuda.get_device_capability() == (9, 0))
    assert "slow; no kernels: kernels take 16-bit" in path_of(
        torch.device("cuda", 0), torch.float32
    )


def test_host_time_is_printed():
    layer = make(1024, 1024, QuantSpec(4, 128))
    x = torch.randn(1, 1024, device=CUDA).half()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(300):
                layer(x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(500):
                layer(x)
            host = (time.perf_counter() - start) / 500 * 1e6
            torch.cuda.synchronize()
        print(f"host time per call: layer {host:.1f} us (grad mode {grad})")  # noqa: T201
    N, parts = 1024, layer.packed_weight()
    for name, call in {
        "cuda.multiply": lambda: cuda.multiply(x, parts, None),
        "the op": lambda: torch.ops.flute.lut_gemm(x, *parts[:3], None, 4, 128, N),
        "torch.empty": lambda: x.new_empty(1, N),
    }.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            call()
        host = (time.perf_counter() - start) / 500 * 1e6
        torch.cuda.synchronize()
        print(f"host time per call: {name} {host:.1f} us")  # noqa: T201
