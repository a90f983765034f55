"""Fit the model of a decode kernel's time that orders candidates where nothing was tuned.

    pip install scipy
    python benchmarks/fit_decode.py            prints how good the choice is, and writes nothing
    python benchmarks/fit_decode.py --write    into flute/data/decode_cost.json

Reads `benchmarks/results/rule_h200.json`: problems, and the microseconds of the first dozen
candidates of each (`flute tune --json --top 12`). Coefficients are the non-negative least squares
of the relative error, per family of kernels. Prints the time of the model's choice over the best
one's: of what it was fitted to, and of each shape by the coefficients fitted to all others.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from flute.config import Gpu, KernelConfig, Plan
from flute.decode_cost import COEFFICIENTS, TERMS, family, terms

RESULTS = Path(__file__).parent / "results" / "rule_h200.json"
MOST_TOKENS = 8
CLASSES = {"Plan": Plan, "KernelConfig": KernelConfig}
BEYOND = 1.05
"""Choices that take longer than this, over the best's time, are counted."""
Families = dict[str, np.ndarray]


class Timed(NamedTuple):
    """One problem: its shape, and of each plan the family, the terms and the microseconds."""

    shape: tuple[int, int]
    families: list[str]
    terms: np.ndarray  # (plans, TERMS)
    us: np.ndarray  # (plans,)


def plan_of(text: str) -> Plan | None:
    """Return a decode plan from its `repr`, None for another kind's."""

    def value(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        assert isinstance(node.func, ast.Name)
        fields = {word.arg: value(word.value) for word in node.keywords if word.arg}
        return CLASSES[node.func.id](**fields)

    return value(ast.parse(text, mode="eval").body) if text.startswith("Plan(") else None


def read(path: Path) -> list[Timed]:
    """Return the problems of few tokens that have at least two decode plans."""
    timed = json.loads(path.read_text())
    plans = [plan_of(text) for text in timed["plans"]]
    sms, found = Gpu().num_sms, []
    for one in timed["problems"]:
        known = [(plan, us) for i, us in one["us"] if (plan := plans[i]) is not None]
        if one["m"] > MOST_TOKENS or len(known) < 2:
            continue
        size = (one["m"], one["n"], one["k"])
        found.append(
            Timed(
                size[1:],
                [family(plan) for plan, _ in known],
                np.array([terms(plan, *size, sms) for plan, _ in known]),
                np.array([us for _, us in known]),
            )
        )
    return found


def least_squares(problems: Sequence[Timed]) -> Families:
    """Return coefficients that are not negative, of least relative error, for each family."""
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    for problem in problems:
        for name, row, us in zip(problem.families, problem.terms, problem.us, strict=True):
            rows[name].append(row / us)
    return {name: nnls(np.array(a), np.ones(len(a)))[0] for name, a in rows.items()}


def ratios(problems: Sequence[Timed], families: Families) -> np.ndarray:
    """Return the chosen plan's time over the best one's, of each problem."""
    found = []
    for problem in problems:
        us = [
            families[name] @ row if name in families else np.inf
            for name, row in zip(problem.families, problem.terms, strict=True)
        ]
        found.append(problem.us[int(np.argmin(us))] / problem.us.min())
    return np.array(found)


def main() -> None:
    """Fit, say how good it is, and write if told to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help=f"into {COEFFICIENTS.name}")
    args = parser.parse_args()
    problems = read(args.results)

    def say(what: str, found: np.ndarray) -> None:
        above = int((found > BEYOND).sum())
        print(f"{what}: mean {found.mean():.4f}, worst {found.max():.3f}, {above} of {found.size}")

    others = []
    for shape in sorted({problem.shape for problem in problems}):
        fitted = least_squares([p for p in problems if p.shape != shape])
        others.append(ratios([p for p in problems if p.shape == shape], fitted))
    say("shapes that were left out", np.concatenate(others))
    families = least_squares(problems)
    say("all", ratios(problems, families))
    named = {
        name: {term: float(f"{c:.4g}") for term, c in zip(TERMS, row, strict=True) if c}
        for name, row in sorted(families.items())
    }
    if args.write:
        COEFFICIENTS.write_text(json.dumps({"families": named}, indent=1) + "\n")


if __name__ == "__main__":
    main()
