"""Encoder and decoder as two graphs: further kinds, and float16 and bfloat16."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ExportError
from memopt.exporters.base import export
from memopt.weights.convert import convert
from tests.parameters import mostly_slow
from tests.runtimes.generate.pair_kit import MODELS, PAD, scatter

_BART, _T5 = MODELS["bart"][2], MODELS["t5"][2]
# Class, config, settings.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", _BART),
}


def built(folder: Path, cls: str, config: str, settings: dict[str, Any]) -> Bundle:
    torch.manual_seed(3)
    settings = {**settings, "decoder_start_token_id": PAD}
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    scatter(model)
    model.save_pretrained(folder / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no tokenizer
        return convert(folder / "source", folder / "bundle")


@pytest.mark.parametrize("kind", mostly_slow(KINDS))
def test_every_kind_writes_what_torch_writes(kind: str, tmp_path: Path) -> None:
    """Keys, values and logits are torch's in every cut and padding, and so are its tokens."""
    bundle = built(tmp_path, *KINDS[kind])
    assert bundle.manifest.task == "text2text-generation"
    (variant,) = export(bundle)
    assert variant.check is not None
    assert variant.check["min_cosine"] >= 0.99999
    assert variant.check["greedy_tokens"] > 20
    for name in (variant.file, variant.companions[0]):
        graph = onnx.load(bundle.path / name)
        assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}


@pytest.mark.slow
def test_half_as_many_bits_pass_their_check(tmp_path: Path) -> None:
    """OpenVINO's float16 and bfloat16 are checked like the rest.

    Not of T5: where the processor has bfloat16, its position buckets are computed so too, come out
    as others, and the graph is refused.
    """
    name, config, settings, _ = MODELS["bart"]
    bundle = built(tmp_path, name, config, settings)
    export(bundle)
    for precision in ("fp16", "bf16"):
        (variant,) = export(open_bundle(bundle.path), format="openvino", precision=precision)
        assert variant.check is not None
        assert variant.check["tolerance"]["max_abs_error"] >= 5e-2


def test_another_task_of_the_bundle_is_refused(tmp_path: Path) -> None:
    """Two graphs are of a bundle's own task: the way to the other one is said."""
    name, config, settings, _ = MODELS["t5"]
    bundle = convert_as(tmp_path, "embedding", name, config, settings)
    with pytest.raises(ExportError, match="convert it with --task text2text-generation"):
        export(bundle, task="text2text-generation")


def convert_as(folder: Path, task: str, cls: str, config: str, settings: dict[str, Any]) -> Bundle:
    built(folder, cls, config, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(folder / "source", folder / "other", task=task)
