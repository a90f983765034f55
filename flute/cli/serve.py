"""`flute serve`: an OpenAI-compatible server on a CPU or a GPU, transformers' own.

It answers one request after the other. For many users there is vLLM, which serves the same folders
(`flute.integrations.vllm`).
"""

from __future__ import annotations

import argparse
import socket
from importlib.util import find_spec
from typing import Any

from flute.cli.loading import load_tokenizer
from flute.console import add_device, pick_device, quiet_transformers, report
from flute.errors import CheckpointError, UnsupportedProblemError, reason_of

_NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")
_EPILOG = """\
examples:
  flute serve OUT
  flute serve OUT --device cpu --host 0.0.0.0 --port 8001

  curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"model": "OUT", "prompt": "Once upon a time", "max_tokens": 30, "stream": true}'

The model's name in a request is OUT as written on this command line; `/v1/models` says it too.
`/v1/chat/completions` needs a chat template in the model's tokenizer.
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="answer OpenAI requests",
        description="Serve a model through an OpenAI-compatible endpoint, streaming included.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a quantised or dense checkpoint")
    parser.add_argument("--host", default="localhost", help="address to listen on (localhost)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    add_device(parser, "run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the model and serve until interrupted."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedProblemError(
            f"The server needs {', '.join(missing)}, not installed here. Run "
            "`pip install 'transformers[serving]'` (or '.[serve]' from a clone)."
        )
    if "@" in args.model:
        raise CheckpointError(f"`{args.model}`: `@` stands for a revision. Rename the folder.")
    has_chat = getattr(load_tokenizer(args.model), "chat_template", None) is not None
    if not has_chat:
        report("Its tokenizer has no chat template: /v1/completions only, chats are refused.")
    _check_port(args.host, args.port)
    device = pick_device(args.device)
    quiet_transformers()
    # Why here: importing it takes seconds, and it needs what is looked for above.
    from flute.integrations.huggingface import register
    from flute.integrations.serving import serve

    register()
    report(f"Loading {args.model}; then it answers at http://{args.host}:{args.port}/v1")
    try:
        serve(args.model, has_chat=has_chat, device=device, host=args.host, port=args.port)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"`{args.model}` cannot be served: {reason_of(error)}.") from error
    return 0


def _check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on before a model is loaded.

    Raises:
        UnsupportedProblemError: it is taken, forbidden, or no address of this machine.
    """
    if not 0 < port < 65536:
        raise UnsupportedProblemError(f"Cannot listen on {host}:{port}: a port is 1 to 65535.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family, kind, protocol, _, address = found
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise UnsupportedProblemError(
            f"Cannot listen on {host}:{port}: {error}. Choose another --host or --port."
        ) from error
