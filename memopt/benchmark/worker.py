"""One contender of a benchmark in its own process; run by path, so it needs no memopt installed.

It reads one JSON command per line from stdin and answers with one JSON line on stdout:
``open``, ``encode`` (all inputs, timed), ``adapt`` (one input at a time), ``single`` (so too, each
timed), ``memory``, and of memopt's own ``variants`` (what answered) and ``kernels`` (what ran, with
its share of the time).
Inputs travel as a file once, vectors come back as ``.npy``, so that pipes carry numbers only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Standard output is the protocol; whatever a library prints goes to standard error.
_PROTOCOL = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

Encode = Callable[[list[Any]], Any]
# For so long, or so many passes over the inputs, whichever ends first.
ADAPTING = (3.0, 4)
# Untimed at the start of each turn: threads slept, and caches hold what the others worked on.
WAKING = (0.15, 4)


class Memopt:
    """memopt's own engine of the bundle's task.

    Raises:
        RuntimeError: another variant answers than the one that is to be measured.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from memopt.runtimes.task_engine import open_task

        self._engine = engine = open_task(
            spec["path"],
            device=spec.get("device", "auto"),
            variant=spec.get("variant", "auto"),
            streams=spec.get("streams"),
            threads=spec.get("threads"),
            openvino_options=spec.get("openvino_options"),
        )
        # `auto` is whatever opens here; of what was asked for by name, another one says nothing.
        auto = spec.get("variant", "auto") == spec.get("device", "auto") == "auto"
        if engine.events and not (auto and engine.events[-1].kind == "unavailable"):
            raise RuntimeError(f"fell back: {engine.events[0]}")
        self._known = len(engine.events)

    def __call__(self, inputs: list[Any]) -> Any:
        answers = self._engine.comparable(inputs)
        for event in self._engine.events[self._known :]:
            # Else a batch was halved for want of memory.
            if (event.from_, event.from_variant) != (event.to, event.to_variant):
                raise RuntimeError(f"fell back: {event}")
        return answers

    def variants(self) -> dict[str, str]:
        """Say what answered: of batches, and of single inputs where that is another."""
        told = self._engine.device_info()
        answering = {
            "batches": told,
            **({"single inputs": told["single"]} if told["single"] else {}),
        }
        return {what: f"{by['variant']} on {by['device']}" for what, by in answering.items()}


def open_sentence_transformers(spec: dict[str, Any]) -> Encode:
    """sentence-transformers with its torch, onnx or openvino backend, batch size 32 (default).

    ``class`` names another of its models than SentenceTransformer.
    """
    import sentence_transformers

    arguments: dict[str, Any] = {"device": "cpu", "backend": spec.get("backend", "torch")}
    if spec.get("file_name"):
        arguments["model_kwargs"] = {"file_name": spec["file_name"]}
    if spec.get("provider"):
        arguments.setdefault("model_kwargs", {})["provider"] = spec["provider"]
    if spec.get("ov_config"):
        arguments.setdefault("model_kwargs", {})["ov_config"] = spec["ov_config"]
    kind = spec.get("class", "SentenceTransformer")
    model = getattr(sentence_transformers, kind)(spec["path"], **arguments)
    if kind == "CrossEncoder":
        return lambda pairs: model.predict(pairs, show_progress_bar=False)[:, None]
    if kind == "SparseEncoder":
        return lambda texts: model.encode(
            texts, convert_to_sparse_tensor=False, show_progress_bar=False
        ).numpy()
    if kind == "MultiVectorEncoder":
        return lambda texts: model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
    return lambda inputs: model.encode(inputs, show_progress_bar=False)


def open_fastembed(spec: dict[str, Any]) -> Encode:
    """fastembed's custom-model path on the bundle's own ONNX file."""
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    name = "memopt/bundle"
    pooling = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS}[spec.get("pooling", "mean")]
    TextEmbedding.add_custom_model(
        model=name,
        pooling=pooling,
        normalization=spec.get("normalize", True),
        sources=ModelSource(hf=name),
        dim=spec["dimension"],
        model_file=spec.get("file_name", "onnx/model.onnx"),
    )
    model = TextEmbedding(name, specific_model_path=spec["path"])
    return lambda inputs: np.stack(list(model.embed(inputs)))


def open_optimum(spec: dict[str, Any]) -> Encode:
    """optimum's ONNX Runtime model class with transformers' tokenizer, batches of 32."""
    import numpy as np
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    model = ORTModelForFeatureExtraction.from_pretrained(
        spec["path"], subfolder="onnx", file_name="model.onnx"
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["path"])

    def pool(hidden: Any, mask: Any) -> Any:
        if spec.get("pooling", "mean") == "cls":
            return hidden[:, 0]
        weight = mask[..., None].astype(hidden.dtype)
        return (hidden * weight).sum(1) / np.maximum(weight.sum(1), 1e-9)

    def encode(inputs: list[str]) -> Any:
        rows = []
        for start in range(0, len(inputs), 32):
            batch = tokenizer(
                inputs[start : start + 32],
                padding=True,
                truncation=True,
                max_length=spec.get("max_length", 256),
                return_tensors="np",
            )
            hidden = np.asarray(model(**batch).last_hidden_state)
            pooled = pool(hidden, batch["attention_mask"])
            if spec.get("normalize", True):
                pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
            rows.append(pooled)
        return np.concatenate(rows)

    return encode


OPENERS: dict[str, Callable[[dict[str, Any]], Encode]] = {
    "memopt": Memopt,
    "sentence-transformers": open_sentence_transformers,
    "fastembed": open_fastembed,
    "optimum": open_optimum,
}


def load_inputs(path: str) -> list[Any]:
    """Read the inputs: a JSON list of texts, or an .npy array of images or waveforms."""
    if path.endswith(".npy"):
        import numpy as np

        return list(np.load(path))
    with open(path, encoding="utf-8") as file:
        inputs: list[Any] = json.load(file)
    return inputs


def save(path: str, answers: Any) -> None:
    """Write answers: vectors as one array, of other tasks (memopt's alone) a row an input."""
    if isinstance(answers, list):
        from pathlib import Path

        from memopt.tasks.rows import save_rows

        save_rows(Path(path), answers)
        return
    import numpy as np

    np.save(path, np.asarray(answers, dtype=np.float32))


def warm_up(encode: Encode, inputs: list[Any], seconds: float, passes: int) -> None:
    """Encode one by one, untimed: runtimes that adapt to single inputs do so now, all alike."""
    until = time.perf_counter() + seconds
    for item in inputs * passes:
        if time.perf_counter() > until:
            return
        encode([item])


def memory() -> dict[str, float]:
    """Resident and proportional set size in MB (PSS counts a page shared by n processes 1/n).

    Where the system does not tell them (not Linux), both are the peak of the resident size.
    """
    values = {"rss_mb": 0.0, "pss_mb": 0.0, "anonymous_mb": 0.0}
    names = {"Rss:": "rss_mb", "Pss:": "pss_mb", "Anonymous:": "anonymous_mb"}
    if sys.platform != "linux":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return dict.fromkeys(values, peak)
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file:
            name, *rest = line.split()
            if name in names:
                values[names[name]] = int(rest[0]) / 1024
    return values


def versions(packages: list[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed in this environment."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Answer commands until stdin closes."""
    spec = json.loads(sys.argv[1])
    encode: Encode | None = None
    inputs: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if command["do"] == "open":
                inputs = load_inputs(command["inputs"])
                # numpy is loaded before the clock starts: every contender needs it alike.

                before = memory()
                begin = time.perf_counter()
                encode = OPENERS[spec["kind"]](spec)
                opened = time.perf_counter()
                encode(inputs[:1])
                first = time.perf_counter()
                answer = {
                    "load_seconds": opened - begin,
                    "first_vector_seconds": first - begin,
                    "base": before,
                    "versions": versions(command["packages"]),
                }
            elif command["do"] == "encode":
                assert encode is not None
                begin = time.perf_counter()
                vectors = encode(inputs * command["repeats"])
                answer = {"seconds": (time.perf_counter() - begin) / command["repeats"]}
                if command.get("out"):
                    save(command["out"], vectors)
            elif command["do"] == "adapt":
                assert encode is not None
                warm_up(encode, inputs[: command["count"]], *ADAPTING)
            elif command["do"] == "single":
                assert encode is not None
                times = []
                part = inputs[command["start"] : command["stop"]]
                warm_up(encode, part, *WAKING)
                for item in part:
                    begin = time.perf_counter()
                    encode([item])
                    times.append(time.perf_counter() - begin)
                answer = {"times": times}
            elif command["do"] == "memory":
                answer = memory()
            elif command["do"] == "variants":
                answer = encode.variants() if isinstance(encode, Memopt) else {}
            elif command["do"] == "kernels":
                from memopt.benchmark.kernels import kernels_of

                variant, device = spec.get("variant", "auto"), spec.get("device", "auto")
                answer = kernels_of(spec["path"], variant, device, inputs)
        except Exception as error:  # noqa: BLE001 - the parent reports it for this contender
            answer = {"error": f"{type(error).__name__}: {error}"}
        _PROTOCOL.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
