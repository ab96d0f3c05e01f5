"""A model of encoder and decoder to two graphs of one variant, checked together.

The encoder's graph runs once a source and gives the keys and values that the decoder's cross
attention looks at, ``present.N.encoder.key`` and ``.value`` (batch, heads, source, size). The
decoder's takes them as ``past_key_values.N.encoder.*``, its own as ``past_key_values.N.decoder.*``
and gives ``present.N.decoder.*`` and ``logits``: Optimum's names. It reads a beginning of several
tokens as well as one token more; every row of a batch has as many, so that it needs no mask of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import Bundle, Variant
from memopt.exporters import check, onnx, openvino
from memopt.exporters.check import Run, Tolerance
from memopt.exporters.half import to_half
from memopt.exporters.halves import decoder_class, encoder_class
from memopt.exporters.pair_cases import (
    Sizes,
    Turn,
    signatures,
    sizes_of,
    source_checks,
    source_of,
    source_reference,
    turn_checks,
    turn_of,
    turn_reference,
)
from memopt.exporters.pair_walk import walk
from memopt.exporters.record import record
from memopt.exporters.refusals import refused
from memopt.files import staged_directory
from memopt.progress import Step
from memopt.runtimes.keys_values import ENCODER, encoder_of
from memopt.runtimes.torch_model import LoadedModel, load_model

DECODER = "decoder_model"
Case = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Work:
    """What every variant of one export shares."""

    bundle: Bundle
    loaded: LoadedModel
    sizes: Sizes
    sources: list[Case]
    turns: list[Case]
    folder: Path
    say: Step


def export_pair(
    bundle: Bundle,
    *,
    format: str,
    precision: str,
    opset: int,
    limit: int,
    known: Variant | None,
    say: Step,
) -> tuple[Variant, ...]:
    """Export both graphs, check them against torch, and record the variant.

    Args:
        bundle: a converted one.
        format, precision, opset: as of :func:`memopt.exporters.base.export`.
        limit: bytes of weights that stay inside an ONNX file.
        known: the portable variant of the same weights, where it is there.
        say: called with a line before each step.

    Raises:
        ExportError: the architecture does not export, or the graphs give other answers than torch;
            nothing is written then.
    """
    task = bundle.manifest.task
    say("build the model from weights.parquet")
    loaded = load_model(bundle, task)
    with refused(loaded, task), staged_directory(bundle.path) as folder:
        sizes = sizes_of(loaded)
        traced = format != "openvino" or known is None
        graphs = _traced(loaded, sizes, opset, say) if traced else ()
        say("compute the torch reference")
        work = _Work(
            bundle, loaded, sizes, _sources(loaded, sizes), _turns(loaded, sizes), folder, say
        )
        if format == "onnx":
            variants = [_onnx(work, graphs, precision, limit)]
        else:
            if known is not None:
                files = [bundle.path / str(encoder_of(known.companions)), bundle.file(known)]
            else:
                files = [folder / "source" / f"{name}.onnx" for name in (ENCODER, DECODER)]
                for graph, file in zip(graphs, files, strict=True):
                    onnx.save_onnx(graph, file, limit=limit)
            variants = _openvino(work, files, precision)
        return record(
            bundle, variants, folder, format=format, task=task, precision=precision, opset=opset
        )


def _traced(loaded: LoadedModel, sizes: Sizes, opset: int, say: Step) -> tuple[Any, ...]:
    import numpy as np

    first, second = signatures(sizes)
    say("trace the encoder and translate it to ONNX")
    # No dimension is 0 or 1, nor like another one.
    source = source_of(loaded, 2, 7, True, np.random.default_rng(0))
    with_source = encoder_class()(loaded.module).eval()
    encoder = onnx.to_onnx(with_source, source, first, loaded, opset)
    say("trace the decoder and translate it to ONNX")
    module = decoder_class()(loaded.module, not sizes.sound).eval()
    turn = turn_of(loaded, sizes, Turn(2, 5, 3, 9, padded=True), 0)
    return encoder, onnx.to_onnx(module, turn, second, loaded, opset)


def _sources(loaded: LoadedModel, sizes: Sizes) -> list[Case]:
    import numpy as np

    cases: list[Case] = []
    for seed, (batch, length, padded) in enumerate(source_checks(sizes), start=1):
        feeds = source_of(loaded, batch, length, padded, np.random.default_rng(seed))
        cases.append((feeds, _flat(source_reference(loaded, sizes, feeds))))
    return cases


def _turns(loaded: LoadedModel, sizes: Sizes) -> list[Case]:
    cases: list[Case] = []
    for seed, turn in enumerate(turn_checks(sizes), start=1):
        feeds = turn_of(loaded, sizes, turn, seed)
        cases.append((feeds, turn_reference(loaded, sizes, feeds)))
    return cases


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys and values as rows of places, so that those of padding are not compared."""
    return {
        name: v.transpose(0, 2, 1, 3).reshape(v.shape[0], v.shape[2], -1)
        for name, v in values.items()
    }


def _onnx(work: _Work, graphs: tuple[Any, ...], precision: str, limit: int) -> Variant:
    suffix = "" if precision == "fp32" else f"_{precision}"
    if precision == "fp16":
        graphs = tuple(to_half(graph) for graph in graphs)
    files = [work.folder / "onnx" / f"{name}{suffix}.onnx" for name in (ENCODER, DECODER)]
    work.say(f"write and check {files[0].name} and {files[1].name}")
    beside = []
    for graph, file in zip(graphs, files, strict=True):
        beside += [f"onnx/{name}" for name in onnx.save_onnx(graph, file, limit=limit)]
    runs = [
        onnx.runner(file, signature.outputs)
        for file, signature in zip(files, signatures(work.sizes), strict=True)
    ]
    return _variant(work, "onnx", precision, files, beside, runs, {})


def _openvino(work: _Work, sources: list[Path], precision: str) -> list[Variant]:
    suffix = "_fp16" if precision == "fp16" else ""
    names = [f"openvino_{name}{suffix}.xml" for name in (ENCODER, DECODER)]
    files = [work.folder / "openvino" / name for name in names]
    work.say(f"write and check {names[0]} and {names[1]}")
    beside = []
    for source, file in zip(sources, files, strict=True):
        half = precision == "fp16"
        beside += [f"openvino/{name}" for name in openvino.to_openvino(source, file, half=half)]
    variants = []
    known = work.bundle.manifest.variants
    for shared in openvino.sharing(precision, lambda p: f"openvino-{p}" in known):
        options = openvino.compile_options(shared, cached=True)
        runs = [
            openvino.runner(file, signature.outputs, options)
            for file, signature in zip(files, signatures(work.sizes), strict=True)
        ]
        variants.append(_variant(work, "openvino", shared, files, beside, runs, options))
    return variants


def _variant(
    work: _Work,
    format: str,
    precision: str,
    files: list[Path],
    beside: list[str],
    runs: list[Run],
    options: Mapping[str, str],
) -> Variant:
    encoder, decoder = (f"{format}/{file.name}" for file in files)
    name = f"{format}-{precision}"
    first, second = signatures(work.sizes)
    return Variant(
        name=name,
        format=format,
        precision=precision,
        file=decoder,
        companions=(encoder, *beside),
        options=dict(options),
        inputs=tuple(dict.fromkeys((*first.inputs, *second.inputs))),
        output=second.outputs[-1],
        check=_compared(work, runs, check.TOLERANCES[precision], name),
    )


def _compared(work: _Work, runs: list[Run], tolerance: Tolerance, name: str) -> dict[str, Any]:
    """Check the encoder, the decoder, then both together, which write beside torch.

    Raises:
        ExportError: they give other answers than torch, or write another text.
    """
    encode, decode = runs

    def places(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return _flat(encode(feeds))

    first = check.compare(places, work.sources, tolerance, name=f"{name} encoder")
    second = check.compare(decode, work.turns, tolerance, name=f"{name} decoder")
    shapes = [{"part": "encoder", **shape} for shape in first["shapes"]]
    shapes += [{"part": "decoder", **shape} for shape in second["shapes"]]
    return {
        "reference": "torch fp32",
        "shapes": shapes,
        "max_abs_error": max(first["max_abs_error"], second["max_abs_error"]),
        "min_cosine": min(first["min_cosine"], second["min_cosine"]),
        "batch_invariance": max(first["batch_invariance"], second["batch_invariance"]),
        "tolerance": asdict(tolerance),
        "greedy_tokens": walk(encode, decode, work.loaded, work.sizes, tolerance, name),
    }
