"""sentence-transformers behind the framework that memopt serves with: Starlette on uvicorn.

    python benchmarks/serve_peer.py FOLDER --port 8099

Requests wait for each other in a thread pool of one and are encoded as they come; with
``--batched`` those that came meanwhile are encoded together, which is what a careful user writes.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import threading
from typing import Any

import orjson
import uvicorn
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Queue:
    """Texts of several requests, encoded together by one thread."""

    def __init__(self, model: Any, batched: bool) -> None:
        self._model = model
        self._batched = batched
        self._waiting: queue.SimpleQueue[tuple[list[str], Any, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    async def encode(self, texts: list[str]) -> Any:
        """Return the vectors of one request."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.put((texts, loop, future))
        return await future

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while self._batched and not self._waiting.empty():
                batch.append(self._waiting.get())
            texts = [text for part, _, _ in batch for text in part]
            vectors = self._model.encode(
                texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False
            )
            start = 0
            for part, loop, future in batch:
                rows = vectors[start : start + len(part)]
                loop.call_soon_threadsafe(future.set_result, rows)
                start += len(part)


def main() -> None:
    """Serve one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--batched", action="store_true")
    given = parser.parse_args()
    work = Queue(SentenceTransformer(given.folder, device="cpu"), given.batched)

    async def embed(request: Request) -> Response:
        body = orjson.loads(await request.body())
        texts = body["inputs"]
        vectors = await work.encode([texts] if isinstance(texts, str) else texts)
        data = orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(data, media_type="application/json")

    async def ready(request: Request) -> Response:
        return Response(b"{}", media_type="application/json")

    app = Starlette(routes=[Route("/embed", embed, methods=["POST"]), Route("/ready", ready)])
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_config=None, access_log=False)


if __name__ == "__main__":
    main()
