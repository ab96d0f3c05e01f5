"""Which ways of running a model are worth trying on a machine."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

from memopt.bundle import Manifest
from memopt.optimize.plan import Candidate
from memopt.quantization.method import BITS
from memopt.quantization.recipe import Recipe
from memopt.runtimes.cpu import BF16

# int8 dot products in hardware; without them int8 saturates or is no faster (onnxruntime#6004).
INT8_FEATURES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "neon_dot", "asimddp"})


def candidates(
    manifest: Manifest,
    targets: Sequence[str],
    features: Collection[str],
    names: Collection[str] = (),
) -> tuple[Candidate, ...]:
    """Return the candidates for these targets, the float reference of each target first.

    Settings are complete, so that a plan does the same where the defaults are others.

    Args:
        manifest: the bundle's.
        targets: any of ``memopt.optimize.plan.TARGETS``.
        features: CPU features as ``memopt doctor`` names them.
        names: of the weights; a language model's int4 keeps some of them in int8.

    >>> from types import SimpleNamespace as N
    >>> [c.name for c in candidates(N(task="embedding"), ["openvino"], {"avx512_bf16"})][:2]
    ['openvino-fp32', 'openvino-bf16']
    """
    have = set(features)
    int8 = bool(have & INT8_FEATURES)
    int8_why = "int8 dot products in hardware" if int8 else "smaller; no int8 dot here"
    found: list[Candidate] = []
    if manifest.task == "text-generation":
        return _writers(manifest, targets, names)
    if "cpu" in targets:
        found += [
            *_imported(manifest),
            _export("onnx-fp32-fused", "cpu", "onnx", "fp32", "fused float on ONNX Runtime"),
            _quantize("cpu", int8_why, method="dynamic"),
            _quantize("cpu", int8_why, method="static", target="cpu"),
            _quantize("cpu", "nearly exact", method="weight-only"),
        ]
    if "openvino" in targets:
        found.append(_export("openvino-fp32", "openvino", "openvino", "fp32", "float on OpenVINO"))
        if have & BF16:
            why = "bf16 matrix products in hardware"
            found.append(_export("openvino-bf16", "openvino", "openvino", "bf16", why))
        found += [
            _quantize("openvino", int8_why, method="static", target="openvino"),
            _quantize("openvino", "nearly exact", method="nncf-weights", target="openvino"),
        ]
        # ONNX Runtime's int8 graph is no candidate here: OpenVINO runs it as fast as its own, but
        # the vectors then depend on the batch (5e-3 on MiniLM; its own graph: not at all).
    if "aoti" in targets:
        for precision in ("fp32", "fp16", "bf16"):
            why = f"compiled by torch's inductor, {precision}"
            name = f"torch-aoti-{precision}"
            found.append(_export(name, "aoti", "torch-aoti", precision, why))
    for device in ("cuda", "rocm", "coreml", "vulkan"):
        if device in targets:
            found += [
                _export("onnx-fp32", device, "onnx", "fp32", f"float on {device}"),
                _export("onnx-fp16", device, "onnx", "fp16", f"half precision on {device}"),
            ]
            if device == "cuda":
                why = "fused operators on CUDA"
                found.append(_export("onnx-fp32-fused", device, "onnx", "fp32", why))
                # Fewer bytes to read; the products stay float. Their kernel is in this provider.
                for bits in ("int8", "int4"):
                    why = f"{bits} weights, float products"
                    found.append(_quantize(device, why, method="weight-only", weight_type=bits))
    return tuple(found)


def _writers(
    manifest: Manifest, targets: Sequence[str], names: Collection[str]
) -> tuple[Candidate, ...]:
    """Return the candidates of a language model: decoding is reading weights, so fewer bits win."""
    four: dict[str, Any] = {"weight_type": "int4", "symmetric": False}
    found: list[Candidate] = []
    if "cpu" in targets:
        only: dict[str, Any] = {"method": "weight-only"}
        fine = {**only, **four, "group_size": 16, "keep_int8": _sensitive(names)}
        found += [
            _export("onnx-fp32-fused", "cpu", "onnx", "fp32", "float, keys and values in place"),
            *(
                _quantize(
                    "cpu", "the file's own integers", weight_type=kind, algorithm="stored", **only
                )
                for kind in _stored(manifest)
            ),
            _quantize("cpu", "a quarter of the bytes", **only),
            _quantize("cpu", "fewest bytes", algorithm="k-quant", **only, **four),
            _quantize("cpu", "finer groups", algorithm="k-quant", **fine),
            _quantize("cpu", "fitted", algorithm="gptq", **fine),
        ]
    if "openvino" in targets:
        ov: dict[str, Any] = {"method": "nncf-weights", "target": "openvino"}
        fitted = "awq+scale-estimation"
        found += [
            _export("openvino-fp32", "openvino", "openvino", "fp32", "float on OpenVINO"),
            _quantize("openvino", "a quarter of the bytes", **ov),
            _quantize("openvino", "fitted", algorithm=fitted, **ov, **four),
        ]
    return tuple(found)


def _sensitive(names: Collection[str]) -> tuple[str, ...]:
    """Return patterns of the products that lose most in four bits: the last, and those that add up.

    On SmolLM2-135M GPTQ in groups of 16 has a KL of 0.080 nats with the last one in int8, and of
    0.051 with `down_proj` too.
    """
    heads = [p for p in ("*lm_head*", "*embed_out*") if fnmatch.filter(names, p)]
    tied = [p for p in ("*embed_tokens*", "*wte*", "*word_embeddings*") if fnmatch.filter(names, p)]
    inner = [p for p in ("*down_proj*", "*o_proj*") if fnmatch.filter(names, p)]
    return (*(heads or tied), *inner)


def _stored(manifest: Manifest) -> tuple[str, ...]:
    """Return the width of most integers that a GGUF file brought, if it brought some."""
    converted = [e for e in getattr(manifest, "history", ()) if e.get("event") == "convert"]
    kept = converted[-1].get("kept", {}) if converted else {}
    counts = {kind: count for kind, count in kept.items() if kind in BITS}
    return (max(counts, key=lambda kind: counts[kind]),) if counts else ()


def _imported(manifest: Manifest) -> list[Candidate]:
    """Return the graph of somebody else as it is, the float one where nothing in it is fused."""
    known = getattr(manifest, "variants", {}).get("onnx-fp32")
    if known is None or known.method != "import":
        return []
    return [_export("onnx-fp32", "cpu", "onnx", "fp32", "the imported graph as it is")]


def _export(name: str, device: str, format_: str, precision: str, why: str) -> Candidate:
    settings = {"format": format_, "precision": precision}
    return Candidate(name=name, kind="export", device=device, settings=settings, why=why)


def _quantize(device: str, why: str, **fields: Any) -> Candidate:
    recipe = Recipe(**fields)
    return Candidate(
        name=recipe.variant_name, kind="quantize", device=device, settings=recipe.to_dict(), why=why
    )
