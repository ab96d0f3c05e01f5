"""The fused graph gives the portable graph's answers, with the operators it promises."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers as tf
from onnx import TensorProto, helper

from memopt.exporters.fuse import fuse
from memopt.exporters.fuse_probe import Probe, _classify
from memopt.runtimes.cpu_graph import split_skip_layer_norm
from tests.parameters import mostly_slow

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 99, "intermediate_size": 64, "max_position_embeddings": 66}
IMAGE = {**SIZES, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
TOLERANCE = 1e-5


class Embedder(torch.nn.Module):
    """A text model with mean pooling, or an image or audio model with a plain mean."""

    def __init__(self, model: Any, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.keywords = model, keywords

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(self.keywords, inputs, strict=True))
        hidden = self.model(**named).last_hidden_state
        if "attention_mask" not in named:
            return hidden, torch.nn.functional.normalize(hidden.mean(1), dim=-1)
        keep = named["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * keep).sum(1) / keep.sum(1).clamp(min=1e-9)
        return hidden, torch.nn.functional.normalize(pooled, dim=-1)


def _whisper(config: Any) -> Any:
    return tf.models.whisper.modeling_whisper.WhisperEncoder(config)


# name -> model class, config, attention implementation, (attention, skip norm, embedding, gelu)
CASES: dict[str, tuple[Any, Any, str, tuple[int, int, int, int]]] = {
    "bert": (tf.BertModel, tf.BertConfig(**TEXT), "sdpa", (2, 4, 1, 2)),
    "bert-eager": (tf.BertModel, tf.BertConfig(**TEXT), "eager", (2, 4, 1, 2)),
    "roberta": (tf.RobertaModel, tf.RobertaConfig(**TEXT, pad_token_id=1), "sdpa", (2, 4, 1, 2)),
    "distilbert": (
        tf.DistilBertModel,
        tf.DistilBertConfig(
            vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=66
        ),
        "sdpa",
        (2, 4, 1, 2),
    ),
    "mpnet": (tf.MPNetModel, tf.MPNetConfig(**TEXT), "eager", (2, 4, 1, 2)),
    "clip-text": (tf.CLIPTextModel, tf.CLIPTextConfig(**TEXT), "sdpa", (2, 4, 0, 2)),
    "clip-image": (tf.CLIPVisionModel, tf.CLIPVisionConfig(**IMAGE), "sdpa", (2, 3, 0, 2)),
    "vit": (tf.ViTModel, tf.ViTConfig(**IMAGE), "sdpa", (2, 4, 0, 2)),
    "dinov2": (tf.Dinov2Model, tf.Dinov2Config(**IMAGE), "sdpa", (2, 4, 0, 2)),
    "siglip": (tf.SiglipVisionModel, tf.SiglipVisionConfig(**IMAGE), "sdpa", (2, 4, 0, 2)),
    "whisper": (
        _whisper,
        tf.WhisperConfig(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=50,
        ),
        "sdpa",
        (2, 4, 0, 4),
    ),
    "t5": (
        tf.T5EncoderModel,
        tf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        "eager",
        (2, 0, 0, 0),
    ),
    "modernbert": (
        tf.ModernBertModel,
        tf.ModernBertConfig(
            **TEXT, pad_token_id=0, global_attn_every_n_layers=2, local_attention=16
        ),
        "sdpa",
        (0, 4, 0, 2),
    ),
}


@functools.cache
def exported(name: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The portable graph of a small random model, exported once per test run."""
    cls, config, attention, _ = CASES[name]
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases are 0 and norms 1 at the start: nothing would be tested
            torch.nn.init.normal_(parameter.data, float(parameter.data.mean()), 0.1)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=64)
    if hasattr(config, "vocab_size") and name != "whisper":
        keywords: tuple[str, ...] = ("input_ids", "attention_mask")
        if cls is tf.BertModel:
            keywords += ("token_type_ids",)
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[0, 4:] = 0
        example = [torch.randint(2, 99, (3, 7)), mask, torch.zeros(3, 7, dtype=torch.long)]
        dynamic = tuple({0: batch, 1: sequence} for _ in keywords)
    else:
        keywords = ("input_features",) if name == "whisper" else ("pixel_values",)
        example = [torch.randn(3, 8, 100) if name == "whisper" else torch.randn(3, 3, 32, 32)]
        dynamic = ({0: batch},)
    program = torch.onnx.export(
        Embedder(model, keywords).eval(),
        tuple(example[: len(keywords)]),
        input_names=list(keywords),
        output_names=["last_hidden_state", "sentence_embedding"],
        dynamic_shapes=(dynamic,),
        dynamo=True,
        opset_version=20,
        verbose=False,
    )
    return program.model_proto, config.to_dict()


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feeds(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    """Inputs of five shapes: one token, right, left and scattered padding, a fully padded row."""
    rng = np.random.default_rng(0)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input}
    made = []
    for batch, length in ((1, 1), (1, 6), (5, 9), (2, 33), (3, 64)):
        mask = rng.integers(0, 2, (batch, length))
        mask[0] = 1
        if batch == 5:
            mask[1], mask[1, :5] = 0, 1
            mask[2], mask[2, 5:] = 0, 1
            mask[3] = 0
        pool = {
            "input_ids": rng.integers(2, 99, (batch, length)),
            "attention_mask": mask,
            "token_type_ids": rng.integers(0, 2, (batch, length)),
        }
        for name, dim in shapes.items():
            if name not in pool:
                size = [batch, *(d.dim_value for d in dim[1:])]
                pool[name] = rng.standard_normal(size).astype(np.float32)
        made.append({name: pool[name] for name in shapes})
    return made


def largest_difference(a: onnx.ModelProto, b: onnx.ModelProto, **fixed: Any) -> float:
    """Over both outputs; hidden states of a row without any token mean nothing and are left out."""
    left, right, worst = session(a), session(b), 0.0
    taken = {v.name for v in right.get_inputs()}
    for feed in feeds(a):
        feed = {**feed, **{k: np.zeros_like(feed[k]) for k, v in fixed.items() if v == 0}}
        hidden, pooled = left.run(None, feed)
        got = right.run(None, {k: v for k, v in feed.items() if k in taken})
        rows = feed["attention_mask"].any(1) if "attention_mask" in feed else slice(None)
        worst = max(worst, float(np.abs(hidden - got[0])[rows].max()))
        worst = max(worst, float(np.abs(pooled - got[1]).max()))
    return worst


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


# Text in every run; test-all has the other kinds of attention.
@pytest.mark.parametrize("name", mostly_slow(CASES, "bert"))
def test_fused_graph_is_right_and_complete(name: str) -> None:
    """Every architecture fuses as far as promised and answers as before on every shape and mask."""
    model, config = exported(name)
    before = model.SerializeToString(deterministic=True)
    fused, report = fuse(model, config)
    found = (report.attention, report.skip_layer_norm, report.embed_layer_norm, report.gelu)
    assert found == CASES[name][3], report.unfused
    ops = operators(fused)
    assert (ops["Attention"], ops["SkipLayerNormalization"]) == found[:2]
    assert ops["Softmax"] == 2 - report.attention
    assert [v.name for v in fused.graph.output] == ["last_hidden_state", "sentence_embedding"]
    assert [v.name for v in fused.graph.input] == [v.name for v in model.graph.input]
    onnx.checker.check_model(fused)
    assert largest_difference(model, fused) < TOLERANCE
    assert model.SerializeToString(deterministic=True) == before
    assert fuse(model, config)[0].SerializeToString() == fused.SerializeToString()


@pytest.mark.slow
def test_what_does_not_fuse_is_reported() -> None:
    """Rotary attention keeps its nodes and the report names each with the reason."""
    _, report = fuse(*exported("modernbert"))
    assert sum("the query is a Add, not a linear layer" in line for line in report.unfused) == 2


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("bert", {}),
        pytest.param("clip-text", {"unidirectional": 1}, marks=pytest.mark.slow),
        pytest.param("t5", {"scale": 1.0}, marks=pytest.mark.slow),
    ],
)
def test_attention_attributes(name: str, attributes: dict[str, float]) -> None:
    """Causal masks and unusual scales become attributes; the usual ones are left out."""
    fused, _ = fuse(*exported(name))
    node = next(n for n in fused.graph.node if n.op_type == "Attention")
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    found.pop("mask_filter_value", None)
    assert found == {"num_heads": 4, **attributes}


def test_weights_keep_addressable_names() -> None:
    """Merged weights carry what their parts share, hold their columns, and say what they are."""
    model, config = exported("bert")
    fused, _ = fuse(model, config)
    shapes = {t.name: tuple(t.dims) for t in fused.graph.initializer}
    prefix = "model.encoder.layer.1"
    assert shapes[f"{prefix}.attention.self.qkv.weight"] == (32, 96)
    assert shapes[f"{prefix}.attention.self.qkv.bias"] == (96,)
    assert shapes[f"{prefix}.intermediate.dense.weight"] == (32, 64)
    assert not any(name.startswith("val_") and len(shape) == 2 for name, shape in shapes.items())
    node = [n for n in fused.graph.node if n.op_type == "Attention"][1]
    made_of = {p.key: p.value for p in node.metadata_props}["memopt.weights"].split(",")
    assert made_of == [f"{prefix}.attention.self.{x}.weight" for x in ("query", "key", "value")]


def test_layers_that_share_a_bias_get_names_of_their_own() -> None:
    """Exporters merge equal biases (all zero before training); that must not merge names."""
    original, config = exported("bert")
    model = onnx.ModelProto()
    model.CopyFrom(original)
    for node in model.graph.node:
        del node.metadata_props[:]  # no module scopes to help
        for i, name in enumerate(node.input):
            if name.endswith(("query.bias", "key.bias", "value.bias")):
                node.input[i] = "model.encoder.layer.0.attention.self.query.bias"
    fused, report = fuse(model, config)
    assert report.attention == 2
    assert largest_difference(model, fused) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", pytest.param("clip-text", marks=pytest.mark.slow)])
def test_split_skip_layer_norm_computes_the_same(name: str, tmp_path: Path) -> None:
    """Add + LayerNormalization stands for the fused operator in post-norm and pre-norm models."""
    model, config = exported(name)
    fused, report = fuse(model, config)
    onnx.save(fused, tmp_path / "fused.onnx")
    assert split_skip_layer_norm(tmp_path / "fused.onnx") == report.skip_layer_norm
    split = onnx.load(tmp_path / "fused.onnx")
    assert operators(split)["SkipLayerNormalization"] == 0
    assert operators(split)["LayerNormalization"] >= report.skip_layer_norm
    onnx.checker.check_model(split)
    assert largest_difference(model, split) < TOLERANCE


def test_dynamic_quantization_finds_every_attention(tmp_path: Path) -> None:
    """ONNX Runtime's dynamic int8 turns each fused attention into QAttention, close to float."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, config = exported("bert")
    fused, _ = fuse(model, config)
    onnx.save(fused, tmp_path / "fused.onnx")
    quantize_dynamic(
        tmp_path / "fused.onnx", tmp_path / "int8.onnx", per_channel=True,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    int8 = onnx.load(tmp_path / "int8.onnx")
    assert operators(int8)["QAttention"] == 2
    feed = feeds(model)[3]
    exact, close = session(model).run(None, feed)[1], session(int8).run(None, feed)[1]
    assert float((exact * close).sum(1).min()) > 0.98


def _mask_model(window: int | None, causal: bool) -> ir.Model:
    """attention_mask -> bias of a padding, causal or sliding-window mask, as exporters write it."""

    class Mask(torch.nn.Module):
        def forward(self, attention_mask: torch.Tensor) -> torch.Tensor:
            keys = torch.arange(attention_mask.shape[1])
            keep = attention_mask[:, None, None, :].bool()
            if window is not None:
                keep = keep & ((keys[:, None] - keys[None, :]).abs() <= window)[None, None]
            if causal:
                keep = keep & (keys[:, None] >= keys[None, :])[None, None]
            return torch.where(keep, 0.0, torch.finfo(torch.float32).min)

    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},)
    program = torch.onnx.export(
        Mask().eval(), (torch.ones(3, 7, dtype=torch.long),), input_names=["attention_mask"],
        output_names=["bias"], dynamic_shapes=dynamic, dynamo=True, verbose=False,
    )  # fmt: skip
    return ir.from_proto(program.model_proto)


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [(None, False, (True, False, False)), (None, True, (True, True, False)),
     (40, False, (False, False, True))],
)  # fmt: skip
def test_a_window_is_not_taken_for_padding(
    window: int | None, causal: bool, expected: tuple[bool, bool, bool]
) -> None:
    """A mask is tried out past its widest window, so that a local one is never read as padding."""
    model = _mask_model(window, causal)
    kind = Probe(model, positions=512, vocabulary=10).mask(model.graph.outputs[0])
    assert (kind.padding, kind.causal, kind.general) == expected


def _attention_graph(**change: Any) -> onnx.ModelProto:
    """One hand-written attention; ``change`` breaks one thing in it."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []

    def constant(name: str, value: np.ndarray) -> str:
        tensors.append(onnx.numpy_helper.from_array(value, name))
        return name

    split, merge = constant("split", np.array([0, 0, 2, 4])), constant("merge", np.array([0, 0, 8]))
    for part, source in zip("qkv", change.get("sources", "xxx"), strict=True):
        weight = constant(f"{part}.weight", rng.standard_normal((8, 8)).astype(np.float32))
        nodes.append(helper.make_node("MatMul", [source, weight], [f"{part}0"]))
        nodes.append(helper.make_node("Reshape", [f"{part}0", split], [f"{part}1"]))
        perm = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [f"{part}1"], [part], perm=perm))
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["scores"]))
    nodes.append(helper.make_node("Softmax", ["scores"], ["p"], axis=change.get("axis", -1)))
    nodes.append(helper.make_node("MatMul", ["p", "v"], ["context"]))
    nodes.append(helper.make_node("Transpose", ["context"], ["c"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["c", merge], ["y"]))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 8])
        for name in sorted(set(change.get("sources", "xxx")))
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 8])]
    for name in change.get("outputs", ()):
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, None), ({"axis": 2}, "softmax over axis 2"), ({"sources": "xzz"}, "different inputs"),
     ({"outputs": ["p"]}, "weights are an output of the graph")],
)  # fmt: skip
def test_attention_that_cannot_be_one_operator_stays(
    change: dict[str, Any], reason: str | None
) -> None:
    """Cross attention, another axis, exposed weights: left alone, reported, still the same."""
    model = _attention_graph(**change)
    fused, report = fuse(model, {})
    assert report.attention == (reason is None)
    assert reason is None or reason in report.unfused[0]
    rng = np.random.default_rng(1)
    feed = {v.name: rng.standard_normal((2, 5, 8)).astype(np.float32) for v in model.graph.input}
    for a, b in zip(session(model).run(None, feed), session(fused).run(None, feed), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_a_mask_over_windows_of_an_image_is_no_padding_mask() -> None:
    """Swin's mask has a shape that no (batch, key) mask broadcasts to: it is kept as it is."""
    windows = np.zeros((6, 1, 5, 5), np.float32)
    windows[0, 0, :, 3:] = -10_000.0
    assert _classify(windows, np.ones((1, 16), np.int64)).general


@pytest.mark.parametrize(("half", "gelus"), [(0.5, 1), (0.6, 0)])
def test_gelu_written_with_erf_is_recognised_by_its_constants(half: float, gelus: int) -> None:
    """x * 0.5 * (1 + erf(x / sqrt 2)) fuses; the same nodes with another constant do not."""
    values = {"root": 2**0.5, "one": 1.0, "half": half}
    tensors = [onnx.numpy_helper.from_array(np.float32(v), k) for k, v in values.items()]
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["x", "c"], ["d"]),
        helper.make_node("Mul", ["d", "half"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    fused, report = fuse(model, {})
    assert report.gelu == gelus
    feed = {"x": np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3)}
    np.testing.assert_allclose(
        session(model).run(None, feed)[0], session(fused).run(None, feed)[0], atol=1e-6
    )
    assert dataclasses.replace(report, gelu=0).fused == 0
