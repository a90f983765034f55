"""One OpenAI client against `flute serve` and against vLLM: streams, load, requests cancelled."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from helpers import DEMO_MODEL, ROOT

from flute.cli import main
from flute.cli import serve as command
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

PROMPT = "The king of the country"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "flute",
    "OMP_NUM_THREADS": "1",
}
VLLM = ["flute.integrations.vllm", "vllm.entrypoints.openai.api_server"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("serve") / "w4"
    quantize_checkpoint(DEMO_MODEL, made, QuantizeOptions(4, 64, method="nf"))
    return str(made)


@pytest.fixture(scope="module", params=["flute", "vllm"])
def server(request, folder, tmp_path_factory):
    """The address of a server of the folder, as /v1."""
    pytest.importorskip("openai")
    port = free_port()
    if request.param == "vllm":
        pytest.importorskip("vllm")
        arguments = [*VLLM, "--model", folder, "--port", str(port), "--quantization", "flute"]
        arguments += ["--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
    else:
        pytest.importorskip("fastapi")
        pytest.importorskip("uvicorn")
        arguments = ["flute", "serve", folder, "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=os.environ | ENVIRONMENT,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            if is_up(port):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()


def is_up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_an_openai_client_under_load(server, folder):
    from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

    client = OpenAI(base_url=server, api_key="none", timeout=120)
    assert [model.id for model in client.models.list().data] == [folder]
    wanted = {"model": folder, "prompt": PROMPT, "temperature": 0}
    whole = client.completions.create(max_tokens=40, **wanted)
    assert whole.usage.completion_tokens == 40
    assert whole.choices[0].finish_reason == "length"
    text = whole.choices[0].text
    chunks = list(client.completions.create(max_tokens=40, stream=True, **wanted))
    assert len(chunks) > 10
    assert "".join(c.choices[0].text for c in chunks if c.choices) == text

    async def ask(i, asynchronous):
        stream = await asynchronous.completions.create(max_tokens=40, stream=True, **wanted)
        parts = []
        async for chunk in stream:
            parts += [choice.text for choice in chunk.choices]
            if i % 2 and len(parts) >= 3:
                await stream.close()
                return "".join(parts)
        return "".join(parts)

    async def load():
        async with AsyncOpenAI(base_url=server, api_key="none", timeout=120) as asynchronous:
            return await asyncio.gather(*(ask(i, asynchronous) for i in range(12)))

    texts = asyncio.run(load())
    assert texts[::2] == [text] * 6
    assert all(len(part) < len(text) and text.startswith(part) for part in texts[1::2])
    again = client.completions.create(max_tokens=40, **wanted)
    assert again.choices[0].text == text
    with pytest.raises((BadRequestError, NotFoundError)):
        client.completions.create(model="other", prompt=PROMPT)


@pytest.mark.parametrize("server", ["flute"], indirect=True)
def test_a_chat_without_a_template_is_refused_in_a_line(server, folder):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=server, api_key="none", timeout=120)
    said = [{"role": "user", "content": "Who are you?"}]
    with pytest.raises(BadRequestError, match=r"no chat template\. Use /v1/completions"):
        client.chat.completions.create(model=folder, messages=said)
    answer = client.completions.create(model=folder, prompt=PROMPT, max_tokens=2)
    assert answer.usage.completion_tokens == 2


def test_requests_of_clients_that_left_hold_nobody_up(server, folder):
    """A hundred answers of 200 tokens would take minutes; all but the last are cancelled."""
    from openai import AsyncOpenAI

    async def run():
        async with AsyncOpenAI(base_url=server, api_key="none", timeout=120) as client:

            async def ask(count, **more):
                wanted = {"model": folder, "prompt": PROMPT, "temperature": 0}
                return await client.completions.create(max_tokens=count, **wanted, **more)

            start = time.monotonic()
            await ask(200)
            alone = time.monotonic() - start
            asked = [asyncio.create_task(ask(200, stream=i % 4 == 0)) for i in range(100)]
            await asyncio.sleep(alone / 2)
            for task in asked:
                task.cancel()
            ended = await asyncio.gather(*asked, return_exceptions=True)
            cancelled = [e for e in ended if isinstance(e, asyncio.CancelledError)]
            assert len(cancelled) > 50
            for stream in (s for s in ended if not isinstance(s, BaseException)):
                if hasattr(stream, "close"):
                    await stream.close()
            start = time.monotonic()
            answer = await ask(20)
            return alone, time.monotonic() - start, answer.usage.completion_tokens

    alone, waited, count = asyncio.run(run())
    assert count == 20
    assert waited < 10 + 10 * alone, (alone, waited)


# ---- what is refused, before a model is loaded


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if line.startswith("error:"))


@pytest.fixture
def has_server(monkeypatch):
    monkeypatch.setattr(command, "_NEEDED", ())


def test_missing_packages_are_named(monkeypatch, folder, capsys):
    monkeypatch.setattr(command, "_NEEDED", ("no_such_server",))
    assert main(["serve", folder]) == 1
    error = one_line(capsys)
    assert "needs no_such_server" in error
    assert "pip install 'transformers[serving]'" in error


def test_a_taken_port_is_refused_at_once(has_server, folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", folder, "--host", "127.0.0.1", "--port", str(port)]) == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in one_line(capsys)
    assert main(["serve", folder, "--port", "99999"]) == 1
    assert "Cannot listen on localhost:99999" in one_line(capsys)


def test_folders_that_cannot_be_served(has_server, tmp_path, capsys):
    assert main(["serve", str(tmp_path / "absent")]) == 1
    assert "absent" in one_line(capsys)
    assert main(["serve", "me@example"]) == 1
    assert "stands for a revision" in one_line(capsys)
