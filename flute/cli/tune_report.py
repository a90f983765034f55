"""What `flute tune` prints: a table of what was found, a check of the rule, JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flute.console import print_table

if TYPE_CHECKING:
    from flute.config import Problem
    from flute.tune import Result, Tuner


def print_results(tuner: Tuner, results: list[Result]) -> None:
    """Print a line per problem: the rule's time, the best, its plan."""
    from flute.tuning import describe

    rows = [
        [
            f"{p.n} x {p.k}",
            p.num_bits,
            _group(p),
            p.m,
            f"{r.default_us:.2f}" if math.isfinite(r.ratio) else "-",
            f"{r.us:.2f}",
            f"{r.ratio - 1:.1%}" if math.isfinite(r.ratio) else "-",
            describe(r.best),
        ]
        for r in results
        for p in (r.problem,)
    ]
    columns = ["N x K", "bits", "group", "M", "rule us", "best us", "gain", "plan"]
    print_table(tuner.gpu.name, columns, rows, _summary(results))


def print_check(tuner: Tuner, results: list[Result]) -> None:
    """Print a line per weight: how far the rule is from the best, in the mean and at worst."""
    by_weight: dict[Problem, list[Result]] = {}
    for result in results:
        by_weight.setdefault(result.problem._replace(m=0), []).append(result)
    rows = []
    for key, found in by_weight.items():
        worst = max(found, key=lambda r: r.ratio)
        mean = _mean(_ratios(found))
        cells = [f"{key.n} x {key.k}", key.num_bits, _group(key)]
        cells += [f"{mean:.3f}", f"{worst.ratio:.3f}", worst.problem.m, f"{worst.us:.2f}"]
        rows.append(cells)
    columns = ["N x K", "bits", "group", "mean", "worst", "at M", "best us there"]
    print_table(
        f"{tuner.gpu.name}: time of the rule's plan over that of the best",
        columns,
        rows,
        _summary(results),
    )


def _group(problem: Problem) -> str:
    return str(problem.group_size or "row")


def _summary(results: list[Result]) -> str:
    from flute.tune import steps

    ratios = _ratios(results)
    if not ratios:
        return "nothing was measured"
    above = sum(ratio > 1.05 for ratio in ratios)
    refused: dict[str, int] = {}
    for result in results:
        for why in result.refused.values():
            refused[why] = refused.get(why, 0) + 1
    lines = [
        f"the rule takes {max(ratios):.3f} times the best at worst, {_mean(ratios):.3f} in the "
        f"mean; more than 1.05 times in {above} of {len(ratios)} problems"
    ]
    untimed = len(results) - len(ratios)
    lines += [f"the rule's own plan was left out in {untimed} problems"] if untimed else []
    lines += [f"{count} times left out: {why.splitlines()[0]}" for why, count in refused.items()]
    lines += [
        f"M={p.m} costs {factor:.2f} times as much per token as M={p.m - 1}: {p.n} x {p.k}, "
        f"{p.num_bits} bits"
        for p, factor in steps(results)
    ]
    return "\n".join(lines)


def _ratios(results: list[Result]) -> list[float]:
    """Of the problems whose rule's plan was timed."""
    return [r.ratio for r in results if math.isfinite(r.ratio)]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.inf


def _finite(number: float) -> float | None:
    """JSON has no infinity: it stands for a plan that was not timed."""
    return round(number, 4) if math.isfinite(number) else None


def as_json(
    tuner: Tuner,
    results: list[Result],
    output: Path | None,
    kernels: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Return all of it for `--json`.

    Args:
        tuner: what was asked for.
        results: what was measured.
        output: the file that keeps it, if any.
        kernels: how many were compiled.
        seconds: what took how long.
    """
    from flute.tune import steps
    from flute.tuning import describe, kernels_hash
    from flute.version import __version__

    ratios = _ratios(results)
    return {
        "gpu": tuner.gpu.name,
        "num_sms": tuner.gpu.num_sms,
        "version": __version__,
        "kernels": kernels_hash(),
        "num_kernels": kernels,
        "seconds": {name: round(number, 2) for name, number in seconds.items()},
        "worst_ratio": _finite(max(ratios, default=math.inf)),
        "mean_ratio": _finite(_mean(ratios)),
        "above_1.05": sum(ratio > 1.05 for ratio in ratios),
        "not_measured": len(tuner.plans) - len(results),
        "output": None if output is None else str(output),
        "steps": [{**p._asdict(), "factor": round(f, 3)} for p, f in steps(results)],
        "results": [
            {
                **r.problem._asdict(),
                "heuristic_us": _finite(r.default_us),
                "us": _finite(r.us),
                "ratio": _finite(r.ratio),
                "rank": r.rank,
                "times": [_finite(us) for us in r.times],
                "heuristic": describe(r.default),
                "plan": describe(r.best),
                "refused": {describe(plan): why for plan, why in r.refused.items()},
            }
            for r in results
        ],
    }
