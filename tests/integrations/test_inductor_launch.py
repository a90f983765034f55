"""What inductor generates of a decoder's pieces for a GPU that launches dependently, without one.

The order of waits, loads and stores is what makes dependent launches safe (ARCHITECTURE.md,
"Dependent launches in vLLM"): a torch that orders them otherwise fails here.
"""

from __future__ import annotations

import contextlib
import re
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton

from flute.integrations.inductor_norms import OnePassNorms

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")

WIDTH, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
QKV = (HEADS + 2 * KV_HEADS) * HEAD
CUDA = torch.device("cuda", 0)
HOPPER = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)
LIBRARY = torch.library.Library("flute_test", "FRAGMENT")
LIBRARY.define("product(Tensor x, int n) -> Tensor")
LIBRARY.impl("product", lambda x, n: x.new_empty(len(x), n), "Meta")


# ---- a decoder's pieces, as vLLM has them between two attentions


def product(x, n):
    """Of another's kernel, as `flute::lut_gemm` is to inductor."""
    return torch.ops.flute_test.product.default(x, n)


def norm(x, residual, weight):
    x = x.float() if residual is None else x.float() + residual.float()
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (x * scale).half() * weight, x.half()


def rotate(x, table, heads):
    cos, sin = (part[:, None] for part in table.chunk(2, -1))
    a, b = x.view(len(x), heads, HEAD).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(1)


def queries(x, cache, positions, norms=()):
    q, k, v = product(x, QKV).split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
    for weight in norms:
        q, k = (norm(part.reshape(-1, HEAD), None, weight)[0].view(part.shape) for part in (q, k))
    table = cache.index_select(0, positions)
    return rotate(q, table, HEADS), rotate(k, table, KV_HEADS), v


def middle(attended, residual, weight, cache, positions, *norms):
    x, residual = norm(product(attended, WIDTH), residual, weight)
    both = product(x, 2 * INNER)
    x = product(F.silu(both[:, :INNER]) * both[:, INNER:], WIDTH)
    x, residual = norm(x, residual, weight)
    return residual, *queries(x, cache, positions, norms)


def first(tokens, embedding, weight, cache, positions):
    residual = F.embedding(tokens, embedding)
    x, _ = norm(residual, None, weight)
    return residual, *queries(x, cache, positions)


# ---- inductor's code for it


class Kernel(NamedTuple):
    """One branch of a kernel: its accesses of memory and control of launches, in order."""

    name: str
    accesses: list[str]


def on_cuda(mode, value):
    """A fake tensor as it would be on a GPU; others as they are."""
    if isinstance(value, (tuple, list)):
        return type(value)(on_cuda(mode, part) for part in value)
    if not isinstance(value, FakeTensor):
        return value
    with in_kernel_invocation_manager(mode):
        shape = (value.shape, value.stride())
        meta = torch.empty_strided(*shape, dtype=value.dtype, device="meta")
    return FakeTensor(mode, meta, CUDA)


def generate(piece, inputs, mode):
    """Return the kernels that inductor writes for a piece on an H200."""
    graph_module = make_fx(piece, select_decomp_table())(*inputs)
    for node in graph_module.graph.nodes:
        node.meta["val"] = on_cuda(mode, node.meta.get("val"))
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    given = [on_cuda(mode, x) for x in inputs]
    driver = MagicMock(get_current_target=lambda: compiler.GPUTarget("cuda", 90, 32))
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        for name, value in (
            ("torch.cuda.is_available", lambda: True),
            ("torch.cuda.current_device", lambda: 0),
            ("torch.cuda.device_count", lambda: 1),
            ("torch.cuda.get_device_capability", lambda *_: (9, 0)),
            ("torch.cuda.get_device_properties", lambda *_: MagicMock(major=9, minor=0)),
            ("torch._inductor.runtime.hints.DeviceProperties.create", lambda *_: HOPPER),
        ):
            enter(patch(name, value))
        enter(patch.object(triton.runtime.driver, "_active", driver))
        stack.callback(has_triton.cache_clear)  # for those who ask later, without this GPU
        has_triton.cache_clear()
        options = {"triton.enable_pdl": True, "combo_kernels": True, "compile_threads": 1}
        enter(inductor.patch(options))
        enter(V.set_choices_handler(OnePassNorms()))
        enter(V.set_fake_mode(mode))
        enter(V.set_debug_handler(MagicMock()))
        post_grad_passes(graph_module, True)
        graph_module.recompile()
        graph = GraphLowering(graph_module, given, mode.shape_env, is_inference=True)
        enter(V.set_graph_handler(graph))
        graph.run(*given)
        code = graph.codegen()[0].value
    found = []
    for text in code.split("@triton.jit")[1:]:
        source = text.split("'''")[0]
        name = re.search(r"def (\w+)", source)[1]
        for branch in re.split(r"\n    (?:if|elif|else)\b.*:\n", source)[1:-1] or [source]:
            pattern = r"gdc_wait|gdc_launch_dependents|tl\.load\(\w+|tl\.store"
            found.append(Kernel(name, re.findall(pattern, branch)))
    return found


@pytest.fixture
def mode():
    return FakeTensorMode()


def inputs_of(mode, M):
    with mode:
        rows = [torch.empty(M, WIDTH, dtype=torch.float16) for _ in range(2)]
        cache = torch.empty(8192, HEAD, dtype=torch.float16)
        weight = torch.empty(WIDTH, dtype=torch.float16)
        return [*rows, weight, cache, torch.empty(M, dtype=torch.int64)]


def check_waits_first(kernel):
    assert kernel.accesses[0] == "gdc_wait", kernel
    assert kernel.accesses.count("gdc_launch_dependents") == 1, kernel
    launch = kernel.accesses.index("gdc_launch_dependents")
    before, after = kernel.accesses[1:launch], kernel.accesses[launch + 1 :]
    assert {access[:7] for access in before} == {"tl.load"}, kernel
    assert set(after) == {"tl.store"}, kernel


@pytest.mark.parametrize("M", [1, 5, 512])
def test_kernels_behind_products_wait_first_and_let_go_before_they_sum(mode, M):
    kernels = generate(middle, inputs_of(mode, M), mode)
    assert len(kernels) == 5  # two norms, an activation, rope of q and of k
    for kernel in kernels:
        check_waits_first(kernel)


def test_the_first_piece_waits_for_what_is_in_front_of_it(mode):
    _, _, weight, cache, positions = inputs_of(mode, 1)
    with mode:
        tokens = torch.empty(1, dtype=torch.int32)
        embedding = torch.empty(128256, WIDTH, dtype=torch.float16)
    kernels = generate(first, [tokens, embedding, weight, cache, positions], mode)
    assert len(kernels) == 3
    for kernel in kernels:
        check_waits_first(kernel)


def test_behind_a_kernel_of_inductor_s_one_load_may_come_first(mode):
    """So rope behind Qwen3's norms: of qkv, which the product in front of those has written."""
    given = inputs_of(mode, 1)
    with mode:
        given += [torch.empty(HEAD, dtype=torch.float16)]
    kernels = generate(middle, given, mode)
    early = [kernel for kernel in kernels if kernel.accesses[0] != "gdc_wait"]
    for kernel in kernels:
        wait, launch = map(kernel.accesses.index, ("gdc_wait", "gdc_launch_dependents"))
        assert wait <= 1, kernel
        assert wait < launch < kernel.accesses.index("tl.store"), kernel
    assert {kernel.accesses[0] for kernel in early} == {"tl.load(in_ptr0"}
    assert len({kernel.name for kernel in early}) == 1
