"""Tuned plans on disk: which plan was fastest for which product, per GPU. Knows no torch.

    flute/data/tuning/<gpu>.json   shipped with the package
    <cache>/tuning/<gpu>.json      written by `flute tune`; its figures count before the shipped

    {"format": 1, "gpu": "NVIDIA H200", "num_sms": 132,
     "plans": [{"family": "decode", "phases": 1, "num_warps": 16, ...}, ...],
     "entries": [{"num_bits": 4, ..., "n": 4096, "k": 4096, "version": "0.1.0", "kernels": "5f1c..",
                  "by_tokens": {"1": [index of the plan, us], "8": ...}}, ...]}

A plan holds all its fields but the product's own, so a default that changes later does not change
what was measured. What no longer fits (fields of another version, a plan that `supports` refuses)
is passed over: then the heuristic chooses, as for whatever was not measured. `version` and
`kernels` say what was measured, for people; figures of older kernels are still the best known.

Files are written under a temporary name and renamed, so a reader sees all of one or none. Of two
processes that add to one file at the same time, the later wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flute import batch, mma
from flute.batch import BatchConfig, BatchPlan
from flute.config import Gpu, KernelConfig, Plan, Problem, supports
from flute.errors import FormatError
from flute.mma import MmaConfig, MmaPlan
from flute.plans import AnyPlan, DensePlan, SplitPlan, default_plan
from flute.version import __version__

FORMAT = 1
SHIPPED = Path(__file__).parent / "data" / "tuning"
_KERNELS = Path(__file__).parent / "kernels"
_KEY = Problem._fields[:5] + Problem._fields[6:]
"""Fields of a problem without its tokens."""


class Family(NamedTuple):
    """A way to multiply, as the files know it.

    Args:
        plan: dataclass of its plans; fields of type int, bool or str, besides ``config``.
        config: dataclass of the plan's field ``config``, or None if it has none.
        supports: plan, m, n, k, gpu -> "" or the rule that is broken.
    """

    plan: type[Any]
    config: type[Any] | None
    supports: Callable[[Any, int, int, int, Gpu], str]


FAMILIES: dict[str, Family] = {
    "decode": Family(Plan, KernelConfig, supports),
    "batch": Family(BatchPlan, BatchConfig, batch.supports),
    "mma": Family(MmaPlan, MmaConfig, mma.supports),
    "split": Family(
        SplitPlan,
        None,
        lambda plan, m, n, k, gpu: "" if m > plan.tokens > 0 else f"M={m} is one launch",
    ),
    "dense": Family(
        DensePlan,
        None,
        lambda plan, m, n, k, gpu: "" if plan.slice_bytes > 0 else "slices of no bytes",
    ),
}
"""Name in the files -> family. To add one: its plan's dataclass, and its `supports`."""


class Record(NamedTuple):
    """One figure of a file.

    Args:
        plan: as `encode` returns it.
        us: median time of a call, in microseconds.
        version: of the package that measured it.
        kernels: `kernels_hash` then.
    """

    plan: Mapping[str, Any]
    us: float
    version: str = __version__
    kernels: str = ""


Store = dict[Problem, dict[int, Record]]
"""Problem with m = 0 -> tokens -> figure."""


def choose(problem: Problem, gpu: Gpu) -> AnyPlan:
    """Return the plan for a product: the tuned one, else the heuristic's.

    Args:
        problem: of any number of tokens.
        gpu: where it will run.
    """
    return lookup(problem, gpu) or default_plan(problem, gpu)


def lookup(problem: Problem, gpu: Gpu) -> AnyPlan | None:
    """Return the tuned plan of a problem, or None if none is known.

    For tokens that were not measured it is that of the next larger number that was, up to the next
    power of two: further away the heuristic knows better, as where tiles of tokens would stay
    partly empty.

    Args:
        problem: what is multiplied.
        gpu: where it will run; without a name nothing is known.
    """
    store = _store(gpu)
    if not store:
        return None
    most = 1 << (problem.m - 1).bit_length()
    for key in _interchangeable(problem):
        measured = store.get(key, {})
        for m in sorted(m for m in measured if problem.m <= m <= most):
            plan = decode(measured[m].plan, problem, gpu)
            if plan is not None and not (m > problem.m and _wastes_tokens(plan, problem.m)):
                return plan
    return None


def _wastes_tokens(plan: AnyPlan, m: int) -> bool:
    """Whether a plan made for more tokens computes many that m tokens have not."""
    if not isinstance(plan, BatchPlan | MmaPlan):
        return False
    return -m % plan.config.tokens > max(16, m // 8)


def _interchangeable(problem: Problem) -> list[Problem]:
    """Keys under which a problem's figures may stand, its own first.

    Why: kernels for fp16 and bf16 differ in the type of one mma instruction, and scales of either
    are widened to fp32 by one instruction; the bytes and everything else are the same.
    """

    def of_equal_speed(dtype: str) -> list[str]:
        return [dtype, *(d for d in ("float16", "bfloat16") if d != dtype)]

    scales = [problem.scale_dtype]
    if problem.scale_dtype != "float32":
        scales = of_equal_speed(problem.scale_dtype)
    key = problem._replace(m=0)
    return [
        key._replace(dtype=dtype, scale_dtype=scale)
        for dtype in of_equal_speed(problem.dtype)
        for scale in scales
    ]


def encode(plan: AnyPlan) -> dict[str, Any]:
    """Return a plan as the files hold it: its family and all fields but the problem's."""
    name = next(name for name, family in FAMILIES.items() if family.plan is type(plan))
    parts = [plan, *([plan.config] if hasattr(plan, "config") else [])]
    values = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
    return {"family": name} | {k: v for k, v in values.items() if k not in (*_KEY, "config")}


def decode(encoded: Mapping[str, Any], problem: Problem, gpu: Gpu) -> AnyPlan | None:
    """Return the plan that a file holds, or None if this version or GPU has no such plan."""
    family = FAMILIES.get(encoded.get("family", ""))
    if family is None:
        return None
    left = {name: value for name, value in encoded.items() if name != "family"}
    try:
        parts: dict[str, Any] = {}
        if family.config is not None:
            names = {f.name for f in fields(family.config)}
            given = {name: left.pop(name) for name in names & set(left)}
            own = {name: value for name, value in problem._asdict().items() if name in names}
            parts["config"] = _typed(family.config(**given, **own))
        plan = _typed(family.plan(**left, **parts))
        broken = family.supports(plan, problem.m, problem.n, problem.k, gpu)
    except (TypeError, ValueError, KeyError, ArithmeticError):  # no such field, or no such value
        return None
    return None if broken else plan


def _typed(part: Any) -> Any:
    """Return a dataclass as it is, after a look at its values: JSON may hold anything.

    Raises:
        TypeError: a value is not of the default's type.
    """
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name != "config" and type(value) is not type(field.default):
            raise TypeError(f"`{field.name}` is {value!r}; expected a {type(field.default)}.")
    return part


def describe(plan: AnyPlan) -> str:
    """Return a plan in a line: its family and what differs from the defaults."""
    encoded = encode(plan)
    family = FAMILIES[str(encoded.pop("family"))]
    parts = [family.plan, *([family.config] if family.config else [])]
    defaults = {f.name: f.default for part in parts for f in fields(part)}
    changed = [f"{k}={v}" for k, v in encoded.items() if v != defaults[k]]
    return " ".join([next(n for n, f in FAMILIES.items() if f is family), *changed])


# ---- files


def file_name(gpu: Gpu) -> str:
    """Return the name of a GPU's file: "nvidia-h200-132sm.json". A MIG slice has its own."""
    return f"{re.sub('[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}-{gpu.num_sms}sm.json"


def user_folder() -> Path:
    """Return tuning/ in $FLUTE_CACHE_DIR, else beside the cache of kernels."""
    from flute.jit.cache import ENVIRONMENT, default_folder

    folder = default_folder()
    return (folder if os.environ.get(ENVIRONMENT) else folder.parent) / "tuning"


@cache
def _store(gpu: Gpu) -> Store:
    """Read what is known of a GPU, once; `forget` reads again."""
    store: Store = {}
    if not gpu.name:
        return store
    for path in (SHIPPED / file_name(gpu), user_folder() / file_name(gpu)):
        try:
            found = read(path)
        except FormatError as error:
            warnings.warn(f"{error} It is ignored.", stacklevel=2)
            continue
        for key, measured in found.items():
            store.setdefault(key, {}).update(measured)
    return store


def forget() -> None:
    """Read the files again at the next lookup."""
    _store.cache_clear()


def read(path: Path) -> Store:
    """Return the figures in a file; none if there is no such file.

    Raises:
        FormatError: the file cannot be read, is damaged, or of another format; it is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}; this package reads {FORMAT}")
        store: Store = {}
        for entry in content["entries"]:
            key = Problem(m=0, **{name: entry[name] for name in _KEY})
            origin = (entry["version"], entry["kernels"])
            store.setdefault(key, {}).update(
                (int(m), Record(dict(content["plans"][i]), float(us), *origin))
                for m, (i, us) in entry["by_tokens"].items()
            )
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise FormatError(
            f"Tuned plans `{path}` cannot be read ({type(error).__name__}: {error}). Remove the "
            "file, or run `flute tune` of the version that wrote it."
        ) from error
    return store


def write(path: Path, gpu: Gpu, store: Store) -> None:
    """Add figures to a file, which may exist; they replace those of the same tokens.

    Args:
        path: the file; its folder is made.
        gpu: where they were measured.
        store: the figures.

    Raises:
        FormatError: what is in the file cannot be read; it stays as it is.
        OSError: it cannot be written.
    """
    merged = read(path)
    for key, measured in store.items():
        merged[key] = merged.get(key, {}) | measured
    plans: dict[str, int] = {}
    lines = []
    for key in sorted(merged):
        for version, kernels in sorted({(r.version, r.kernels) for r in merged[key].values()}):
            by_tokens = {
                str(m): [plans.setdefault(json.dumps(record.plan), len(plans)), record.us]
                for m, record in sorted(merged[key].items())
                if (record.version, record.kernels) == (version, kernels)
            }
            entry = {name: getattr(key, name) for name in _KEY}
            entry |= {"version": version, "kernels": kernels, "by_tokens": by_tokens}
            lines.append(json.dumps(entry))
    head = json.dumps({"format": FORMAT, "gpu": gpu.name, "num_sms": gpu.num_sms})[1:-1]
    rows = ",\n".join
    text = f'{{{head},\n"plans": [\n{rows(plans)}\n],\n"entries": [\n{rows(lines)}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@cache
def kernels_hash() -> str:
    """Return 12 hex digits of the SHA-256 of all kernel headers."""
    headers = {path.name: path.read_text() for path in sorted(_KERNELS.glob("*.cuh"))}
    return hashlib.sha256(json.dumps(headers, sort_keys=True).encode()).hexdigest()[:12]
