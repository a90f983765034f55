"""Greedy text on a GPU: of the kernels, of vLLM, and of the dequantised model.

FLUTE_TEST_MODEL names a quantised folder to take instead of the demo model. fp16 sums of different
kernels differ in their last bits, so two texts may part where the two likeliest tokens are as good
as level; from there on they are other texts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEMO_MODEL, python
from transformers import AutoTokenizer

import flute
from flute.evaluate import read_text
from flute.linear import LutLinear
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 24, 64
ROUNDS = 10
"""That the same prompts are answered one after the other."""
LEVEL = 0.05
"""Logits whose difference may change sign between kernels; their own rounding is 1 / 128."""

ENGINE = """
import json, pathlib, sys

def main():
    from vllm import LLM, SamplingParams

    folder, options, work, count, num_sequences, rounds = sys.argv[1:]
    engine = LLM(
        folder,
        max_model_len=256,
        max_num_seqs=int(num_sequences),
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,  # a cached prompt is multiplied by other kernels
        **json.loads(options),
    )
    work = pathlib.Path(work)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads((work / "prompts.json").read_text())]
    sampling = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True)
    compiled = engine.llm_engine.vllm_config.compilation_config.inductor_compile_config
    print("dependent launches:", compiled.get("triton.enable_pdl", False))
    texts = []
    for _ in range(int(rounds)):
        outputs = engine.generate(inputs, sampling)
        texts.append([list(out.outputs[0].token_ids) for out in outputs])
    (work / "texts.json").write_text(json.dumps(texts))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module", params=[None, 4], ids=["dense head", "quantised head"])
def folder(request, tmp_path_factory):
    if given := os.environ.get("FLUTE_TEST_MODEL"):
        if request.param:
            pytest.skip("FLUTE_TEST_MODEL is as it is")
        return Path(given)
    made = tmp_path_factory.mktemp("serving") / "w4"
    options = QuantizeOptions(4, 128, scale_dtype="float16", head_bits=request.param)
    quantize_checkpoint(DEMO_MODEL, made, options)
    return made


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(read_text("wikitext2"), return_tensors="pt").input_ids[0]
    return ids[: NUM_PROMPTS * PROMPT_TOKENS].view(NUM_PROMPTS, PROMPT_TOKENS)


@pytest.fixture(scope="module")
def model(folder):
    return flute.from_pretrained(folder, dtype=torch.float16, device_map="cuda").eval()


@pytest.fixture(scope="module")
def texts(model, prompts):
    return [greedy(model, prompt) for prompt in prompts]


def greedy(model, prompt):
    ids = prompt[None].cuda()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


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
            logits = model(ids[None].cuda()).logits[0, -1].float()
        gaps.append(float(abs(logits[text[first]] - logits[other[first]])))
    sys.stdout.write(f"{name}: {equal} of {len(texts)} equal; gaps where others part: {gaps}\n")
    assert equal >= len(texts) // 2
    assert all(gap < LEVEL for gap in gaps), gaps


def test_kernels_write_what_the_dequantised_model_writes(folder, model, prompts, texts):
    dense = flute.from_pretrained(folder, dtype=torch.float16, device_map="cuda").eval()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, LutLinear):
            linear = torch.nn.Linear(1, 1, bias=False)
            linear.weight = torch.nn.Parameter(layer.dequantize().half(), requires_grad=False)
            dense.set_submodule(name, linear)
    check(model, prompts, texts, [greedy(dense, prompt) for prompt in prompts], "dequantised")


def serve(folder, prompts, work, eager, num_sequences=32, rounds=1, **environment):
    """Return what vLLM writes in each round, and what its process printed."""
    pytest.importorskip("vllm")
    (work / "engine.py").write_text(ENGINE)
    (work / "prompts.json").write_text(json.dumps(prompts.tolist()))
    code = f"import runpy; runpy.run_path({str(work / 'engine.py')!r}, run_name='__main__')"
    options = json.dumps({"dtype": "float16", "enforce_eager": eager})
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    arguments = (folder, options, work, NEW_TOKENS, num_sequences, rounds)
    process = python(code, *arguments, **environment)
    printed, _ = process.communicate(timeout=400)
    answers = work / "texts.json"
    assert answers.exists(), printed[-4000:]
    return json.loads(answers.read_text()), printed


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_vllm_writes_what_transformers_writes(folder, model, prompts, texts, eager, tmp_path):
    (others,), _ = serve(folder, prompts, tmp_path, eager)
    check(model, prompts, texts, others, f"vLLM, {'eager' if eager else 'graphs'}")


@pytest.mark.parametrize("dependent", ["1", "0"], ids=["dependent", "serial"])
def test_one_request_at_a_time_writes_the_same_again(
    folder, model, prompts, texts, dependent, tmp_path
):
    """A kernel that started before what it reads is there would write another text at times."""
    environment = {"FLUTE_VLLM_PDL": dependent}
    rounds, printed = serve(folder, prompts, tmp_path, False, 1, ROUNDS, **environment)
    assert f"dependent launches: {dependent == '1'}" in printed
    assert all(round_ == rounds[0] for round_ in rounds)
    name = f"vLLM, graphs of one token, dependent launches {dependent}"
    check(model, prompts, texts, rounds[0], name)
