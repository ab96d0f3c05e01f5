"""A real server on loopback over small models of every task."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.serve.app import make_app
from memopt.serve.guard import Admission
from memopt.serve.hosting import Capacity, Host

Running = Callable[..., Any]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@contextmanager
def running(
    models: dict[str, Path], limits: Capacity | None = None, **further: Any
) -> Iterator[tuple[httpx.Client, Host]]:
    """Serve on a free port until the block ends."""
    import uvicorn

    host = Host(models, limits or Capacity(), {"verify": "never"})
    app = make_app(host, access=further.pop("access", Admission()), **further)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server died"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client, host
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, minilm: Bundle) -> dict[str, Bundle]:
    """Two-layer models of random weights: a classifier, a reranker, SPLADE, a tagger, ColBERT."""
    import torch
    import transformers as hf

    from memopt.exporters.base import export
    from memopt.weights.convert import convert

    tokenizer = hf.AutoTokenizer.from_pretrained(minilm.path)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "intermediate_size": 64, "initializer_range": 0.4}
    found = {}
    for name, model, task, more in (
        ("labels", "BertForSequenceClassification", "text-classification", {"num_labels": 3}),
        ("reranker", "BertForSequenceClassification", "reranking", {"num_labels": 1}),
        ("sparse", "BertForMaskedLM", "sparse-embedding", {}),
        ("tags", "BertForTokenClassification", "token-classification", {"num_labels": 3}),
        ("late", "BertModel", "late-interaction", {}),
    ):
        torch.manual_seed(7)
        folder = tmp_path_factory.mktemp(name) / "source"
        getattr(hf, model)(hf.BertConfig(**sizes, **more)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bundle = convert(str(folder), folder.parent / name, task=task)
        export(bundle)
        found[name] = open_bundle(bundle.path)
    return found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A one-layer ViT of random weights."""
    import torch
    import transformers as hf

    from memopt.exporters.base import export
    from memopt.weights.convert import convert

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.ViTConfig(**sizes, intermediate_size=16, image_size=16, patch_size=8)
    hf.ViTModel(config).save_pretrained(folder / "vit")
    hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    bundle = convert(str(folder / "vit"), folder / "bundle")
    export(bundle)
    return open_bundle(bundle.path)


@pytest.fixture(scope="session")
def picture() -> str:
    """A PNG as a data URL."""
    import base64
    import io

    from PIL import Image

    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@pytest.fixture(scope="session")
def writer(talker: tuple[Bundle, Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny Llama with a chat template."""
    import shutil

    folder = tmp_path_factory.mktemp("writer") / "llama"
    shutil.copytree(talker[0].path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def served(minilm: Bundle, small: dict[str, Bundle], writer: Bundle) -> Iterator[httpx.Client]:
    """One server of them all."""
    paths = {"minilm": minilm.path, "llama": writer.path}
    paths |= {name: bundle.path for name, bundle in small.items()}
    with running(paths) as (client, _):
        yield client


def events(text: str) -> list[Any]:
    """The values of a stream of server-sent events, [DONE] as it is."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
