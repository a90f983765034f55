"""Other libraries' kernels for quantised weights, timed by the same protocol.

    name           weights, bits                          x            groups
    humming        uniform integers, 4, 3, 2              fp16, bf16   32 to 256
    marlin         uniform integers, 4                    fp16         128
    gemlite        uniform integers, 4 and 2              fp16, bf16   32 to 256
    bitsandbytes   nf4, a table of its own, 4             fp16, bf16   32 to 256, scales in fp32
    tinygemm       integers with scale and offset, 4      bf16         32 to 256; torch has it

Each library runs in a process of its own, so that one that hangs or fails leaves the others alone:

    bench -> cases, a line of JSON     peer -> {"case": i, "error": 4e-4}  as each is checked
                                       peer -> {"case": i, "note": "..."}  or why it is not timed
                                       peer -> {"ready": true}
    bench -> "go"                      peer -> {"case": i, "us": 8.9}      as each is timed

Checks of all libraries run side by side; timing is one library after the other. A weight is random;
a result that is further from fp64 on the library's own dequantised weight than its dtype excuses is
reported as wrong and not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
from protocol import Case, Oracle, by_weight, copies_of, time_us
from torch import Tensor

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Of the relative error. Ten times ours, since some sum in fp16 across blocks (GemLite: 4.5e-3 at
K = 14336); a weight in the wrong order is off by 1."""


class UnsupportedCaseError(Exception):
    """A library does not take a product; the message says why."""


@dataclass(frozen=True)
class Packed:
    """A random weight as a library keeps it.

    Args:
        tensors: what a copy of the weight consists of.
        run: ``run(x, *tensors)`` is the product, shape (m, N).
        dense: the weight exactly, fp32, shape (N, K).
        dtype: of x.
        prepare: compiles what ``m`` tokens need, if the library lets one do that ahead.
    """

    tensors: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    dense: Tensor
    dtype: torch.dtype
    prepare: Callable[[int], object] | None = None


@dataclass(frozen=True)
class Peer:
    """A library: the module it needs, and how a weight comes into its order."""

    module: str
    pack: Callable[[Case], Packed]


def need(rule: bool, why: str) -> None:
    if not rule:
        raise UnsupportedCaseError(why)


def random_codes(rows: int, columns: int, num_bits: int) -> Tensor:
    return torch.randint(0, 1 << num_bits, (rows, columns), dtype=torch.uint8, device="cuda")


def random_scales(*shape: int, dtype: torch.dtype) -> Tensor:
    """Positive, around 0.01, as of a model's weights."""
    return (torch.rand(*shape, device="cuda") * 0.01 + 0.005).to(dtype)


def uniform(codes: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """``(codes - 2**(num_bits - 1)) * scales`` in fp32; codes (N, K), scales (N, K / group)."""
    N, K = codes.shape
    centred = (codes.float() - (1 << (num_bits - 1))).view(N, scales.shape[1], -1)
    return centred.mul_(scales.float()[..., None]).view(N, K)


def pack_tinygemm(case: Case) -> Packed:
    need(case.num_bits == 4, "4 bits only")
    N, K, group, dtype = case.n, case.k, case.group_size, torch.bfloat16
    codes = random_codes(N, K, 4)
    scales = random_scales(N, K // group, dtype=dtype)
    offsets = torch.randn(N, K // group, device="cuda").mul_(0.01).to(dtype)
    dense = uniform(codes, scales, 4)
    dense.view(N, K // group, group).add_(offsets.float()[..., None])
    # The first code of a byte is the high one. 8: the widest of the inner tiles along K.
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    pairs = torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous()

    def run(x: Tensor, packed: Tensor, pairs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, group, pairs)

    return Packed((packed, pairs), run, dense, dtype)


def pack_bitsandbytes(case: Case) -> Packed:
    need(case.num_bits == 4, "4 bits only")
    import bitsandbytes as bnb

    weight = torch.randn(case.n, case.k, device="cuda").mul_(0.02)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=case.group_size, quant_type="nf4", compress_statistics=False
    )
    dense = bnb.functional.dequantize_4bit(packed, state)

    def run(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
        own = copy.copy(state)
        own.absmax = absmax
        return bnb.matmul_4bit(x, packed, quant_state=own)

    return Packed((packed, state.absmax), run, dense, case.torch_dtype)


def pack_marlin(case: Case) -> Packed:
    need(case.num_bits == 4, "4 bits only")
    need(case.group_size == 128, "groups of 128 or whole rows only")
    need(case.dtype == "float16", "fp16 only")
    import marlin

    N, K, group = case.n, case.k, case.group_size
    codes = random_codes(K, N, 4)
    scales = random_scales(K // group, N, dtype=torch.float16)
    dense = uniform(codes.T.contiguous(), scales.T, 4)
    words, ordered = marlin_order(codes, scales, marlin._perm, marlin._scale_perm)
    workspace = torch.zeros(N // 128 * 16, dtype=torch.int32, device="cuda")

    def run(x: Tensor, words: Tensor, scales: Tensor, workspace: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], N)
        marlin.mul(x, words, out, scales, workspace)
        return out

    return Packed((words, ordered, workspace), run, dense, torch.float16)


def marlin_order(
    codes: Tensor, scales: Tensor, order: Tensor, scale_order: list[int]
) -> tuple[Tensor, Tensor]:
    """Return int32 words (K / 16, 2 N) and scales (K / group, N), as `marlin.Layer.pack` does.

    That one packs on the CPU, minutes for a large matrix.

    Args:
        codes: uint8, shape (K, N).
        scales: fp16, shape (K / group, N).
        order: Marlin's order of the 1,024 codes of 64 x 16.
        scale_order: its order of 64 scales of a row.
    """
    K, N = codes.shape
    tiles = codes.view(K // 16, 16, N // 16, 16).transpose(1, 2).reshape(-1, 1024)
    tiles = tiles[:, order.to(codes.device)].view(K // 16, N * 2, 8)
    words = torch.zeros(K // 16, N * 2, dtype=torch.int32, device=codes.device)
    for i in range(8):
        words |= tiles[..., i].int() << 4 * i
    ordered = scales.reshape(-1, len(scale_order))[:, scale_order].reshape(-1, N)
    return words, ordered.contiguous()


def pack_gemlite(case: Case, tune: bool = False) -> Packed:
    need(case.num_bits in (4, 2), "4 and 2 bits only")
    import gemlite
    from gemlite import core
    from gemlite.triton_kernels.utils import get_closest_m

    if torch.cuda.get_device_capability() == (9, 0):  # it looks for its file by the GPU's name
        gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    N, K, group, bits = case.n, case.k, case.group_size, case.num_bits
    codes = random_codes(N, K, bits)
    scales = random_scales(N, K // group, dtype=case.torch_dtype)
    dense = uniform(codes, scales, bits)
    dtype = gemlite.DType.FP16 if case.dtype == "float16" else gemlite.DType.BF16
    layer = gemlite.GemLiteLinear(
        bits, group, in_features=K, out_features=N, input_dtype=dtype, output_dtype=dtype
    )
    layer.pack(codes, scales, 1 << (bits - 1), None)
    sizes = layer.get_meta_args()
    type_idx = gemlite.DType.FP16.value * 100 + bits

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        m = x.shape[0]
        kind = core.get_matmul_type(m, bits)
        key = str((m if m == 1 else get_closest_m(m), N, K, group, 32 // bits, type_idx))
        known = key in core.GEMLITE_TRITON_CONFIG_CACHE.get(kind, {})
        need(known or tune, "it has no configuration for this shape; --tune-peers searches one")
        return gemlite.forward_functional(x, None, list(tensors), sizes)

    tensors = tuple(tensor.data for tensor in layer.get_tensor_args())
    return Packed(tensors, run, dense, case.torch_dtype)


def pack_humming(case: Case) -> Packed:
    from humming.forward import humming_forward
    from humming.kernel.humming import HummingKernel
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    N, K, bits = case.n, case.k, case.num_bits
    with torch.device("cuda"):
        layer = HummingLayer(
            shape_n=N,
            shape_k=K,
            weight_config={"dtype": f"int{bits}", "group_size": case.group_size},
            torch_dtype=case.torch_dtype,
        )
    bound = 1 << 31
    words = torch.randint(-bound, bound, (N, K * bits // 32), dtype=torch.int32, device="cuda")
    scales = random_scales(N, K // case.group_size, dtype=case.torch_dtype)
    layer.load_from_tensors({"weight": words, "weight_scale": scales})
    dense = layer.weight_schema.dequant_tensors(layer.state_dict()).float()
    layer.transform()
    config = layer.humming_config

    def plan(m: int) -> str:
        return json.dumps(get_heuristics_config(config, shape_m=m))

    def prepare(m: int) -> object:
        return HummingKernel.prepare_kernels(config.to_str(), None, plan(m), 0)

    def run(x: Tensor, weight: Tensor, scales: Tensor, locks: Tensor) -> Tensor:
        return humming_forward(
            config,
            x,
            weight,
            weight_scale=scales,
            locks=locks,
            tuning_config=plan(x.shape[0]),
        )

    tensors = (layer.weight.data, layer.weight_scale.data, layer.locks)
    return Packed(tensors, run, dense, case.torch_dtype, prepare)


PEERS = {
    "humming": Peer("humming", pack_humming),
    "marlin": Peer("marlin", pack_marlin),
    "gemlite": Peer("gemlite", pack_gemlite),
    "bitsandbytes": Peer("bitsandbytes", pack_bitsandbytes),
    "tinygemm": Peer("torch", pack_tinygemm),
}


def is_installed(name: str) -> bool:
    """Tell whether a library's module is there; it is not imported."""
    return find_spec(PEERS[name].module) is not None


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:300]


class Session:
    """Compile, check and time the cases of one library.

    A step that fails is told as a note of its cases; they take no part in later steps, and the
    others go on.

    Args:
        cases: what to multiply.
        pack: the library's, see `Peer`.
        tell: takes each message for the benchmark.
    """

    def __init__(
        self,
        cases: list[Case],
        pack: Callable[[Case], Packed],
        tell: Callable[[dict[str, object]], object],
    ) -> None:
        self._left = {case: i for i, case in enumerate(cases)}
        self._pack, self._tell = pack, tell

    def _attempt(self, group: Iterable[Case], step: Callable[[], object]) -> None:
        try:
            step()
            return
        except UnsupportedCaseError as error:
            note = str(error)
        except Exception as error:  # noqa: BLE001  whatever another library raises
            traceback.print_exc()  # into its log
            note = one_line(error)
        for case in group:
            if case in self._left:
                self._tell({"case": self._left.pop(case), "note": note})

    def compile(self) -> None:
        """Compile kernels on all cores, where the library compiles ahead."""
        jobs: list[tuple[Case, Future[object]]] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def submit(weight: Case, group: list[Case]) -> None:
                prepare = self._pack(weight).prepare
                if prepare is not None:
                    jobs.extend((case, pool.submit(prepare, case.m)) for case in group)

            for weight, group in list(by_weight(self._left)):
                self._attempt(group, partial(submit, weight, group))
        for case, job in jobs:
            self._attempt([case], job.result)

    def check(self) -> None:
        """Hold each product against fp64."""

        def check_case(packed: Packed, oracle: Oracle, case: Case) -> None:
            error = oracle.error(packed.run(oracle.tokens(case.m), *packed.tensors))
            need(error < TOLERANCE[packed.dtype], f"wrong: its relative error is {error:.1e}")
            self._tell({"case": self._left[case], "error": float(f"{error:.3g}")})

        def check_group(weight: Case, group: list[Case]) -> None:
            packed = self._pack(weight)
            oracle = Oracle(packed.dense, packed.dtype)
            for case in group:
                self._attempt([case], partial(check_case, packed, oracle, case))

        for weight, group in list(by_weight(self._left)):
            self._attempt(group, partial(check_group, weight, group))

    def time(self, time_calls: Callable[[list[Callable[[], Tensor]]], float] = time_us) -> None:
        """Time each product that was right."""

        def time_case(packed: Packed, copies: list[list[Tensor]], case: Case) -> None:
            x = torch.randn(case.m, case.k, device=packed.dense.device).to(packed.dtype)
            us = time_calls([partial(packed.run, x, *tensors) for tensors in copies])
            self._tell({"case": self._left[case], "us": round(us, 2)})

        def time_group(weight: Case, group: list[Case]) -> None:
            packed = self._pack(weight)
            count = copies_of(sum(tensor.nbytes for tensor in packed.tensors))
            copies = [[tensor.clone() for tensor in packed.tensors] for _ in range(count)]
            for case in group:
                self._attempt([case], partial(time_case, packed, copies, case))

        for weight, group in list(by_weight(self._left)):
            self._attempt(group, partial(time_group, weight, group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--tune-peers", action="store_true")
    args = parser.parse_args()
    replies: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes with its errors
    cases = [Case(**case) for case in json.loads(sys.stdin.readline())]
    pack = PEERS[args.name].pack
    if args.name == "gemlite":
        pack = partial(pack_gemlite, tune=args.tune_peers)
    session = Session(cases, pack, lambda told: print(json.dumps(told), file=replies))
    with torch.no_grad():
        session.compile()
        session.check()
        print(json.dumps({"ready": True}), file=replies)
        if sys.stdin.readline():  # empty if the benchmark has ended
            session.time()


if __name__ == "__main__":
    main()
