"""Greedy text on a GPU: of the kernels, of vLLM, and of the dequantised model.

FLUTE_TEST_MODEL names a quantised folder to take instead of the demo model. fp16 sums of different
kernels differ in their last bits, so two texts may part where the two likeliest tokens are as good
as level; from there on they are other texts.

The engines that the chosen tests need start together, each a process of its own, while this one
computes what they are compared with. ``-s`` shows each step with its time, and vLLM's log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import DEMO_MODEL, ROOT
from transformers import AutoTokenizer

import flute
from flute.evaluate import read_text
from flute.linear import LutLinear
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

DEVICE = "cuda"
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 24, 64
NUM_ALONE = 3
"""Prompts that are also answered one at a time by the kernels and by the dequantised model."""
ROUNDS = 5
"""That the same prompts are answered one after the other, to see the same texts again."""
LEVEL = 0.05
"""Logits whose difference may change sign between kernels; their own rounding is 1 / 128."""
LIMIT = 300
"""Seconds that engines get, from the start of all of them."""
ENGINES = {
    "eager": {"eager": True, "num_sequences": 32},
    "graphs": {"num_sequences": 32},
    "dependent": {"num_sequences": 1, "rounds": ROUNDS, "environment": {"FLUTE_VLLM_PDL": "1"}},
    "serial": {"num_sequences": 1, "environment": {"FLUTE_VLLM_PDL": "0"}},
}

ENGINE = """
import json, pathlib, sys, time

def main():
    began = time.monotonic()
    work = pathlib.Path(sys.argv[1])
    asked = json.loads((work / "asked.json").read_text())

    def step(text):
        print(f"[{asked['name']}] {time.monotonic() - began:.1f} s: {text}", flush=True)

    from vllm import LLM, SamplingParams

    step("vLLM imported")
    engine = LLM(
        asked["folder"],
        dtype="float16",
        enforce_eager=asked["eager"],
        max_model_len=256,
        max_num_seqs=asked["num_sequences"],
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,  # a cached prompt is multiplied by other kernels
        compilation_config={"cudagraph_capture_sizes": asked["captured"]},
    )
    step("engine ready")
    inputs = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    count = asked["new_tokens"]
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    compiled = engine.llm_engine.vllm_config.compilation_config.inductor_compile_config
    rounds = []
    for _ in range(asked["rounds"]):
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
        rounds.append([list(out.outputs[0].token_ids) for out in outputs])
        step(f"round {len(rounds)} of {asked['rounds']}")
    answer = {"dependent": compiled.get("triton.enable_pdl", False), "rounds": rounds}
    (work / "answer.json").write_text(json.dumps(answer))

if __name__ == "__main__":
    main()
"""


class Step:
    """Says what begins, and how many seconds it took, at once: a run cut off shows where it was."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.began = time.monotonic()
        self.say("...")

    def __exit__(self, *_: object) -> None:
        self.say(f"{time.monotonic() - self.began:.1f} s")

    def say(self, text: str) -> None:
        sys.stdout.write(f"[test] {self.what}: {text}\n")
        sys.stdout.flush()


class Engine:
    """vLLM in a process of its own, which answers all prompts."""

    def __init__(self, name, folder, prompts, work):
        self.name, self.work, self.began = name, work, time.monotonic()
        options = {"eager": False, "rounds": 1, **ENGINES[name]}
        environment = options.pop("environment", {})
        batch = 24 if options["num_sequences"] > 1 else 1  # NUM_PROMPTS are padded to it
        asked = {"name": name, "folder": str(folder), "prompts": prompts.tolist(), **options}
        asked |= {"new_tokens": NEW_TOKENS, "captured": sorted({1, batch})}
        (work / "asked.json").write_text(json.dumps(asked))
        (work / "engine.py").write_text(ENGINE)
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(work / "engine.py"), str(work)],
            stderr=subprocess.STDOUT,  # both where this process prints: shown if a test fails
            env=os.environ | environment,
            cwd=work,
            start_new_session=True,
        )

    def answer(self):
        """Return whether it launched dependently, and the texts of each round."""
        left = max(1.0, LIMIT - (time.monotonic() - self.began))
        with Step(f"waiting for vLLM, {self.name}"):
            try:
                code = self.process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                pytest.fail(f"vLLM, {self.name}: no end in {LIMIT} s; its last line says where.")
        answer = self.work / "answer.json"
        assert answer.exists(), f"vLLM, {self.name}: ended with {code}; its output is above."
        return json.loads(answer.read_text())

    def end(self):
        """Kill it, and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


@pytest.fixture(scope="module", params=[None, 4], ids=["dense head", "quantised head"])
def folder(request, tmp_path_factory):
    if given := os.environ.get("FLUTE_TEST_MODEL"):
        if request.param:
            pytest.skip("FLUTE_TEST_MODEL is as it is")
        return Path(given)
    made = tmp_path_factory.mktemp("serving") / "w4"
    options = QuantizeOptions(4, 128, scale_dtype="float16", head_bits=request.param)
    with Step("quantising the demo model"):
        quantize_checkpoint(DEMO_MODEL, made, options)
    return made


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(read_text("wikitext2"), return_tensors="pt").input_ids[0]
    return ids[: NUM_PROMPTS * PROMPT_TOKENS].view(NUM_PROMPTS, PROMPT_TOKENS)


@pytest.fixture(scope="module")
def engines(request, folder, prompts, tmp_path_factory):
    """Those that the chosen tests ask for, all started."""
    called = [getattr(item, "callspec", None) for item in request.session.items]
    names = {call.params["engine"] for call in called if call and "engine" in call.params}
    if not find_spec("vllm"):
        names = set()
    work = {name: tmp_path_factory.mktemp(name) for name in ENGINES if name in names}
    started = {name: Engine(name, folder, prompts, work[name]) for name in work}
    yield started
    for engine in started.values():
        engine.end()


@pytest.fixture(scope="module")
def model(engines, folder):
    """Loaded once the engines have started, with all of its kernels compiled."""
    with Step("loading the model and compiling its kernels"):
        return flute.from_pretrained(folder, dtype=torch.float16, device_map=DEVICE).eval()


@pytest.fixture(scope="module")
def texts(model, prompts):
    with Step(f"{NUM_PROMPTS} texts of {NEW_TOKENS} tokens by transformers, together"):
        return greedy(model, prompts)


def greedy(model, prompts):
    """Return what follows each prompt, all of them in one batch."""
    ids = prompts.to(DEVICE)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].tolist()


def check(model, prompts, texts, others, name):
    """Texts are equal, or part where the model holds two tokens for level; prints how many."""
    equal, gaps = 0, []
    for prompt, text, other in zip(prompts, texts, others, strict=True):
        assert len(text) == len(other) == NEW_TOKENS
        if text == other:
            equal += 1
            continue
        first = next(i for i in range(NEW_TOKENS) if text[i] != other[i])
        ids = torch.cat([prompt, torch.tensor(text[:first], dtype=prompt.dtype)])
        with torch.no_grad():
            logits = model(ids[None].to(DEVICE)).logits[0, -1].float()
        gaps.append(float(abs(logits[text[first]] - logits[other[first]])))
    sys.stdout.write(f"{name}: {equal} of {len(texts)} equal; gaps where others part: {gaps}\n")
    assert equal >= len(texts) // 2
    assert all(gap < LEVEL for gap in gaps), gaps


def test_kernels_write_what_the_dequantised_model_writes(folder, model, prompts, texts):
    dense = flute.from_pretrained(folder, dtype=torch.float16, device_map=DEVICE).eval()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, LutLinear):
            linear = torch.nn.Linear(1, 1, bias=False)
            linear.weight = torch.nn.Parameter(layer.dequantize().half(), requires_grad=False)
            dense.set_submodule(name, linear)
    with Step("texts of the dequantised model, together"):
        check(model, prompts, texts, greedy(dense, prompts), "dequantised")
    with Step(f"{NUM_ALONE} texts of both, one at a time"):
        own, other = (
            [greedy(m, prompts[i : i + 1])[0] for i in range(NUM_ALONE)] for m in (model, dense)
        )
    check(model, prompts[:NUM_ALONE], own, other, "dequantised, one at a time")


@pytest.mark.parametrize("engine", ["eager", "graphs"])
def test_vllm_writes_what_transformers_writes(engines, model, prompts, texts, engine):
    pytest.importorskip("vllm")
    (others,) = engines[engine].answer()["rounds"]
    check(model, prompts, texts, others, f"vLLM, {engine}")


@pytest.mark.parametrize("engine", ["dependent", "serial"])
def test_one_request_at_a_time_writes_the_same_again(engines, model, prompts, texts, engine):
    """A kernel that started before what it reads is there would write another text at times."""
    pytest.importorskip("vllm")
    answer = engines[engine].answer()
    assert answer["dependent"] == (engine == "dependent")
    first = answer["rounds"][0]
    assert all(texts_ == first for texts_ in answer["rounds"])
    check(model, prompts, texts, first, f"vLLM, graphs of one token, {engine} launches")
