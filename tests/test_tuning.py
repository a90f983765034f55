"""Tuned plans: files that round-trip, whose figures count, and what is passed over."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields, replace

import pytest

from flute import batch, tuning
from flute.candidates import candidates
from flute.config import Gpu, KernelConfig, Plan, Problem
from flute.errors import FormatError
from flute.plans import DensePlan, SplitPlan
from flute.tuning import Record, choose, decode, encode, lookup

GPU = Gpu(name="NVIDIA H200")
PROBLEM = Problem(4, 128, "float16", "float16", False, 8, 4096, 4096)
KEY = PROBLEM._replace(m=0)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty folder for shipped plans and one for the user's; nothing is remembered."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


def plan_at(index, problem=PROBLEM):
    """A candidate that is not the heuristic's."""
    return candidates(problem, GPU)[index]


def record(index, problem=PROBLEM):
    return Record(encode(plan_at(index, problem)), 4.0 + index, kernels="abc")


def save(folder, store):
    tuning.write(folder / tuning.file_name(GPU), GPU, store)
    tuning.forget()


def save_user(store):
    save(tuning.user_folder(), store)


@pytest.mark.parametrize("plan", [plan_at(3), SplitPlan(16), DensePlan(1 << 20)])
def test_a_plan_survives_its_file(plan, tmp_path):
    problem = PROBLEM._replace(m=8 if isinstance(plan, Plan) else 64)
    path = tmp_path / "a" / "plans.json"
    tuning.write(path, GPU, {KEY: {problem.m: Record(encode(plan), 4.5, "0.1.0", "abc")}})
    stored = tuning.read(path)[KEY][problem.m]
    assert (stored.us, stored.version, stored.kernels) == (4.5, "0.1.0", "abc")
    assert decode(stored.plan, problem, GPU) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plans.json"]


def test_every_field_is_written_but_the_problems_own():
    encoded = encode(Plan(KernelConfig()))
    own = {"num_bits", "group_size", "dtype", "scale_dtype", "row_tables"}
    names = {f.name for f in (*fields(Plan), *fields(KernelConfig))} - own - {"config"}
    assert encoded == {"family": "decode", **{name: encoded[name] for name in names}}


def test_figures_are_added_and_replaced(tmp_path):
    path, other = tmp_path / "plans.json", KEY._replace(n=64)
    tuning.write(path, GPU, {KEY: {1: record(1), 8: record(2)}})
    tuning.write(path, GPU, {KEY: {8: record(3)}, other: {1: record(1)}})
    store = tuning.read(path)
    assert {m: r.us for m, r in store[KEY].items()} == {1: 5.0, 8: 7.0}
    assert store[other][1].plan == record(1).plan
    content = json.loads(path.read_text())
    assert (content["gpu"], content["num_sms"], content["format"]) == ("NVIDIA H200", 132, 1)
    assert len(content["plans"]) == 2


def test_the_users_figures_count_before_the_shipped():
    save(tuning.SHIPPED, {KEY: {8: record(1), 4: record(2, PROBLEM._replace(m=4))}})
    assert lookup(PROBLEM, GPU) == plan_at(1)
    save_user({KEY: {8: record(3)}})
    assert lookup(PROBLEM, GPU) == plan_at(3)
    assert lookup(PROBLEM._replace(m=4), GPU) == plan_at(2, PROBLEM._replace(m=4))


def test_unmeasured_tokens_take_the_next_measured_up_to_a_power_of_two():
    save_user({KEY: {2: record(1), 7: record(2), 32: Record(encode(DensePlan()), 9.0)}})
    found = {m: lookup(PROBLEM._replace(m=m), GPU) for m in (1, 2, 3, 4, 5, 7, 8, 16, 17, 32, 33)}
    plans = {2: plan_at(1), 5: plan_at(2), 7: plan_at(2), 17: DensePlan(), 32: DensePlan()}
    assert found == {**dict.fromkeys(found), **plans}


def test_a_plan_of_more_tokens_serves_fewer_if_its_tiles_are_nearly_full():
    problem = PROBLEM._replace(m=256, n=57344, k=8192)
    tiles = {
        plan.config.tokens: plan
        for plan in batch.candidates(problem, GPU)
        if plan.config.tokens in (128, 256)
    }
    assert set(tiles) == {128, 256}
    key = problem._replace(m=0)
    save_user({key: {256: Record(encode(tiles[128]), 9.0)}})
    found = {m: lookup(problem._replace(m=m), GPU) for m in (140, 192, 240, 250, 256)}
    assert found == {140: None, 192: None, 240: tiles[128], 250: tiles[128], 256: tiles[128]}
    save_user({key: {256: Record(encode(tiles[256]), 9.0)}})
    assert lookup(problem._replace(m=192), GPU) is None
    assert lookup(problem._replace(m=230), GPU) == tiles[256]


def test_what_is_not_known_is_left_to_the_heuristic():
    save_user({KEY: {8: record(3)}})
    for other in (KEY._replace(n=4112), KEY._replace(num_bits=3), KEY._replace(row_tables=True)):
        problem = other._replace(m=8)
        assert lookup(problem, GPU) is None
        assert choose(problem, GPU) == candidates(problem, GPU)[0]
    assert lookup(PROBLEM, Gpu()) is None
    assert lookup(PROBLEM, replace(GPU, num_sms=66)) is None
    assert choose(PROBLEM, GPU) == plan_at(3)
    assert choose(PROBLEM, replace(GPU, smem_bytes=1000)) == DensePlan()


@pytest.mark.parametrize(
    ("dtype", "scale_dtype", "known"),
    [
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "float16", True),
        ("float16", "bfloat16", True),
        ("float16", "float32", False),
    ],
)
def test_16_bit_types_share_figures(dtype, scale_dtype, known):
    save_user({KEY: {8: record(3)}})
    problem = PROBLEM._replace(dtype=dtype, scale_dtype=scale_dtype)
    plan = plan_at(3)
    expected = replace(plan, config=replace(plan.config, dtype=dtype, scale_dtype=scale_dtype))
    assert lookup(problem, GPU) == (expected if known else None)
    save_user({problem._replace(m=0): {8: record(5)}})
    exact = plan_at(5)
    assert lookup(problem, GPU) == replace(
        exact, config=replace(exact.config, dtype=dtype, scale_dtype=scale_dtype)
    )


GOOD = encode(plan_at(3))
STRANGE = {
    "another family": {"family": "quantum"},
    "no family": {"num_warps": 8},
    "a field of another version": {**GOOD, "warp_speed": 9},
    "a type": {**GOOD, "num_warps": "8"},
    "a bool for a number": {**GOOD, "stages": True},
    "a family that is no name": {**GOOD, "family": 3},
    "zero": {**GOOD, "panel": 0},
    "an unknown name": {**GOOD, "x_source": "tape"},
    "what no GPU holds": {**GOOD, "stages": 99},
    "another product's field": {**GOOD, "num_bits": 2},
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_plan_that_no_longer_fits_is_passed_over(case):
    save_user({KEY: {8: Record(STRANGE[case], 1.0)}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(PROBLEM, GPU) is None
        assert choose(PROBLEM, GPU) == plan_at(0)


def test_a_field_added_later_takes_its_default():
    older = {name: value for name, value in GOOD.items() if name != "x_rounds"}
    plan = decode(older, PROBLEM, GPU)
    assert plan == replace(plan_at(3), config=replace(plan_at(3).config, x_rounds=1))


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": 2, "plans": [], "entries": []}',
        b'{"format": 1, "plans": [], "entries": [{"n": 1}]}',
        b'{"format": 1, "plans": [], "entries": 3}',
    ],
)
def test_a_damaged_file_is_named_once_and_ignored(content):
    save(tuning.SHIPPED, {KEY: {8: record(2)}})
    path = tuning.user_folder() / tuning.file_name(GPU)
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"nvidia-h200-132sm\.json` cannot be read .* ignored"):
        assert lookup(PROBLEM, GPU) == plan_at(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(PROBLEM, GPU) == plan_at(2)
    with pytest.raises(FormatError, match=r"Remove the file"):
        tuning.write(path, GPU, {KEY: {8: record(1)}})
    assert path.read_bytes() == content


def test_the_users_folder_lies_beside_the_kernels(monkeypatch, tmp_path):
    assert tuning.user_folder() == tmp_path / "tuning"
    monkeypatch.delenv("FLUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / "flute" / "tuning"


def test_file_names_tell_gpus_apart():
    assert tuning.file_name(GPU) == "nvidia-h200-132sm.json"
    mig = Gpu(num_sms=60, name="NVIDIA A100-SXM4-40GB MIG 4g.20gb")
    assert tuning.file_name(mig) == "nvidia-a100-sxm4-40gb-mig-4g-20gb-60sm.json"


def test_descriptions_name_what_differs():
    plan = Plan(replace(KernelConfig(), num_warps=16, block_tokens=16), phases=2)
    assert tuning.describe(plan) == "decode phases=2 block_tokens=16 num_warps=16"
    assert tuning.describe(DensePlan()) == "dense"


SHIPPED = sorted((tuning.SHIPPED).glob("*.json"))
GPUS = {"nvidia-h200-132sm.json": GPU}
"""GPUs that plans ship for."""


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_every_shipped_plan_is_supported(path):
    gpu = GPUS[path.name]
    assert json.loads(path.read_text())["gpu"] == gpu.name
    store = tuning.read(path)
    assert store
    for key, measured in store.items():
        for m, found in measured.items():
            assert found.us > 0
            assert decode(found.plan, key._replace(m=m), gpu) is not None, (key, m, found)
