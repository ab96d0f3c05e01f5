"""Every route beside the engine behind it."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import httpx
import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.runtimes.task_engine import open_task
from tests.serve.conftest import events

TEXTS = ["a cat sat on the mat", "été 猫 🙂", "the stock market fell by 3 % today " * 30]


@pytest.fixture(scope="module")
def engine(minilm: Bundle) -> Any:
    """The engine that the server has too."""
    with open_task(minilm) as opened:
        yield opened


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    """The answer's JSON, which must be one."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_openai_embeddings(served: httpx.Client, engine: Any) -> None:
    """As numbers, as base64, cut, of one text, of token ids; and how many tokens were read."""
    expected = engine.encode(TEXTS)
    body = post(served, "/v1/embeddings", input=TEXTS, model="minilm")
    found = np.array([row["embedding"] for row in body["data"]], np.float32)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert [row["index"] for row in body["data"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] > 200
    packed = post(served, "/v1/embeddings", input=TEXTS, encoding_format="base64")
    rows = [np.frombuffer(base64.b64decode(r["embedding"]), "<f4") for r in packed["data"]]
    np.testing.assert_allclose(np.stack(rows), expected, atol=2e-3)
    short = post(served, "/v1/embeddings", input=TEXTS[0], dimensions=8)["data"][0]["embedding"]
    assert len(short) == 8
    assert np.linalg.norm(short) == pytest.approx(1, abs=1e-5)
    ids = [t["id"] for t in post(served, "/tokenize", inputs=TEXTS[0])[0]]
    same = post(served, "/v1/embeddings", input=[ids])["data"][0]["embedding"]
    np.testing.assert_allclose(same, expected[0], atol=2e-3)


def test_openai_client_library_speaks_to_it(served: httpx.Client, engine: Any) -> None:
    """The official client, where it is installed, asks in base64 and unpacks it."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none")
    found = client.embeddings.create(model="minilm", input=TEXTS)
    np.testing.assert_allclose(found.data[0].embedding, engine.encode(TEXTS[0]), atol=2e-3)


def test_arrow(served: httpx.Client, engine: Any) -> None:
    """The vectors as they lie in memory."""
    import pyarrow as pa

    headers = {"accept": "application/vnd.apache.arrow.stream"}
    answer = served.post("/embed", json={"inputs": TEXTS}, headers=headers)
    table = pa.ipc.open_stream(answer.content).read_all()
    rows = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(rows, engine.encode(TEXTS), atol=2e-3)


def test_tei_routes(served: httpx.Client, engine: Any) -> None:
    """/embed with and without normalising, /similarity, /info."""
    raw = post(served, "/embed", inputs=TEXTS[:1], normalize=False)
    np.testing.assert_allclose(raw, engine.encode(TEXTS[:1], normalize=False), atol=5e-3)
    sentences = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    vectors = engine.encode(TEXTS)
    found = post(served, "/similarity", inputs=sentences)
    np.testing.assert_allclose(found, vectors[1:] @ vectors[0], atol=2e-3)
    info = served.get("/info").json()
    assert (info["model_id"], info["max_input_length"]) == ("minilm", 256)


def test_reranking_in_both_forms(served: httpx.Client, small: dict[str, Bundle]) -> None:
    """Cohere's and TEI's, the best first, as the engine orders them."""
    with open_task(small["reranker"]) as reranker:
        expected = reranker.rank("cats", TEXTS)
    cohere = post(
        served, "/v1/rerank", query="cats", documents=[TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]],
        top_n=2, return_documents=True,
    )  # fmt: skip
    assert [row["index"] for row in cohere["results"]] == [int(i) for i in expected.order[:2]]
    assert cohere["results"][0]["document"] == {"text": TEXTS[int(expected.order[0])]}
    tei = post(served, "/rerank", query="cats", texts=TEXTS, return_text=True)
    assert [row["index"] for row in tei] == [int(i) for i in expected.order]
    np.testing.assert_allclose([row["score"] for row in tei], expected.scores, atol=2e-3)


def test_labels_words_and_tags(served: httpx.Client, small: dict[str, Bundle]) -> None:
    """One text gives one answer, several a list; pairs are taken too."""
    with open_task(small["labels"]) as classifier:
        expected = classifier.classify(TEXTS)
    one = post(served, "/predict", inputs=TEXTS[0])
    assert [row["label"] for row in one] == list(expected[0].labels)
    several = post(served, "/classify", inputs=[TEXTS[0], ["a", "b"]])
    assert [row["label"] for row in several[0]] == [row["label"] for row in one]
    assert len(several) == 2
    with open_task(small["sparse"]) as sparse:
        columns, values = sparse.encode(TEXTS[:1])[0]
    words = post(served, "/embed_sparse", inputs=TEXTS[:1])[0]
    assert [word["index"] for word in words] == columns.tolist()
    np.testing.assert_allclose([word["value"] for word in words], values, atol=2e-3)
    with open_task(small["tags"]) as tagger:
        spans = tagger.tag(TEXTS[:1])[0]
    assert len(post(served, "/tag", inputs=TEXTS[:1])[0]) == len(spans)


def test_writing_whole_and_in_pieces(served: httpx.Client, writer: Bundle) -> None:
    """The pieces are the whole text; usage counts; greedy as the engine writes."""
    ask = {"prompt": "the cat", "max_tokens": 8, "model": "llama"}
    whole = post(served, "/v1/completions", **ask)
    with open_task(writer) as generator:
        written = generator.generate("the cat", max_new_tokens=8)[0]
    assert whole["choices"][0]["text"] == written.text
    assert whole["usage"]["completion_tokens"] == len(written.tokens)
    stream = events(served.post("/v1/completions", json={**ask, "stream": True}).text)
    assert stream[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in stream[:-1]) == written.text
    assert stream[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    messages = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    chat = post(served, "/v1/chat/completions", messages=messages, max_tokens=4)
    assert chat["choices"][0]["message"]["role"] == "assistant"
    parts = events(
        served.post(
            "/v1/chat/completions", json={"messages": messages, "max_tokens": 4, "stream": True}
        ).text
    )
    said = "".join(part["choices"][0]["delta"].get("content", "") for part in parts[:-1])
    assert said == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/embeddings", {"input": ""}, 200, ""),
        ("/v1/embeddings", {"input": []}, 400, "empty"),
        ("/v1/embeddings", {"input": ["a", 3]}, 400, "mixes"),
        ("/v1/embeddings", {"input": 3}, 422, "input"),
        ("/v1/embeddings", {"input": "a", "model": "nope"}, 404, "there are: minilm"),
        ("/v1/embeddings", {"input": "a", "model": "labels"}, 400, "score for each label"),
        ("/v1/embeddings", {"input": "a", "dimensions": 999}, 400, "384"),
        ("/v1/embeddings", {"input": [[999_999]]}, 400, "input 0 has tokens beyond"),
        ("/v1/embeddings", {"input": "a", "prompt_name": "quary"}, 400, "quary"),
        ("/embed", {"inputs": ["a"] * 3000}, 413, "2048"),
        ("/rerank", {"query": "a"}, 400, "documents"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 400, "input 0"),
        ("/v1/completions", {"prompt": "", "max_tokens": 2}, 400, "empty"),
        ("/v1/completions", {"prompt": "", "max_tokens": 2, "stream": True}, 400, "empty"),
        ("/v1/chat/completions", {"messages": []}, 422, "messages"),
        ("/v1/embeddings/media", {"input": "http://x/y.png"}, 400, "no model here"),
        ("/models/nope/reload", {}, 404, "no model 'nope'"),
        ("/nowhere", {}, 404, "no route"),
    ],
)
def test_what_is_wrong_is_said(
    served: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    """One line that names it, in the form of the route's clients."""
    answer = served.post(path, json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert words in (error["message"] if path.startswith("/v1/") else error)


def test_bodies_that_are_no_json(served: httpx.Client) -> None:
    """Broken, of another kind, too deep, of another method."""
    kind = {"content-type": "application/json"}
    assert served.post("/embed", content=b'{"inputs": ', headers=kind).status_code == 400
    assert served.post("/embed", content=b'{"inputs": "\xff"}', headers=kind).status_code in (
        400,
        422,
    )
    assert served.post("/embed", content=b"[" * 100_000, headers=kind).status_code in (400, 422)
    assert served.post("/embed", content=b"inputs=a").status_code == 415
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    told = served.post("/embed", content=gzip.compress(b'{"inputs": "a"}'), headers=packed)
    assert told.status_code == 415
    assert "Content-Encoding 'gzip'" in told.json()["error"]
    assert served.get("/embed").status_code == 405


def test_pictures_as_data_urls_and_forms(pictures: Bundle, picture: str) -> None:
    """An image model's vectors of bytes sent both ways are the engine's of the file."""
    from tests.serve.conftest import running

    data = base64.b64decode(picture.partition(",")[2])
    with open_task(pictures) as engine:
        expected = engine.encode([data])[0]
    with running({"vit": pictures.path}) as (client, _):
        sent = post(client, "/v1/embeddings/media", input=picture)
        np.testing.assert_allclose(sent["data"][0]["embedding"], expected, atol=1e-4)
        files = {"file": ("a.png", data, "image/png")}
        form = client.post("/v1/embeddings/media", files=files).json()
        np.testing.assert_allclose(form["data"][0]["embedding"], expected, atol=1e-4)
        broken = client.post("/v1/embeddings/media", json={"input": "data:image/png;base64,AAAA"})
        assert broken.status_code == 400
        assert "input 0" in broken.json()["error"]["message"]
