"""One language model in one library: what ``generate.py`` starts, with that library's Python.

Reads a line of JSON a request, {"prompt": text, "new": tokens}, and answers {"tokens": [...],
"seconds": s, "rss_mb": m}; greedy, nothing kept between requests. {"texts": [...], "file": path}
writes the logarithms of the next token's probabilities behind each text, (texts, vocabulary). The
first answer is how long it took to open, with two tokens to warm up.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Write = Callable[[str, int], list[int]]
Logits = Callable[[str], Any]  # (vocabulary,) behind a text; logarithms of probabilities do as well


def open_memopt(spec: dict[str, Any]) -> tuple[Write, Logits | None]:
    from memopt import Generator

    engine = Generator(spec["path"], spec["device"], spec["variant"], True, threads=spec["threads"])

    def write(prompt: str, new: int) -> list[int]:
        return list(engine.generate(prompt, max_new_tokens=new)[0].tokens)

    def logits(text: str) -> Any:
        ids = np.array([engine._tokenizer.encode(text).ids])
        decoder: Any = engine._chain.backend
        decoder.begin(1, ids.shape[1])
        return decoder.forward(ids, np.ones_like(ids), np.arange(ids.shape[1])[None])[0]

    return write, logits


def open_genai(spec: dict[str, Any]) -> tuple[Write, Logits | None]:
    import onnxruntime_genai as og

    config = og.Config(spec["path"])
    config.overlay(
        json.dumps(
            {"model": {"decoder": {"session_options": {"intra_op_num_threads": spec["threads"]}}}}
        )
    )
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)

    def write(prompt: str, new: int) -> list[int]:
        ids = tokenizer.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new, do_sample=False)
        generator, found = og.Generator(model, params), []
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found

    def logits(text: str) -> Any:
        ids = tokenizer.encode(text)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 1)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        return np.asarray(generator.get_logits()).reshape(-1)

    return write, logits


def open_openvino_genai(spec: dict[str, Any]) -> tuple[Write, Logits | None]:
    import openvino as ov
    import openvino_genai as genai
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    folder = Path(spec["work"])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "openvino_tokenizer.xml").is_file():
        made = convert_tokenizer(AutoTokenizer.from_pretrained(spec["path"]), with_detokenizer=True)
        for model, name in zip(made, ("tokenizer", "detokenizer"), strict=True):
            ov.save_model(model, folder / f"openvino_{name}.xml")
    for name in ("openvino_model.xml", "openvino_model.bin"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(spec["file"]).with_suffix(Path(name).suffix).absolute())
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((Path(spec["path"]) / name).read_bytes())
    pipe = genai.LLMPipeline(
        str(folder), "CPU", INFERENCE_NUM_THREADS=spec["threads"], **spec.get("options", {})
    )
    settings = genai.GenerationConfig()

    def write(prompt: str, new: int) -> list[int]:
        settings.max_new_tokens, settings.do_sample = new, False
        settings.apply_chat_template = False
        encoded = pipe.get_tokenizer().encode(prompt)
        return [int(token) for token in pipe.generate(encoded, settings).tokens[0]]

    return write, None  # it tells no logits; its graphs are the bundle's own


def open_llama(spec: dict[str, Any]) -> tuple[Write, Logits | None]:
    import xllamacpp as llama
    from tokenizers import Tokenizer

    params = llama.CommonParams()
    params.model.path = spec["path"]
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec["threads"]
    server = llama.Server(params)
    tokenizer = Tokenizer.from_file(spec["tokenizer"])

    def asked(prompt: str, new: int, **more: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "n_predict": new, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions({**request, **more})
        found: dict[str, Any] = json.loads(answer) if isinstance(answer, str) else answer
        return found

    def write(prompt: str, new: int) -> list[int]:
        answer = asked(prompt, new)
        # It tells the text and how many tokens it is of, not which.
        ids = tokenizer.encode(answer["choices"][0]["text"]).ids
        count = answer["usage"]["completion_tokens"]
        return [*ids[:count], *[-1] * (count - len(ids))]

    def logits(text: str) -> Any:
        # Of every token: the raw model's, before anything of sampling.
        answer = asked(text, 1, n_probs=tokenizer.get_vocab_size())
        (behind,) = answer["choices"][0]["logprobs"]["content"]
        found = np.full(tokenizer.get_vocab_size(), -np.inf)
        for token in behind["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    return write, logits


def open_transformers(spec: dict[str, Any]) -> tuple[Write, Logits | None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["path"])
    model = AutoModelForCausalLM.from_pretrained(spec["path"], dtype=torch.float32).eval()

    def write(prompt: str, new: int) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            found = model.generate(ids, max_new_tokens=new, do_sample=False)
        return [int(token) for token in found[0, ids.shape[1] :]]

    def logits(text: str) -> Any:
        with torch.inference_mode():
            return model(**tokenizer(text, return_tensors="pt")).logits[0, -1].numpy()

    return write, logits


def log_probabilities(logits: Any) -> Any:
    """Return the logarithm of the softmax, in float64."""
    values = np.asarray(logits, np.float64)
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


OPENERS = {
    "memopt": open_memopt,
    "onnxruntime-genai": open_genai,
    "openvino-genai": open_openvino_genai,
    "llama.cpp": open_llama,
    "transformers": open_transformers,
}


def main() -> None:
    """Open what the first line says, then answer a request a line."""
    # Libraries print to stdout: the answers go where it was.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    begin = time.perf_counter()
    write, logits = OPENERS[spec["kind"]](spec)
    write("The", 2)
    answer: dict[str, Any] = {"open_seconds": time.perf_counter() - begin}
    print(json.dumps(answer), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "texts" in request:
            if logits is not None:
                found = [log_probabilities(logits(text)) for text in request["texts"]]
                np.save(request["file"], np.stack(found))
            print(json.dumps({"known": logits is not None}), file=out, flush=True)
            continue
        begin = time.perf_counter()
        tokens = write(request["prompt"], request["new"])
        answer = {"tokens": tokens, "seconds": time.perf_counter() - begin}
        answer["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
