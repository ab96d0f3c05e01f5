"""The contenders of ``benchmarks/quantize.py``: graphs to encode with, and the peers' own."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Bundle, Variant

Batches = list[tuple[list[int], dict[str, Any]]]
PLAIN = "nncf.quantize, defaults"
TORCH = "sentence-transformers, torch"
# OpenVINO's default precision is bf16 on processors that have it; peers and ours alike get float32
# around their integers, unless a row says otherwise.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass
class Contender:
    """One graph: how to encode all batches with it, and its bytes."""

    name: str
    encode: Callable[[Batches], np.ndarray]
    bytes: int


def torch_model(source: str, size: int, width: int) -> Contender:
    """Open sentence-transformers' own torch model, given the same tokenized batches."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(2)
    model = SentenceTransformer(source, device="cpu")

    def encode(batches: Batches) -> np.ndarray:
        rows = np.zeros((sum(len(places) for places, _ in batches), width), np.float32)
        with torch.inference_mode():
            for places, feed in batches:
                given = {name: torch.from_numpy(value) for name, value in feed.items()}
                rows[places] = model(given)["sentence_embedding"].numpy()
        return rows

    return Contender(TORCH, encode, size)


def openvino(
    name: str, path: Path, options: dict[str, str], width: int, streams: int = 2
) -> Contender:
    """Open a graph in as many streams behind an AsyncInferQueue; two threads in all."""
    import openvino as ov

    hint = "THROUGHPUT" if streams > 1 else "LATENCY"
    config = {"NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": "2", "PERFORMANCE_HINT": hint}
    compiled = ov.Core().compile_model(path, "CPU", {**config, **options})
    queue = ov.AsyncInferQueue(compiled, streams)

    def encode(batches: Batches) -> np.ndarray:
        rows = np.zeros((sum(len(places) for places, _ in batches), width), np.float32)

        def store(request: Any, places: list[int]) -> None:
            rows[places] = request.get_tensor("sentence_embedding").data

        queue.set_callback(store)
        for places, feed in batches:
            queue.start_async(feed, places)
        queue.wait_all()
        return rows

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Contender(name, encode, size)


def onnx(name: str, path: Path, width: int) -> Contender:
    """Open a graph in ONNX Runtime with two threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encode(batches: Batches) -> np.ndarray:
        rows = np.zeros((sum(len(places) for places, _ in batches), width), np.float32)
        for places, feed in batches:
            rows[places] = session.run(["sentence_embedding"], feed)[0]
        return rows

    return Contender(name, encode, path.stat().st_size)


def opened(bundle: Bundle, variant: Variant, label: str) -> Contender:
    """Open a variant of the bundle as the contenders are opened."""
    path, width = bundle.file(variant), bundle.manifest.dimension or 0
    if variant.format == "openvino":
        return openvino(label, path, dict(variant.options), width)
    return onnx(label, path, width)


def peers(bundle: Bundle, calibration: list[dict[str, Any]], folder: Path) -> Iterator[Contender]:
    """Yield the bundle's float graphs as each library runs and quantizes them.

    By default, and where that is poor for an encoder also at its best sensible setting.
    """
    width = bundle.manifest.dimension or 0
    size = (bundle.path / "onnx" / "model.onnx").stat().st_size
    yield torch_model(str(_checkpoint(bundle)), size, width)
    yield openvino(
        "OpenVINO, its default precision",
        bundle.path / "openvino" / "openvino_model.xml",
        {},
        width,
    )
    yield from _nncf_peers(bundle, calibration, folder, width)
    yield from _onnx_peers(bundle, calibration, folder, width)


def _checkpoint(bundle: Bundle) -> Path:
    """Return the folder of the checkpoint the bundle was made of."""
    from memopt.weights.sources import find_source

    return find_source(bundle.manifest.source).folder


def _nncf_peers(
    bundle: Bundle, calibration: list[dict[str, Any]], folder: Path, width: int
) -> Iterator[Contender]:
    import nncf
    import openvino as ov

    model = ov.Core().read_model(bundle.path / "openvino" / "openvino_model.xml")
    nncf.set_log_level(logging.ERROR)
    smooth = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=0.5)
    )

    def quantized(**options: Any) -> Any:
        data = nncf.Dataset(calibration)
        kind = nncf.ModelType.TRANSFORMER
        return nncf.quantize(model.clone(), data, model_type=kind, **options)

    def saved(name: str, made: Any) -> Path:
        path = folder / f"{name}.xml"
        ov.save_model(made, path, compress_to_fp16=False)
        return path

    with redirect_stdout(io.StringIO()):
        plain = saved("plain", quantized())
        smoothed = saved("smoothed", quantized(advanced_parameters=smooth))
        weights = saved("weights", nncf.compress_weights(model.clone()))
    yield openvino(PLAIN, plain, FLOAT32, width)
    yield openvino(f"{PLAIN}, one stream", plain, FLOAT32, width, streams=1)
    yield openvino(f"{PLAIN}, bf16 around it", plain, {}, width)
    yield openvino("nncf.quantize, smooth quant alpha 0.5", smoothed, FLOAT32, width)
    yield openvino("nncf.compress_weights, int8", weights, FLOAT32, width)


def _onnx_peers(
    bundle: Bundle, calibration: list[dict[str, Any]], folder: Path, width: int
) -> Iterator[Contender]:
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = bundle.path / "onnx" / "model.onnx"

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with _without_warnings():
        path = folder / "static.onnx"
        tools.quantize_static(graph, path, Reader(), per_channel=True)
        yield onnx("onnxruntime quantize_static, per channel", path, width)
        path = folder / "static_products.onnx"
        # Its best sensible setting for an encoder: what lies between the products stays in float.
        products = ["MatMul", "Gemm"]
        tools.quantize_static(
            graph, path, Reader(), per_channel=True, op_types_to_quantize=products
        )
        yield onnx("onnxruntime quantize_static, per channel, MatMul and Gemm only", path, width)
        path = folder / "dynamic.onnx"
        # What sentence-transformers' export_dynamic_quantized_onnx_model does for avx512_vnni.
        tools.quantize_dynamic(graph, path, per_channel=True)
        yield onnx("sentence-transformers ONNX int8 (dynamic)", path, width)
        for bits in (8, 4):
            tool = MatMulNBitsQuantizer(str(graph), bits=bits, block_size=32, is_symmetric=True)
            tool.process()
            path = folder / f"nbits{bits}.onnx"
            tool.model.save_model_to_file(str(path))
            yield onnx(f"onnxruntime MatMulNBits, int{bits}, block 32", path, width)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence onnxruntime's advice about preprocessing, which goes through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
