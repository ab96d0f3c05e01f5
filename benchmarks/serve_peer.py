"""A peer behind the framework that memopt serves with: Starlette on uvicorn.

    python benchmarks/serve_peer.py sentence-transformers FOLDER --port 8099
    python benchmarks/serve_peer.py fastembed FOLDER --graph model.onnx --port 8099

Requests that came while a batch was encoded are encoded together, in one thread, which is what a
careful user writes. It runs in the peer's own environment: nothing of memopt is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

BATCH = 64  # texts
Encode = Callable[[list[str]], Any]


def sentence_transformers(folder: str, graph: str) -> Encode:
    """Open the folder in torch."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return lambda texts: model.encode(
        texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
    )


def fastembed(folder: str, graph: str) -> Encode:
    """Open one graph of the folder in onnxruntime, the way fastembed takes others' models."""
    import json
    from pathlib import Path

    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    size = json.loads(Path(folder, "config.json").read_text())["hidden_size"]
    TextEmbedding.add_custom_model(
        "local/model",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/model"),
        dim=size,
        model_file=graph,
    )
    model = TextEmbedding("local/model", specific_model_path=folder)
    return lambda texts: np.stack(list(model.embed(texts, batch_size=BATCH)))


class Queue:
    """Texts of several requests, encoded together by one thread."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
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
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            vectors = self._encode([text for part, _, _ in batch for text in part])
            start = 0
            for part, loop, future in batch:
                rows = vectors[start : start + len(part)]
                loop.call_soon_threadsafe(_give, future, rows)
                start += len(part)


def _give(future: Any, rows: Any) -> None:
    if not future.done():  # its client may have gone
        future.set_result(rows)


def main() -> None:
    """Serve one folder."""
    kinds = {"sentence-transformers": sentence_transformers, "fastembed": fastembed}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(kinds))
    parser.add_argument("folder")
    parser.add_argument("--graph", default="model.onnx")
    parser.add_argument("--port", type=int, default=8099)
    given = parser.parse_args()
    work = Queue(kinds[given.kind](given.folder, given.graph))

    async def embed(request: Request) -> Response:
        body = orjson.loads(await request.body())
        texts = body["inputs"]
        vectors = await work.encode([texts] if isinstance(texts, str) else texts)
        data = orjson.dumps(np.ascontiguousarray(vectors), option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(data, media_type="application/json")

    async def ready(request: Request) -> Response:
        return Response(b"{}", media_type="application/json")

    app = Starlette(routes=[Route("/embed", embed, methods=["POST"]), Route("/ready", ready)])
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_config=None, access_log=False)


if __name__ == "__main__":
    main()
