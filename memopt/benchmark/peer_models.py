"""Let sentence-transformers make its own files; run by path in the peers' environment.

    python peer_models.py FOLDER

FOLDER holds a model as sentence-transformers reads it (safetensors, config, tokenizer). Afterwards
it also holds what its own tools write with their defaults: ``onnx/model.onnx``, the dynamic int8
``onnx/model_qint8_avx512_vnni.onnx`` (or the arm64/avx2 one) and ``openvino/``.
"""

from __future__ import annotations

import platform
import sys


def int8_kind() -> str:
    """Return the quantization preset sentence-transformers offers for this processor."""
    if platform.machine() in ("aarch64", "arm64"):
        return "arm64"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = file.read()
    for flag, name in (("avx512_vnni", "avx512_vnni"), ("avx512f", "avx512")):
        if flag in flags:
            return name
    return "avx2"


def main() -> None:
    """Export and quantize with the peers' own defaults."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    folder = sys.argv[1]
    options = {"export": True}
    model = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs=options)
    model.save_pretrained(folder)
    export_dynamic_quantized_onnx_model(model, int8_kind(), folder)
    model = SentenceTransformer(folder, backend="openvino", device="cpu", model_kwargs=options)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
