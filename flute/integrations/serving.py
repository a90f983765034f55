"""transformers' own server, but for clients that go away, chats without template, its model list.

It finishes an answer nobody waits for, so that all other requests wait for minutes. Here the
request of a client that has closed its connection is cancelled, and generation stops at the next
token. Streams it ends itself. A chat with a model that has no chat template it ends by a traceback
and status 500; here it is refused in a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serve import Serve
from transformers.cli.serving import server, utils
from transformers.cli.serving.model_manager import ModelManager

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class CancelOnDisconnect:
    """ASGI middleware that cancels a request when its client closes the connection.

    Args:
        app: the ASGI application.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a connection, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        request = asyncio.ensure_future(self.app(scope, messages.get, send))
        watch = asyncio.ensure_future(self._forward(receive, messages))
        try:
            await asyncio.wait((request, watch), return_when=asyncio.FIRST_COMPLETED)
            if not request.done():  # the client is gone; a stream ends by the message it was sent
                await asyncio.wait((request,), timeout=0.1)
                request.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await request
        finally:
            watch.cancel()

    @staticmethod
    async def _forward(receive: Receive, messages: asyncio.Queue[Message]) -> None:
        message: Message = {}
        while message.get("type") != "http.disconnect":
            message = await receive()
            messages.put_nowait(message)


class RefuseChat:
    """ASGI middleware that refuses chats, for a model whose tokenizer has no chat template.

    Args:
        app: the ASGI application.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a connection, as ASGI has it."""
        if scope["type"] != "http" or scope["path"] != "/v1/chat/completions":
            await self.app(scope, receive, send)
            return
        told = (
            "The model's tokenizer has no chat template. Use /v1/completions, or put the template "
            "into the folder as chat_template.jinja and start the server again."
        )
        error = {"message": told, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()  # as OpenAI's clients read it
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends generation at the next token once it is set."""

    def __init__(self) -> None:
        self.is_set = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return, for each sequence, whether it ends here."""
        return torch.full((len(input_ids),), self.is_set.is_set(), device=input_ids.device)


class CancellableManager(utils.GenerateManager):  # type: ignore[misc]
    """transformers' sequential generation, whose answers in one piece stop when cancelled."""

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return what transformers' returns, or stop the generation and be cancelled."""
        stop = _Stop()
        stoppable = {**inputs, "stopping_criteria": StoppingCriteriaList([stop])}
        # Why shield: the thread that generates reports to this task, which must be there.
        generation = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, stoppable, *args, **kwargs)
        )
        try:
            return await asyncio.shield(generation)
        except asyncio.CancelledError:
            stop.is_set.set()
            raise


def serve(model: str, *, has_chat: bool, device: str, host: str, port: int) -> None:
    """Serve a model until interrupted.

    Args:
        model: a folder; its name as written is the model's name in requests.
        has_chat: whether its tokenizer has a chat template.
        device: as torch names it.
        host: address to listen on.
        port: to listen on.
    """
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "flute"}
    # Why: its own list is of the models in the Hub's cache, and fails where there is none.
    ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [entry])
    utils.GenerateManager = CancellableManager
    build = server.build_server

    def build_server(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        if not has_chat:
            app.add_middleware(RefuseChat)
        app.add_middleware(CancelOnDisconnect)
        return app

    server.build_server = build_server
    try:
        Serve(force_model=model, device=device, host=host, port=port, log_level="error")
    finally:
        server.build_server = build
