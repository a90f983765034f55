"""The cases of `bench_quality.py`: which methods there are, and copies of a model quantised so.

A method of the package becomes real layers (`OURS`); other libraries' methods, re-created in
`baselines.py`, and controls become dense layers of rounded weights (`OTHERS`).
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import baselines
import torch
from torch import Tensor, nn

import flute
from flute.format import QuantizedWeight
from flute.linear import LutLinear
from flute.methods import CALIBRATED as METHODS_WITH_TEXT
from flute.methods import METHODS
from flute.model import QuantizeOptions, plan_model
from flute.training import LearnOptions

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to quantise a model. ``kind``: "dense", "method", "baseline" or "control"."""

    method: str
    kind: str
    bits: int
    group: int
    seed: int | None = None


def bitsandbytes(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    double = case.method.endswith("double")
    return baselines.bitsandbytes_nf4(weight, case.group, double=double)


def hqq(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    return baselines.hqq(weight, case.bits, case.group)


def gptq_int(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    assert hessian is not None, "GPTQ runs with a Hessian"
    return baselines.gptq_int(weight, case.bits, case.group, hessian)


def int8(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    """Control: absmax integers of 8 bits lose about nothing."""
    groups = weight.view(-1, case.group)
    step = groups.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return ((groups / step).round() * step).view_as(weight), 8 + 16 / case.group


def permuted(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    """Control: nf whose table is permuted after the codes were chosen destroys the model."""
    quantized = flute.quantize(weight, case.bits, case.group, method="nf")
    order = torch.randperm(1 << case.bits, generator=torch.Generator().manual_seed(0))
    wrong = QuantizedWeight(
        quantized.codes, quantized.scales, quantized.table[:, order], quantized.spec
    )
    return flute.dequantize(wrong), case.bits + 16 / case.group


def dequantized(weight: Tensor, case: Case, hessian: Tensor | None) -> baselines.Result:
    """Control: dense layers of nf's dequantised weights give what the real layers give."""
    quantized = flute.quantize(weight, case.bits, case.group, method="nf")
    return flute.dequantize(quantized), case.bits + 16 / case.group


OURS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in (*METHODS, *METHODS_WITH_TEXT) if name != "table"},
    "lnq, table per row": {"method": "lnq", "table_scope": "row"},
    "nfl from nf": {"method": "nfl", "learn": LearnOptions("nf", learning_rate=1e-4)},
    "nfl from lnq, table per row": {
        **{"method": "nfl", "table_scope": "row"},
        "learn": LearnOptions("lnq", tables=True),
    },
    "nfl, end to end": {"method": "nfl", "learn": LearnOptions(end_to_end=True)},
    "nfl from lnq, end to end": {
        "method": "nfl",
        "learn": LearnOptions("lnq", learning_rate=2e-3, end_to_end=True),
    },
    "gptq, guided": {"method": "gptq", "guided": True},
    "lnq, guided": {"method": "lnq", "guided": True},
}
"""Name -> options of `flute.quantize_model` besides bits and group."""
CALIBRATED = (
    "GPTQ int (re-created)",
    *(name for name, options in OURS.items() if options["method"] in METHODS_WITH_TEXT),
)
OTHERS: dict[str, Callable[[Tensor, Case, Tensor | None], baselines.Result]] = {
    "bitsandbytes nf4": bitsandbytes,
    "bitsandbytes nf4, double": bitsandbytes,
    "HQQ (re-created)": hqq,
    "GPTQ int (re-created)": gptq_int,
    "int8": int8,
    "nf, table permuted": permuted,
    "nf, dequantised": dequantized,
}
CONTROLS = ("int8", "nf, table permuted", "nf, dequantised")


def cases_of(
    methods: Sequence[str],
    bits: Sequence[int],
    groups: Sequence[int],
    *,
    calibration: bool,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Case]:
    """Yield what is measured: methods of ours, then baselines and controls, by bits and group."""
    for method in methods:
        ours = method in OURS
        needs = method in CALIBRATED
        if needs and not calibration:
            continue
        kind = "method" if ours else "control" if method in CONTROLS else "baseline"
        for num_bits in bits:
            if (method.startswith("bitsandbytes") or method in CONTROLS) and num_bits != 4:
                continue
            for group in groups:
                if method in CONTROLS and group != groups[len(groups) // 2]:
                    continue
                for seed in seeds if needs else (None,):
                    yield Case(method, kind, 8 if method == "int8" else num_bits, group, seed)


def quantized_copy(
    dense: nn.Module, case: Case, windows: Tensor | None, hessians: dict[str, Tensor] | None
) -> tuple[nn.Module, float, float]:
    """Return a quantised copy of a model, the bits it stores per weight, and the seconds it took.

    A method of the package becomes real layers, anything else dense layers of rounded weights.

    Args:
        dense: the model.
        case: what to do.
        windows: calibration text for a method of the package that needs it.
        hessians: of the dense model's layers, for a baseline that needs them.
    """
    model = copy.deepcopy(dense)
    start = time.perf_counter()
    if case.kind == "method":
        options = OURS[case.method] | ({} if windows is None else {"calibration": windows})
        flute.quantize_model(model, case.bits, case.group, **options)
        seconds = time.perf_counter() - start
        layers = [m for m in model.modules() if isinstance(m, LutLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        tensors = [t for m in layers for t in (m.codes, m.scales, m.table)]
        return model, 8 * sum(t.numel() * t.element_size() for t in tensors) / weights, seconds
    plan = plan_model(
        model, QuantizeOptions(4 if case.kind == "control" else case.bits, case.group)
    )
    stored = 0.0
    for name in plan.shapes:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} was planned as nn.Linear"
        weight = linear.weight.detach().float()
        group = plan.config.spec_of(name).group_size  # smaller where the row wants it
        flat = case.method.startswith("bitsandbytes")
        here = case if flat else dataclasses.replace(case, group=group)
        hessian = hessians[name] if hessians else None
        values, per_weight = OTHERS[case.method](weight, here, hessian)
        linear.weight.data = values.to(linear.weight.dtype)
        stored += per_weight * weight.numel()
    seconds = time.perf_counter() - start
    return model, stored / sum(N * K for N, K in plan.shapes.values()), seconds


@torch.inference_mode()
def collect_hessians(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Return sum of x x' over a text for each linear layer of the dense model, fp32, (K, K)."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    plan = plan_model(model, QuantizeOptions(4, -1))
    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in plan.shapes
    ]
    for batch in windows.split(4):
        model(input_ids=batch.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return sums
