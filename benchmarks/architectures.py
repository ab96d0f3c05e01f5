"""Sweep every model type of the installed transformers: a right vector, or one clear line?

    python benchmarks/architectures.py [-o DIR] [-j 2] [TYPE ...]

Each type gets a tiny config, seeded random weights and a folder as its users have it (config.json,
safetensors, a word-level tokenizer or the type's own processor). A process of its own converts it,
exports ONNX and OpenVINO and encodes three inputs; the measure is what transformers computes for
each input alone. DIR/rows.jsonl gets one row a type and is continued by the next run; --again does
types of one status anew. All of them take an hour or two on two cores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

SECONDS = 120  # of processor time, which others on the machine do not stretch
PATIENCE = 5  # times that on the clock
BYTES = 8 << 30
MOST_WEIGHTS = 60_000_000
COSINE = 0.9999  # float32 on two runtimes: reassociated sums, nothing else
STATUSES = ("right", "one format", "refused", "unclear", "traceback", "wrong", "timeout", "unbuilt")
# What a config may call its sizes, and a small one that the others go with.
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_block_layers"), 2),
    "vocab_size": 120,
    "text_vocab_size": 120,
}
_PLACES = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    "image_size": 64,
}
_WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("projection_dim", "projection_size"), 24),
}
# Lists of one number a stage: one block each.
_DEPTHS = ("depths", "depth", "layer_depths", "num_blocks", "layers_per_stage")
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# What introspection cannot know; over what it says.
SPECIAL: dict[str, dict[str, Any]] = {
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "big_bird": {"attention_type": "original_full"},
    "whisper": {"max_source_positions": 50},
    "longformer": {"attention_window": [8, 8]},
    "led": {"attention_window": [8, 8]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "align": {"vision_config": {"width_coefficient": 0.5, "depth_coefficient": 0.5}},
    "canine": {"max_position_embeddings": 2048},
    "audio-spectrogram-transformer": {"max_length": 128, "num_mel_bins": 128},
}
# Encoder-decoder models that sentence-transformers embeds with their encoder; it takes what
# AutoModel gives of the others (https://github.com/UKPLab/sentence-transformers).
ENCODER_ONLY = frozenset(
    {
        *("t5", "mt5", "umt5", "longt5", "prophetnet", "switch_transformers", "blenderbot"),
        *("blenderbot-small", "m2m_100", "pegasus", "pegasus_x", "moonshine", "whisper", "marian"),
        *("t5gemma", "speech_to_text", "moonshine_streaming"),
    }
)
_WORDS = ("the", "cat", "sleeps", "on", "a", "warm", "keyboard", "rain", "is", "expected")
TEXTS = ("the cat", " ".join(_WORDS), " ".join(_WORDS * 4))
# Words that are torch's, onnxruntime's or OpenVINO's own, or advice that nobody can follow.
_UNCLEAR = re.compile(
    r"--opset|report the arch|torch\.|aten|<class|0x[0-9a-f]{6}|FakeTensor|L\['|\n|object at"
    r"|in a way that memopt|Traceback|got an unexpected keyword|NoneType|src/|\.cpp"
    r"|GraphModule|list index"
)


def modality(cls: Any) -> str:
    """Return text, image or audio for what takes one input of one kind, else other."""
    if hasattr(cls, "get_image_features") and hasattr(cls, "get_text_features"):
        return "image"  # two towers: what memopt takes by default
    if hasattr(cls, "get_audio_features") and hasattr(cls, "get_text_features"):
        return "text"
    name, kinds = cls.main_input_name, cls.input_modalities
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    forward = inspect.signature(cls.forward).parameters
    if name == "input_ids" and kinds == {"text"} and "input_ids" in forward:
        return "text"
    if name == "pixel_values" and "pixel_values" in forward and not kinds & {"video", "audio"}:
        return "image"
    if name in ("input_values", "input_features") and "audio" in kinds | {"audio"}:
        return "audio"
    return "other"


def small(config: Any, kind: str, level: int) -> dict[str, Any]:
    """Return arguments for a small config of this class, from what its default one has.

    ``level`` 0 makes everything small, 1 leaves widths, 2 leaves positions and images too, 3 all.
    """
    sizes = {**(_COUNTS if level < 3 else {}), **(_PLACES if level < 2 else {})}
    sizes |= _WIDTHS if level < 1 else {}
    made: dict[str, Any] = {}
    names = {*config.to_dict(), *inspect.signature(type(config).__init__).parameters}
    known = set(config.attribute_map)
    for name in sorted(names - known - {"self", "kwargs"}):
        value = getattr(config, name, None)
        if name in _SPECIAL:
            if isinstance(value, int) and not isinstance(value, bool) and value >= 10:
                made[name] = 2
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            made[name] = min(value, sizes[name])
        elif name in sizes and isinstance(value, list | tuple) and name == "image_size":
            made[name] = [sizes[name]] * len(value)
        elif name in _DEPTHS and isinstance(value, list | tuple) and level < 3:
            made[name] = [1] * len(value)
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            made[name] = small(value, "", level)
    return {**made, **SPECIAL.get(kind, {})}


def build(kind: str, cls: Any, folder: Path) -> tuple[Any, str]:
    """Write the folder of a tiny model of this type; return it, and why it could not be, if so."""
    import torch
    import transformers

    why = ""
    for level in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            base = transformers.AutoConfig.for_model(kind)
            config = type(base)(**small(base, kind, level))
            config.architectures = [cls.__name__]
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > MOST_WEIGHTS:
                why = why or f"{size:,} weights"
                continue
            torch.manual_seed(0)
            model = cls(config).eval()
            _seed(model)
            model.save_pretrained(folder)
            front_end(kind, config, modality(cls), folder)
            what = modality(cls)
            if what != "other":
                reference(kind, folder, what, "mean", inputs(what)[:1])
            return model, ""
        except Exception as error:  # noqa: BLE001 - of anything: the next level is tried
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None, why


def _seed(model: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            # The usual std of 0.02 makes a nearly linear model, in which masks hardly show.
            if parameter.ndim >= 2 and parameter.numel():
                parameter.normal_(0.0, (parameter.shape[0] / parameter.numel()) ** 0.5)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def front_end(kind: str, config: Any, what: str, folder: Path) -> None:
    """Write a tokenizer, or the processor that transformers has for the type."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    if what == "text":
        pad = getattr(config, "pad_token_id", None)
        pad = pad if isinstance(pad, int) and 0 <= pad < 10 else 0
        free = [i for i in range(10) if i != pad]
        vocabulary = {"[PAD]": pad, "[UNK]": free[2], "[CLS]": free[3], "[SEP]": free[4]}
        vocabulary |= {word: 10 + i for i, word in enumerate(_WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", free[3]), ("[SEP]", free[4])]
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ).save_pretrained(folder)
    elif what == "image":
        names: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {})
        # Without torchvision some types have none of their own.
        processor = getattr(transformers, names.get("pil") or "ViTImageProcessorPil")
        size = getattr(getattr(config, "vision_config", config), "image_size", 64)
        size = size if isinstance(size, int) else size[0]
        default = processor.size or {"height": 0, "width": 0}
        made = processor(size=dict.fromkeys(default, size), crop_size=size)
        made.save_pretrained(folder)
    elif what == "audio":
        fallback = "Wav2Vec2FeatureExtractor"
        extractor = getattr(transformers, FEATURE_EXTRACTOR_MAPPING_NAMES.get(kind, fallback))
        given = {}
        if extractor.__name__ == "WhisperFeatureExtractor":
            frames = 2 * getattr(config, "max_source_positions", 50)
            # Whole seconds: 100 frames each.
            given = {"feature_size": config.num_mel_bins, "chunk_length": max(1, frames // 100)}
        extractor(**given).save_pretrained(folder)


def inputs(what: str) -> list[Any]:
    """Return three inputs of three lengths or sizes."""
    generator = np.random.default_rng(0)
    if what == "text":
        return list(TEXTS)
    if what == "image":
        sizes = ((64, 64), (50, 90), (120, 70))
        return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    return [generator.normal(0, 0.1, n).astype(np.float32) for n in (9_001, 16_000, 24_000)]


def reference(
    kind: str, folder: Path, what: str, pooling: str, items: Sequence[Any]
) -> list[np.ndarray]:
    """Return the vector of each input as transformers computes it, alone and so without padding."""
    import torch
    import transformers
    from PIL import Image

    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    if kind in ENCODER_ONLY:
        model = model.get_encoder()
    towers = {"image": "get_image_features", "text": "get_text_features"}
    call = getattr(model, towers.get(what, "forward"), model.forward)
    rows = []
    if what == "text":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    elif what == "image":
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    else:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    takes = inspect.signature(call).parameters
    for item in items:
        if what == "text":
            feeds = dict(tokenizer(item, return_tensors="pt"))
        elif what == "image":
            feeds = dict(processor(Image.fromarray(item), return_tensors="pt"))
        else:
            rate = extractor.sampling_rate
            feeds = dict(extractor(item, sampling_rate=rate, return_tensors="pt"))
        feeds = {name: value for name, value in feeds.items() if name in takes}
        with torch.no_grad():
            result = call(**feeds)
        rows.append(_pooled(result, pooling))
    return rows


def _pooled(result: Any, pooling: str) -> np.ndarray:
    if pooling == "model":
        names = ("image_embeds", "text_embeds", "pooler_output")
        values = [getattr(result, name, None) for name in names]
        return next(v for v in values if v is not None).flatten(1).numpy()[0]
    hidden = result.last_hidden_state[0].numpy()
    return {"mean": lambda: hidden.mean(0), "cls": lambda: hidden[0], "last": lambda: hidden[-1]}[
        pooling
    ]()


def judge(kind: str, folder: Path) -> dict[str, Any]:
    """Do all a user would do with one model type; return its row."""
    import transformers
    from safetensors.numpy import save_file
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from memopt.errors import MemoptError
    from memopt.weights.convert import convert

    name = MODEL_MAPPING_NAMES[kind]
    name = name if isinstance(name, str) else name[0]
    row: dict[str, Any] = {"type": kind, "class": name, "modality": "other"}
    source, bundle = folder / "source", folder / "bundle"
    try:
        cls = getattr(transformers, name)
        row["modality"] = modality(cls)
    except ImportError as error:
        return {**row, "status": "unbuilt", "line": " ".join(str(error).split())[:200]}
    try:
        # Refused by name? Then there is no need of a model.
        source.mkdir(parents=True)
        config = transformers.AutoConfig.for_model(kind, **SPECIAL.get(kind, {}))
        config.architectures = [name]
        config.save_pretrained(source)
        save_file({"weight": np.zeros(1, np.float32)}, source / "model.safetensors")
        convert(source, bundle, on_warning=lambda line: None)
    except MemoptError as error:
        return {**row, **_refusal("convert", error)}
    except Exception:  # noqa: BLE001 - the real model below will tell
        traceback.print_exc()
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.rmtree(source)
    _, why = build(kind, cls, source)
    if why:
        row["unbuilt"] = why
        if not (source / "model.safetensors").is_file():
            return {**row, "status": "unbuilt", "line": why}
    return {**row, **_through(kind, source, bundle, row["modality"], verified=not why)}


def _through(kind: str, source: Path, target: Path, what: str, verified: bool) -> dict[str, Any]:
    from memopt import ArrowEngine
    from memopt.bundle import open_bundle
    from memopt.errors import MemoptError
    from memopt.exporters.base import export
    from memopt.weights.convert import convert

    stage = "convert"
    found: dict[str, Any] = {}
    refused: dict[str, Any] | None = None
    wanted: list[np.ndarray] = []
    try:
        bundle = convert(source, target, on_warning=lambda line: None)
        manifest = bundle.manifest
        found = {"task": manifest.task, "pooling": manifest.pooling}
        for format in ("onnx", "openvino"):
            stage = f"export {format}"
            try:
                variants = export(open_bundle(target), format=format)
            except MemoptError as error:
                refused = refused or _refusal(stage, error)
                continue
            if not verified:
                continue
            stage = f"encode {format}"
            try:
                wanted = wanted or reference(kind, source, what, manifest.pooling, inputs(what))
            except Exception as error:  # noqa: BLE001 - the measure's own
                return {**found, "status": "unbuilt", "line": f"no measure: {error!r}"[:300]}
            for variant in variants:
                device = "cpu" if format == "onnx" else "openvino"
                with ArrowEngine(target, device, variant.name, strict=True, threads=1) as engine:
                    got = engine.encode(inputs(what), normalize=False)
                unit = [w / np.linalg.norm(w) for w in wanted] if manifest.normalize else wanted
                found[variant.name] = worst = _cosine(got, unit)
                if not worst >= COSINE:
                    return {**found, "status": "wrong", "stage": stage, "line": f"{worst:.5f}"}
    except MemoptError as error:
        refused = _refusal(stage, error)
    except Exception as error:  # noqa: BLE001 - what the sweep looks for
        where = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "/memopt/" in f.filename]
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({own[-1:]})"
        traceback.print_exc()
        return {**found, "status": "traceback", "stage": stage, "line": line}
    right = {name.partition("-")[0] for name in found if "fp32" in name}
    if refused:
        one = right and refused["status"] == "refused"
        return {**found, **refused, **({"status": "one format"} if one else {})}
    if not verified:
        line = "exported, and transformers itself does not run it: no measure"
        return {**found, "status": "unclear", "stage": "export", "line": line}
    return {**found, "status": "right", "line": ""}


def _refusal(stage: str, error: Exception) -> dict[str, Any]:
    line = str(error)
    status = "unclear" if _UNCLEAR.search(line) or len(line) > 420 else "refused"
    return {"status": status, "stage": stage, "line": line}


def _cosine(got: np.ndarray, wanted: list[np.ndarray]) -> float:
    worst = 1.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or not np.isfinite(b).all():
            return float("nan")
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        worst = min(worst, float(a @ b) / max(norms, 1e-30))
        ratio = float(np.linalg.norm(a) / max(float(np.linalg.norm(b)), 1e-30))
        worst = min(worst, 1.0 - abs(ratio - 1.0))
    return worst


def child(kind: str, folder: str, core: int) -> None:
    """Judge one type, with everything it prints in a file, and leave the row in another."""
    os.setsid()
    path = Path(folder)
    with (path / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        warnings.simplefilter("ignore")
        # Threads of several runtimes that wait for each other would take most of the time.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
        import torch

        torch.set_num_threads(1)
        begin = time.perf_counter()
        try:
            row = judge(kind, path)
        except Exception as error:  # noqa: BLE001 - of the sweep itself, or of an odd config
            traceback.print_exc()
            row = {"type": kind, "modality": "other", "status": "unbuilt"}
            row["line"] = repr(error)[:300]
        row["seconds"] = round(time.perf_counter() - begin, 1)
    (path / "row.json").write_text(json.dumps(row))
    os._exit(0)


def run(kinds: Sequence[str], folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the row of each type; ``jobs`` processes at once, each for SECONDS at most."""
    context = multiprocessing.get_context("forkserver")
    # Loaded once and forked: importing torch and transformers takes as long as a small export.
    context.set_forkserver_preload(
        [
            *("torch", "transformers", "openvino", "onnxruntime", "onnxscript", "__main__"),
            *("transformers.modeling_utils", "transformers.models.auto.modeling_auto"),
            "memopt.exporters.base",
        ]
    )
    waiting, running, free = collections.deque(kinds), {}, list(range(jobs))
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.popleft()
            place = folder / "work" / kind
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            core = free.pop()
            process = context.Process(target=child, args=(kind, str(place), core))
            process.start()
            running[kind] = (process, place, time.monotonic(), core)
        time.sleep(0.05)
        for kind, (process, place, begin, core) in list(running.items()):
            late = time.monotonic() - begin > SECONDS * PATIENCE or _used(process.pid) > SECONDS
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[kind]
            free.append(core)
            path = place / "row.json"
            dead = {"type": kind, "modality": "other", "status": "timeout" if late else "traceback"}
            dead |= {"line": f"exit {process.exitcode}", "stage": "process"}
            yield json.loads(path.read_text()) if path.is_file() else dead
            for part in ("source", "bundle"):
                shutil.rmtree(place / part, ignore_errors=True)


def _used(pid: int | None) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return how many types of each modality came out how."""
    made = Table("modality", *STATUSES, "all", title="model types of transformers")
    for what in ("text", "image", "audio", "other"):
        counts = collections.Counter(r["status"] for r in rows if r["modality"] == what)
        made.add_row(what, *(str(counts[s]) for s in STATUSES), str(sum(counts.values())))
    return made


def main() -> None:
    """Sweep, print the table; exit 1 for a traceback, a wrong vector or an unclear line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="[default: all]")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/architectures"))
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--again", action="append", default=[], choices=STATUSES)
    parser.add_argument("--modality", help="only these, as the rows so far say")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "rows.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = {row["type"]: row for row in map(json.loads, lines)}
    if not given.table:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        kinds = given.kinds or [
            kind
            for kind in MODEL_MAPPING_NAMES
            if kind not in rows or rows[kind]["status"] in given.again
        ]
        if given.modality:
            kinds = [k for k in kinds if rows.get(k, {}).get("modality") == given.modality]
        with contextlib.closing(run(kinds, given.output, given.jobs)) as results:
            for row in results:
                rows[row["type"]] = row
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(f"{row['status']:10} {row['type']:30} {row['line'][:150]}", flush=True)
    console = Console(width=200, markup=False, highlight=False)
    console.print(table(list(rows.values())))
    for row in sorted(rows.values(), key=lambda r: (r["status"], r["type"])):
        if row["status"] not in ("right", "refused"):
            console.print(f"{row['status']}: {row['type']}: {row['line'][:200]}")
    bad = {"unclear", "traceback", "wrong"}
    sys.exit(any(row["status"] in bad for row in rows.values()))


if __name__ == "__main__":
    main()
