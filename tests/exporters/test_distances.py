"""DeBERTa's attention by the distances of a text gives what transformers' gives."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from memopt.bundle import open_bundle
from memopt.exporters.base import export
from memopt.exporters.distances import by_distance
from memopt.exporters.encoder import wrap
from memopt.exporters.from_v2 import export_v2
from memopt.exporters.onnx import to_onnx
from memopt.quantization.arrow import ArrowQuantizer
from memopt.weights.convert import convert
from tests.exporters.kit import built, manifest_of, prepared

TEXT: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "max_position_embeddings": 64,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def loud(model: Any) -> Any:
    """Give a model weights with which positions matter: the usual noise is next to nothing."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def agrees(model: Any, lengths: Sequence[int]) -> None:
    """Compare, of texts so long, what a model answers by distance, before and after."""
    for tokens in lengths:
        ids = torch.randint(3, 99, (3, tokens))
        mask = torch.ones_like(ids)
        mask[1, tokens // 2 + 1 :] = 0
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask)[0]
            with by_distance(model):
                found = model(ids, attention_mask=mask)[0]
            torch.testing.assert_close(found[mask > 0], wanted[mask > 0], atol=5e-5, rtol=0)
            assert torch.equal(model(ids, attention_mask=mask)[0], wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # as DeBERTa-v3
        {"share_att_key": False, "norm_rel_ebd": "none"},
        {"pos_att_type": ["c2p"]},
        {"pos_att_type": ["p2c"]},
        {"pos_att_type": []},
        {"position_buckets": 8, "max_relative_positions": 16},
        {"position_buckets": -1},  # as DeBERTa-v2-xlarge before buckets
        {"position_buckets": -1, "max_relative_positions": 8},
        {"relative_attention": False, "position_biased_input": True},
    ],
)
def test_the_scores_are_transformers_own(settings: dict[str, Any]) -> None:
    """Of one token, of few, and of more than the model was made for, with padding; then undone."""
    torch.manual_seed(0)
    model = loud(hf.DebertaV2Model(hf.DebertaV2Config(**{**TEXT, **settings})))
    before = dict(model.named_buffers())
    agrees(model, (1, 2, 3, 17, 64) + ((150,) if not settings.get("position_biased_input") else ()))
    assert dict(model.named_buffers()).keys() == before.keys()


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_relative_positions": 8}, {"pos_att_type": ["p2c"]}, {"talking_head": True}],
)
def test_so_are_the_first_ones(settings: dict[str, Any]) -> None:
    """DeBERTa's first version has a layout of its own and takes each distance as it is."""
    torch.manual_seed(0)
    model = loud(hf.DebertaModel(hf.DebertaConfig(**{**TEXT, **settings})))
    agrees(model, (1, 2, 17, 64, 100))


def test_what_cannot_be_changed_is_left_as_it_was() -> None:
    """The first layer has its positions already where the second's cannot be projected."""
    model = hf.DebertaV2Model(hf.DebertaV2Config(**{**TEXT, "share_att_key": False}))
    before = [name for name, _ in model.named_buffers()]
    model.encoder.layer[1].attention.self.pos_query_proj = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"), by_distance(model):
        pass
    assert [name for name, _ in model.named_buffers()] == before
    first = model.encoder.layer[0].attention.self
    assert "disentangled_attention_bias" not in vars(first)


def test_sounds_have_the_same_attention() -> None:
    """SEW-D is a DeBERTa over sound."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {name: TEXT[name] for name in TEXT if name.startswith("num_")}
    model = loud(
        hf.SEWDModel(
            hf.SEWDConfig(
                **sizes,
                hidden_size=32,
                intermediate_size=48,
                position_buckets=16,
                max_position_embeddings=64,
                conv_dim=(16,) * 3,
                conv_stride=(5, 2, 2),
                conv_kernel=(10, 3, 3),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2,
            )
        )
    )
    sound = torch.randn(2, 4_000)
    with torch.no_grad():
        wanted = model(sound)[0]
        with by_distance(model):
            found = model(sound)[0]
    torch.testing.assert_close(found, wanted, atol=5e-4, rtol=1e-4)


def test_a_graph_holds_no_products_with_distances_that_no_text_has() -> None:
    """Nothing is repeated for each text, and nothing picked out of all positions afterwards."""
    model = built("DebertaV2Config", "DebertaV2Model", **TEXT)
    loaded, signature, cases = prepared(model, "mean")
    module = wrap(loaded, manifest_of(model, "mean"), "embedding")
    graph = to_onnx(module, cases[0][0], signature, loaded, 20)
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert not {"Tile", "GatherElements"} & kinds.keys()
    assert kinds["MatMul"] == TEXT["num_hidden_layers"] * (4 + 2 + 2 + 2)


@pytest.mark.parametrize("kind", ["Deberta", pytest.param("DebertaV2", marks=pytest.mark.slow)])
def test_a_graph_of_quantized_weights_has_their_positions(kind: str, tmp_path: Path) -> None:
    """Not those that were projected with the float weights: it would not be of the file's."""
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**TEXT)
    loud(getattr(hf, f"{kind}Model")(config)).save_pretrained(tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no tokenizer
        bundle = convert(str(tmp_path / "source"), tmp_path / "bundle")
    export(bundle, format="onnx")
    ArrowQuantizer().quantize(bundle.weights, tmp_path / "v2.parquet")
    variant = export_v2(open_bundle(bundle.path), tmp_path / "v2.parquet")
    assert variant.check is not None
    assert variant.check["min_cosine"] > 0.999999
