"""One function for each format and message that memopt reads: bytes in, one of our errors at most.

A target takes any bytes and may raise :class:`memopt.errors.MemoptError` and nothing else. Where a
target reads several formats, the first byte chooses. ``seeds`` are small good files to begin from.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from memopt.errors import MemoptError


@dataclass(frozen=True, slots=True)
class Target:
    """What is fed, and what it is fed with first."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


@cache
def scratch() -> Path:
    """A folder of this process, in memory where the system has such a place."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="memopt-fuzz-", dir=memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


# --------------------------------------------------------------------------------------- weights


def weights(data: bytes) -> None:
    """Parquet weights, V1 and V2."""
    from memopt.weights.reader import WeightLoader

    with WeightLoader(_file("w.parquet", data)) as loader:
        for name in loader.names():
            loader.info(name)
            loader.load(name)
        _ = loader.metadata


def weights_seeds() -> list[bytes]:
    from memopt.weights.quantized import QuantizedWeight
    from memopt.weights.writer import write_quantized, write_weights

    path, found = scratch() / "seed.parquet", []
    floats = {"a.weight": np.ones((4, 6), np.float32), "b": np.ones(3, np.float16)}
    for compression in (None, "zstd"):
        write_weights(path, {**floats, "ids": np.arange(5)}, compression=compression)
        found.append(path.read_bytes())
    integers = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    one = np.ones((4, 1), np.float32)
    scales = QuantizedWeight(integers, one.reshape(4), np.zeros(0, np.int8), 0, 0, 4)
    write_quantized(path, [("q.weight", scales), ("c", np.ones(2, np.float32))])
    return [*found, path.read_bytes()]


def safetensors(data: bytes) -> None:
    """A safetensors file."""
    from memopt.weights.safetensors import open_safetensors

    opened = open_safetensors(_file("w.safetensors", data))
    for name in opened.tensors:
        opened.read(name)


def safetensors_seeds() -> list[bytes]:
    from memopt.federation.delta.adapters import safetensors_parts

    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.float16)}
    return [b"".join(map(bytes, safetensors_parts(tensors)))]


def encrypted(data: bytes) -> None:
    """A file under AES-GCM, and a sealed file of a sync store."""
    from memopt.federation.trust.vault import Vault
    from memopt.weights.crypto import decrypt_file

    path = _file("sealed", data[1:])
    if data[:1] < b"\x80":
        decrypt_file(path, scratch() / "plain", bytes(32))
    else:
        Vault(bytes(32)).read(path)


def encrypted_seeds() -> list[bytes]:
    from memopt.federation.trust.vault import Vault
    from memopt.weights.crypto import encrypt_file

    path = _file("plain", b"weights")
    encrypt_file(path, scratch() / "e", bytes(32))
    Vault(bytes(32)).write(scratch() / "v", [b"weights"])
    return [b"\0" + (scratch() / "e").read_bytes(), b"\xff" + (scratch() / "v").read_bytes()]


# ---------------------------------------------------------------------------------- JSON and YAML

_CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 32,
    "max_position_embeddings": 64,
    "text_config": {"hidden_size": 8},
}
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
_SIDES = (
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
)


def model_folder(data: bytes) -> None:
    """The JSON files of a model folder: config, tokenizer, modules, index."""
    from memopt.weights.describe import describe
    from memopt.weights.sources import checkpoint

    folder = scratch() / "model"
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    name = _SIDES[data[0] % len(_SIDES)] if data else _SIDES[0]
    good = {
        "config.json": _CONFIG,
        "modules.json": _MODULES,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32},
    }
    for file in _SIDES:
        path = folder / file
        if file == name:
            path.write_bytes(data[1:])
        elif file in good:
            path.write_text(json.dumps(good[file]))
        else:
            path.unlink(missing_ok=True)
    if name == "tokenizer.json":
        _tokenizer(folder)
    elif name == "model.safetensors.index.json":
        (folder / "a.safetensors").write_bytes(safetensors_seeds()[0])
        checkpoint(folder)
    else:
        describe(folder, name="m", source="s")


def _tokenizer(folder: Path) -> None:
    from memopt.bundle import Bundle, Manifest
    from memopt.runtimes.text import TextFrontEnd

    manifest = Manifest(
        name="m", task="embedding", modality="text", architecture="B", model_type="bert"
    )
    front = TextFrontEnd(Bundle(folder, manifest), ["input_ids", "attention_mask"])
    front.prepare(["a bird", ""])


def model_folder_seeds() -> list[bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = Tokenizer(models.WordPiece({"a": 0, "bird": 1, "[UNK]": 2}, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = {
        "config.json": _CONFIG,
        "modules.json": _MODULES,
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": True},
        "tokenizer_config.json": {"model_max_length": 512, "pad_token": "[PAD]"},
        "config_sentence_transformers.json": {"prompts": {"q": "query: "}},
        "1_Pooling/config.json": {"pooling_mode_cls_token": True, "embedding_dimension": 32},
        "model.safetensors.index.json": {"weight_map": {"a": "a.safetensors"}},
        "tokenizer.json": json.loads(known.to_str()),
    }
    return [bytes([n]) + json.dumps(texts[name]).encode() for n, name in enumerate(_SIDES)]


def manifest(data: bytes) -> None:
    """memopt.json of a bundle."""
    from memopt.bundle import open_bundle

    folder = scratch() / "bundle"
    folder.mkdir(exist_ok=True)
    (folder / "memopt.json").write_bytes(data)
    bundle = open_bundle(folder)
    bundle.verify()
    bundle.manifest.to_json()


def manifest_seeds() -> list[bytes]:
    from memopt.bundle import Manifest, Variant

    variant = Variant(name="v", format="onnx", precision="fp32", file="onnx/model.onnx")
    made = Manifest(
        name="m",
        task="embedding",
        modality="text",
        architecture="B",
        model_type="bert",
        dimension=8,
        files={"a": {"sha256": "0" * 64, "bytes": 3}},
        variants={"v": variant},
        history=({"event": "convert"},),
    )
    return [made.to_json().encode()]


def settings(data: bytes) -> None:
    """A YAML file of settings, and an entry of models/*.yaml."""
    from memopt.config import as_yaml, load_config

    as_yaml(load_config(_file("memopt.yaml", data)))


def settings_seeds() -> list[bytes]:
    return [
        b"device: {target: cpu}\nconsolidation:\n  time_based_schedule: '0 2 * * *'\n",
        b"quantization: &q\n  mixed_precision_layers: [a, b]\nfederation: null\n",
    ]


# ------------------------------------------------------------------------------------------ rows

_ENDINGS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def records(data: bytes) -> None:
    """A file of rows, read by embed, calibration and memory."""
    from memopt.commands.memory.add import read as read_memories
    from memopt.quantization.accuracy.calibration import read as read_calibration
    from memopt.runtimes.inputs import read_items

    ending = _ENDINGS[data[0] % len(_ENDINGS)] if data else ".txt"
    path = _file(f"rows{ending}", data[1:])
    for read in (
        lambda: list(read_items(str(path), "text")),
        lambda: list(read_calibration(path)),
        lambda: list(read_memories([str(path)], category="")),
    ):
        with suppress(MemoptError):
            read()


def records_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [
        b"\0one\ntwo\r\nthree",
        b'\x01text;score\n"a ""b""";1\nc;2\n',
        b"\x02text\tcategory\na\tb\n",
        b'\x03{"text": "a", "timestamp": "2026-01-01", "score": 1.5}\n"b"\n',
    ]
    stamp = pa.array([1714560000123456789, None], pa.timestamp("ns"))
    for codec in ("none", "snappy"):
        table = pa.table({"text": ["a", "b"], "timestamp": stamp, "l": [[1], None]})
        pq.write_table(table, scratch() / "seed.parquet", compression=codec)
        found.append(b"\x04" + (scratch() / "seed.parquet").read_bytes())
    return found


def memory_import(data: bytes) -> None:
    """The three Parquet files of an export, looked at and imported, and a file of pairs."""
    from memopt.joint.pairs import read_pairs
    from memopt.memory.io.imports import check_export
    from memopt.memory.memory_store import MemoryStore

    names = ("memories.parquet", "associations.parquet", "long_term.parquet", "pairs")
    name = names[data[0] % len(names)] if data else names[0]
    if name == "pairs":
        read_pairs(_file("pairs.parquet", data[1:]))
        return
    folder = scratch() / "export"
    folder.mkdir(exist_ok=True)
    for file, good in _export().items():
        (folder / file).write_bytes(data[1:] if file == name else good)
    dim = check_export(folder)
    place = Path(tempfile.mkdtemp(dir=scratch()))
    try:
        with MemoryStore(place / "store", dim=dim) as store:
            store.import_parquet(folder)
    finally:
        import shutil

        shutil.rmtree(place)


@cache
def _export() -> dict[str, bytes]:
    from memopt.memory.memory_store import MemoryStore
    from memopt.memory.model.schema import Content, NewMemory

    with MemoryStore(scratch() / "seed-store", dim=2) as store:
        for n in range(3):
            content = Content(text=f"note {n}")
            store.add(NewMemory(content=content, embedding=np.array([1.0, n])))
        store.export_parquet(scratch() / "seed-export")
    return {path.name: path.read_bytes() for path in (scratch() / "seed-export").iterdir()}


def memory_import_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.array([[1.0, 0.0], [0.5, 1.0]] * 4, pa.list_(pa.float32()))
    pq.write_table(
        pa.table({"text_embedding": vectors, "vision_embedding": vectors}), scratch() / "p"
    )
    names = ("memories.parquet", "associations.parquet", "long_term.parquet")
    files = [bytes([n]) + _export()[name] for n, name in enumerate(names)]
    return [*files, b"\x03" + (scratch() / "p").read_bytes()]


# ------------------------------------------------------------------------------------- federation


def message(data: bytes) -> None:
    """One message of the sync protocol, its checksum made right: it is no secret."""
    from memopt.federation.limits import Limits
    from memopt.federation.wire import protocol

    with suppress(MemoptError):
        protocol.decode(data, Limits())
    frame = protocol.decode(data + struct.pack("<I", zlib.crc32(data)), Limits())
    protocol.decode_error(frame.fields)


def message_seeds() -> list[bytes]:
    from memopt.federation.wire import protocol

    hello = {"operation": "pull", "adapter": "a", "sequence": 0, "weights_hash": "0" * 64}
    error = {"code": "busy", "problem": "p", "fix": ""}
    frames = [protocol.encode(protocol.HELLO, hello), protocol.encode(protocol.ERROR, error)]
    return [bytes(frame)[:-4] for frame in frames]


def payload(data: bytes) -> None:
    """The payload of a version, its hash made right, against weights that are there."""
    import hashlib

    from memopt.federation.delta.payload import unpack
    from memopt.federation.limits import Limits

    base = {"a": np.ones((8, 8), np.float32), "b": np.ones(4, np.float16)}
    unpack(data + hashlib.sha256(data).digest(), base, Limits(total_bytes=1 << 24))


def payload_seeds() -> list[bytes]:
    from memopt.federation.delta.compute import compute_delta, full_payload
    from memopt.federation.delta.settings import DeltaSettings

    rng = np.random.default_rng(0)
    base = {"a": np.ones((8, 8), np.float32), "b": np.ones(4, np.float16)}
    new = {"a": base["a"] + rng.normal(size=(8, 8)).astype("f4"), "b": base["b"] * 2}
    found = [full_payload(new).payload]
    for codec in ("lossless", "fp16", "int8", "int4", "topk"):
        chosen = DeltaSettings(codec=codec, delta_threshold=0, full_ratio=1e9)
        found.append(compute_delta(base, new, chosen).payload)
    return [bytes(each)[:-32] for each in found]


def signed(data: bytes) -> None:
    """Signed manifests, the trust file, and an adapter's config."""
    from memopt.federation.delta.adapters import CONFIG_TENSOR
    from memopt.federation.delta.lora import read_config, scaling
    from memopt.federation.limits import strict_json
    from memopt.federation.trust.manifest import parse_signed
    from memopt.federation.trust.nodes import Trust
    from memopt.federation.trust.signing import signature_holds

    kind = data[0] % 3 if data else 0
    if kind == 0:
        signature_holds(parse_signed(strict_json(data[1:], what="manifest")))
    elif kind == 1:
        Trust(path=_file("trust.json", data[1:])).nodes()
    else:
        config = read_config({CONFIG_TENSOR: np.frombuffer(data[1:], np.uint8)})
        scaling(config, "base_model.model.q.lora_A.weight", 8)


def signed_seeds() -> list[bytes]:
    from memopt.federation.trust.manifest import NO_HASH, VersionManifest
    from memopt.federation.trust.signing import SigningKey

    stated = VersionManifest(
        adapter="a",
        node="n",
        kind="full",
        sequence=1,
        base_hash=NO_HASH,
        new_hash=NO_HASH,
        previous=NO_HASH,
        payload_sha256=NO_HASH,
        payload_bytes=1,
        time=1,
    )
    trust = {"nodes": {"n": {"roles": ["push"], "keys": ["0" * 64], "adapters": ["*"]}}}
    config = {"r": 8, "lora_alpha": 16, "alpha_pattern": {"q": 3}}
    documents = [SigningKey.generate().sign(stated).to_json(), trust, config]
    return [bytes([n]) + json.dumps(each).encode() for n, each in enumerate(documents)]


def stream(data: bytes) -> None:
    """The bytes of an HTTP/2 connection, in pieces."""
    from memopt.federation.server.guard import StreamGuard

    guard, size = StreamGuard(1 << 16, 4), 1 + (data[0] if data else 0)
    for start in range(1, len(data), size):
        guard.feed(data[start : start + size])


def stream_seeds() -> list[bytes]:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frame = (5 + 4).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big")
    body = b"\0" + (4).to_bytes(4, "big") + b"\x0a\x02ab"
    headers = (0).to_bytes(3, "big") + b"\x01\x04" + (1).to_bytes(4, "big")
    return [b"\x07" + preface + headers + frame + body]


# ------------------------------------------------------------------------------------------ media


def media(data: bytes) -> None:
    """Sounds and pictures as encode takes them."""
    from memopt.runtimes.batching import UnusableItems, decoded

    front = _fronts()[data[0] % 2 if data else 0]
    with suppress(UnusableItems):
        decoded([data[1:]], getattr(front, "waveform", None) or front.transform, "media")  # type: ignore[attr-defined]


@cache
def _fronts() -> tuple[object, object]:
    from memopt.bundle import Bundle, Manifest
    from memopt.runtimes.audio import AudioFrontEnd
    from memopt.runtimes.image import ImageFrontEnd

    folder = scratch() / "media"
    folder.mkdir(exist_ok=True)
    kind = {"feature_extractor_type": "Whisper", "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kind))
    manifest = Manifest(
        name="m", task="embedding", modality="text", architecture="B", model_type="bert"
    )
    bundle = Bundle(folder, manifest)
    return AudioFrontEnd(bundle, ["input_features"]), ImageFrontEnd(bundle)


def media_seeds() -> list[bytes]:
    import io

    import soundfile
    from PIL import Image

    found = []
    for kind in ("WAV", "FLAC", "OGG"):
        out = io.BytesIO()
        soundfile.write(out, np.zeros(800, np.float32), 8000, format=kind)
        found.append(b"\0" + out.getvalue())
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, kind)
        found.append(b"\x01" + out.getvalue())
    return found


TARGETS = {
    target.name: target
    for target in (
        Target("weights", weights, weights_seeds),
        Target("safetensors", safetensors, safetensors_seeds),
        Target("encrypted", encrypted, encrypted_seeds),
        Target("model_folder", model_folder, model_folder_seeds),
        Target("manifest", manifest, manifest_seeds),
        Target("settings", settings, settings_seeds),
        Target("records", records, records_seeds),
        Target("memory_import", memory_import, memory_import_seeds),
        Target("message", message, message_seeds),
        Target("payload", payload, payload_seeds),
        Target("signed", signed, signed_seeds),
        Target("stream", stream, stream_seeds),
        Target("media", media, media_seeds),
    )
}
