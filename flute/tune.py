"""Time the plans that could serve a problem on this GPU, and settle on one per number of tokens.

Owns what is compared and how; `flute.timing` has the clock, `flute.tuning` the files.

    problems of one weight -> plans -> compile all -> per M: check, screen, time the best -> settle

Which plans there are: `flute.plans`; which kernels they are: `flute.launchers`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flute import launchers
from flute.config import Gpu, Problem
from flute.device import gpu_of, why_not
from flute.errors import UnsupportedProblemError
from flute.launchers import TokensAt, product_of
from flute.operands import Operands, dense_product
from flute.plans import DECODE_M, AnyPlan, DensePlan, KernelPlan, SplitPlan, default_plan, plans_of
from flute.timing import capture, time_graphs_us
from flute.tuning import FAMILIES, Record, encode, kernels_hash

if TYPE_CHECKING:
    from flute.jit.compiler import Source

CLOSE = 1.01
"""Plans within 1 % of the best are equal: medians repeat no better."""
STEP = 1.15
"""A token that makes all tokens this much dearer is worth a line in the report."""
_REPEATS, _NUM_FINALISTS = 11, 4
_SCREENS = ((1, 1.5), (3, 1.1))
"""Repeats, and how much slower than the best a plan may be to stay, before the finals."""
_PAUSE = 0.2
"""Seconds of rest before a weight. After many tokens an H200 runs at a lower clock, which made a
few of the next weight 10 % slower and chose other plans for them (28672 x 4096, one token)."""
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative norm of the difference to the dequantised product: twice what the tests allow each."""


@dataclass(frozen=True)
class Result:
    """What was measured for one problem.

    Args:
        problem: what is multiplied.
        default: the heuristic's plan.
        default_us: its median time, in microseconds.
        best: the plan settled on.
        us: its median time.
        rank: place of ``best`` among the candidates; 0 is the heuristic's, -1 one of a larger M.
        refused: plans that were not -> why.
        times: microseconds of all candidates, the heuristic's first; inf where refused. Only those
            of the best few are medians of many.
    """

    problem: Problem
    default: AnyPlan
    default_us: float
    best: AnyPlan
    us: float
    rank: int = 0
    refused: Mapping[AnyPlan, str] = field(default_factory=dict)
    times: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """Time of the heuristic's plan over that of the best; 1 is perfect."""
        return self.default_us / self.us

    def record(self) -> Record:
        """Return what the files keep."""
        return Record(encode(self.best), round(self.us, 2), kernels=kernels_hash())


def check_device(device: str | torch.device) -> torch.device:
    """Return a GPU, with its index.

    Raises:
        UnsupportedProblemError: the device has no kernels; the message says why.
    """
    device = torch.device(device)
    if why_not(device):
        raise UnsupportedProblemError(
            f"Tuning times kernels on a GPU; {why_not(device)}. `flute doctor` shows what "
            "this machine has."
        )
    return torch.device("cuda", device.index or 0)


def plans_to_time(problem: Problem, gpu: Gpu, top: int | None = None) -> list[AnyPlan]:
    """Return the plans to time, the heuristic's first.

    Args:
        problem: what is multiplied.
        gpu: where.
        top: so many kernels, in the order of `plans_of`, and all other ways; None is all.
    """
    plans = plans_of(problem, gpu)
    kernels = [plan for plan in plans if isinstance(plan, KernelPlan)]
    dropped = set() if top is None else set(kernels[max(1, top) :])
    return [plan for plan in plans if plan not in dropped]


def settle(
    timed: Mapping[int, Mapping[AnyPlan, float]],
    defaults: Mapping[int, AnyPlan],
    used: Counter[Any],
    serves: Callable[[AnyPlan, int], bool],
) -> dict[int, tuple[AnyPlan, float]]:
    """Choose a plan per number of tokens, so that fewer tokens never take longer.

    Of plans as fast as the best (`CLOSE`), the heuristic's wins, then the one whose kernel is used
    most, so that a model needs few kernels.

    Args:
        timed: tokens -> plan -> microseconds.
        defaults: tokens -> the heuristic's plan.
        used: kernel -> how often it was chosen; counted on.
        serves: plan, tokens -> whether it can serve so many.

    Returns:
        Tokens, ascending -> plan, microseconds.
    """
    settled: dict[int, tuple[AnyPlan, float]] = {}
    for m in sorted(timed, reverse=True):
        times = dict(timed[m])
        if settled:
            above, above_us = list(settled.values())[-1]
            if serves(above, m):
                times[above] = min(above_us, times.get(above, above_us))
        close = [plan for plan, us in times.items() if us <= CLOSE * min(times.values())]
        if defaults[m] in close:
            plan = defaults[m]
        else:
            plan = max(close, key=lambda p: (used[getattr(p, "config", p)], -times[p]))
        used[getattr(plan, "config", plan)] += 1
        settled[m] = plan, times[plan]
    return dict(sorted(settled.items()))


def steps(results: Iterable[Result]) -> list[tuple[Problem, float]]:
    """Return problems of m + 1 tokens whose tokens cost `STEP` times those of m, and the factor.

    Only neighbours that were both measured are compared.
    """
    us = {result.problem: result.us for result in results}
    found = []
    for problem, above in us.items():
        below = us.get(problem._replace(m=problem.m - 1))
        if below is not None:
            factor = (above / problem.m) / (below / (problem.m - 1))
            if factor > STEP:
                found.append((problem, factor))
    return found


class _Timed(NamedTuple):
    """Plan -> microseconds: of all, of the heuristic's and the best few; plan -> why not."""

    all: dict[AnyPlan, float]
    best: dict[AnyPlan, float]
    refused: dict[AnyPlan, str]


class Tuner:
    """Times plans for problems on one GPU.

    Args:
        problems: what to time.
        device: the GPU.
        top: time so many candidates per problem; None is all.

    Raises:
        UnsupportedProblemError: the device has no kernels; the message says why.
    """

    def __init__(
        self, problems: Iterable[Problem], device: torch.device, top: int | None = None
    ) -> None:
        self.device = check_device(device)
        self.gpu = gpu_of(self.device)
        self.plans = {problem: plans_to_time(problem, self.gpu, top) for problem in problems}
        self.tokens: dict[Problem, list[int]] = {}
        for problem in self.plans:
            self.tokens.setdefault(problem._replace(m=0), []).append(problem.m)
        self._functions: dict[Source, int | str] = {}
        self._used: Counter[Any] = Counter()
        self._best: dict[Problem, AnyPlan] = {}

    def compile(self, done: Callable[[int, int], None]) -> int:
        """Compile and load all kernels, in parallel; return how many.

        A kernel that does not compile, or that keeps registers in local memory, is left out.

        Args:
            done: called with (compiled, in all), first with 0.
        """
        from flute.jit.cache import load_or_compile
        from flute.jit.compiler import KernelCompileError
        from flute.jit.launch import LaunchError, load_function, local_bytes

        plans = [plan for plans in self.plans.values() for plan in plans]
        plans += [
            plan
            for key in self.tokens
            for m in range(1, DECODE_M + 1)
            for plan in (default_plan(key._replace(m=m), self.gpu),)
        ]  # of the rest of a split
        plans += [
            default_plan(problem._replace(m=m), self.gpu)
            for problem, timed in self.plans.items()
            for plan in timed
            if isinstance(plan, SplitPlan)
            for m in (plan.tokens, problem.m % plan.tokens)
            if m > DECODE_M
        ]
        sources = [launchers.source_of(plan) for plan in plans if isinstance(plan, KernelPlan)]
        sources = list(dict.fromkeys(sources))
        others = {
            launchers.dequantize_source(key) for key in self.tokens
        }  # loaded when it is called
        torch.empty(1, device=self.device)  # makes the context
        done(0, len(sources))
        with (
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,
            torch.cuda.device(self.device),
        ):
            futures = [pool.submit(load_or_compile, s, self.gpu.arch) for s in (*sources, *others)]
            for i, (source, future) in enumerate(zip(sources, futures, strict=False)):
                try:
                    cubin = future.result()
                    function = load_function(cubin.code, cubin.symbol, self.gpu.smem_bytes)
                    spilled = local_bytes(function)
                    self._functions[source] = (
                        f"{spilled} bytes of local memory" if spilled else function
                    )
                except (KernelCompileError, LaunchError) as error:
                    self._functions[source] = str(error)
                done(i + 1, len(sources))
        return len(sources) + len(others)

    @torch.inference_mode()
    def measure(self, deadline: float = float("inf")) -> Iterator[list[Result]]:
        """Yield the results of one weight (num_bits ... N, K) after the other.

        Args:
            deadline: by `time.monotonic`; no weight is begun later.

        Raises:
            OutOfMemoryError: torch's; the largest weight needs twice its size.
        """
        with torch.cuda.device(self.device):
            data = Operands(self.tokens, self.device)
        for key, tokens in self.tokens.items():
            if time.monotonic() > deadline:
                return
            with torch.cuda.device(self.device):
                results = self._measure_weight(data, key, sorted(tokens))
            yield results

    def _measure_weight(self, data: Operands, key: Problem, tokens: list[int]) -> list[Result]:
        data.take(key, max(tokens))
        torch.cuda.synchronize(self.device)
        time.sleep(_PAUSE)
        timed: dict[int, _Timed] = {}
        for m in tokens:
            problem = key._replace(m=m)
            found = self._time(data, problem)
            if found.best:
                timed[m] = found
                self._best[problem] = min(found.best, key=found.best.__getitem__)
        best = {m: found.best for m, found in timed.items()}
        defaults = {m: self.plans[key._replace(m=m)][0] for m in timed}

        def serves(plan: AnyPlan, m: int) -> bool:
            family = next(f for f in FAMILIES.values() if f.plan is type(plan))
            return not family.supports(plan, m, key.n, key.k, self.gpu)

        results = []
        for m, (plan, us) in settle(best, defaults, self._used, serves).items():
            plans, found = self.plans[key._replace(m=m)], timed[m]
            results.append(
                Result(
                    key._replace(m=m),
                    defaults[m],
                    found.best.get(defaults[m], float("inf")),
                    plan,
                    us,
                    plans.index(plan) if plan in plans else -1,
                    found.refused,
                    tuple(found.all.get(p, float("inf")) for p in plans),
                )
            )
        return results

    def _time(self, data: Operands, problem: Problem) -> _Timed:
        from flute.jit.launch import LaunchError

        graphs: dict[AnyPlan, torch.cuda.CUDAGraph] = {}
        refused: dict[AnyPlan, str] = {}
        num_calls = data.num_calls
        for plan in self.plans[problem]:
            try:
                call = self._bind(data, plan, problem)
                error = data.error_of(call, problem)
            except (UnsupportedProblemError, LaunchError) as refusal:
                refused[plan] = str(refusal)
                continue
            if not error <= _TOLERANCE[data.x.dtype]:  # NaN too
                refused[plan] = f"wrong: it differs from the dequantised product by {error:.1e}"
                continue
            copies = [i % data.num_copies for i in range(num_calls)]
            graphs[plan] = capture([partial(call, i) for i in copies])

        all_times: dict[AnyPlan, float] = {}

        def times(plans: Iterable[AnyPlan], repeats: int) -> dict[AnyPlan, float]:
            plans = list(plans)
            found = time_graphs_us([graphs[plan] for plan in plans], repeats)
            all_times.update((plan, us / num_calls) for plan, us in zip(plans, found, strict=True))
            return {plan: all_times[plan] for plan in plans}

        left = list(graphs)
        for repeats, slower in _SCREENS:
            found = times(left, repeats)
            left = [p for p in left if found[p] <= slower * min(found.values())]
        finalists = sorted(left, key=all_times.__getitem__)[:_NUM_FINALISTS]
        finalists += [plan for plan in self.plans[problem][:1] if plan in graphs]
        final = times(dict.fromkeys(finalists), _REPEATS)
        return _Timed(all_times, final, refused)

    def _bind(self, data: Operands, plan: AnyPlan, problem: Problem) -> Callable[[int], object]:
        """Return what multiplies by copy ``i`` of the weight with a plan, on the current stream."""
        if isinstance(plan, DensePlan):
            x, slice_bytes = data.x_of(problem.m), plan.slice_bytes
            return lambda i: dense_product(x, *data.weight(i), data.spec, problem.n, slice_bytes)
        parts: list[tuple[AnyPlan, int, int]] = [(plan, 0, problem.m)]
        if isinstance(plan, SplitPlan):
            starts = range(0, problem.m, plan.tokens)
            sizes = [min(plan.tokens, problem.m - start) for start in starts]
            parts = [
                (self._plan_of_part(problem._replace(m=size)), start, size)
                for start, size in zip(starts, sizes, strict=True)
            ]
        launches = []
        for part, start, size in parts:
            assert isinstance(part, KernelPlan), "other plans are dense or split"
            function = self._functions[launchers.source_of(part)]
            if isinstance(function, str):
                raise UnsupportedProblemError(function)
            product = product_of(function, part, problem._replace(m=size), self.gpu)
            x_at, out_at = data.tokens_at(start)
            tokens = TokensAt(x_at, size, problem.k, data.x.dtype)
            scratch_at = data.scratch_at(product.num_scratch)
            launches.append((product.launch, tokens, scratch_at, out_at))

        def call(i: int) -> None:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            weight_at = (*data.addresses(i), 0)
            for launch, tokens, scratch_at, out_at in launches:
                launch(stream, tokens, weight_at, scratch_at, out_at)

        return call

    def _plan_of_part(self, problem: Problem) -> AnyPlan:
        """Plan of one launch of a split: the best so far if it was timed, else the heuristic's."""
        plan = self._best.get(problem)
        if not isinstance(plan, KernelPlan):
            plan = default_plan(problem, self.gpu)
        if not isinstance(plan, KernelPlan):
            raise UnsupportedProblemError(f"no kernel takes {problem.m} tokens")
        return plan
