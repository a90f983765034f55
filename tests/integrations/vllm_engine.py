"""vLLM's engine on a CPU, in a process of its own: what it answers, or what it printed."""

from __future__ import annotations

import json

from helpers import python

PROMPTS = ["The king of the country", "Once upon a time", "In 1943 , the ship"]
ENGINE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams

    folder, options, prompts, num_tokens, out, *adapter = sys.argv[1:]
    llm = LLM(folder, **json.loads(options))
    greedy = SamplingParams(temperature=0, max_tokens=int(num_tokens), ignore_eos=True)
    asked = {}
    if adapter:
        from vllm.lora.request import LoRARequest

        asked = {"lora_request": LoRARequest("adapter", 1, adapter[0])}
    given = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in json.loads(prompts)]
    outputs = llm.generate(given, greedy, **asked)
    with open(out, "w") as file:
        json.dump([list(output.outputs[0].token_ids) for output in outputs], file)

if __name__ == "__main__":
    main()
"""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "flute",
}


def serve(
    folder, work, environment=None, adapter=None, *, prompts=PROMPTS, num_tokens=24, **options
):
    """Return each prompt's greedy tokens, or what the engine printed when it failed.

    Args:
        folder: the model.
        work: a folder to write in.
        environment: variables besides `ENVIRONMENT`.
        adapter: a folder with a LoRA adapter.
        prompts: texts, or lists of tokens.
        num_tokens: of each answer.
        **options: of vLLM's `LLM`.
    """
    out = work / "tokens.json"
    out.unlink(missing_ok=True)
    (work / "engine.py").write_text(ENGINE)
    code = f"import runpy; runpy.run_path({str(work / 'engine.py')!r}, run_name='__main__')"
    options = {"max_model_len": 128, "max_num_seqs": 4, **options}
    arguments = [folder, json.dumps(options), json.dumps(prompts), num_tokens, out]
    arguments += [adapter] if adapter else []
    process = python(code, *arguments, **ENVIRONMENT, **(environment or {}))
    printed, _ = process.communicate(timeout=500)
    return json.loads(out.read_text()) if out.exists() else printed
