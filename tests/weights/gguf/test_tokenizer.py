"""The tokenizer of a GGUF file gives the ids of transformers' own reading, or the model's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer

from memopt.errors import WeightsError
from memopt.weights.gguf.file import open_gguf
from memopt.weights.gguf.folder import lay_out, open_model
from memopt.weights.gguf.splits import KNOWN, word_splitter
from memopt.weights.gguf.tokenizer import build_tokenizer
from memopt.weights.gguf.vocabulary import read_vocabulary
from tests.weights.gguf.kit import (
    CASES,
    CONTROL,
    TOKENS,
    add_tokenizer,
    make_model,
    write_case,
)

TEXTS = [
    "",
    " lead, tail  ",
    "The kettle's café: 3 naïve thes in 12.",
    "line\n\n\ttab\r\n  two  spaces   three",
    "日本語の文章 한국어 عربى हिन्दी",
    "emoji 😀 👩‍🔬 e\u0301 zero\u200bwidth",
    "x=y+1; <|im_end|> a<|bos|>b <|eos|>",
    "don't WE'LL I'm",
]
SPACE = "▁"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [SPACE, *"abcdehiknorstuw", "he", "th", "the", f"{SPACE}t", f"{SPACE}the", "in", SPACE * 2]


def write(path: Path, arch: str, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """Write a file that has only a tokenizer and the table of tokens."""
    writer = gguf.GGUFWriter(path, arch)
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        getattr(writer, f"add_{name}")(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    add(writer)
    writer.add_tensor("token_embd.weight", np.zeros((600, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(writer: gguf.GGUFWriter, *, words: list[str] = WORDS, **flags: bool) -> None:
    """Add a SentencePiece vocabulary: bytes, letters, and words by falling score."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*PIECES, *words])
    bytes_, known = len(PIECES) - 3, len(words)
    writer.add_token_scores([0.0] * len(PIECES) + [-float(i) for i in range(known)])
    writer.add_token_types([2, 3, 3, *[6] * bytes_, *[1] * known])
    for name, value in {"unk": 0, "bos": 1, "eos": 2}.items():
        getattr(writer, f"add_{name}_token_id")(value)
    for name, flag in flags.items():
        getattr(writer, name)(flag)


def built(path: Path) -> Tokenizer:
    """Build the tokenizer of a file."""
    return build_tokenizer(read_vocabulary(open_gguf(path), 600))


@pytest.mark.parametrize(
    ("arch", "pre"),
    [("llama", "llama-bpe"), ("qwen2", "qwen2"), ("gpt2", "gpt-2"), ("llama", "gpt-4o")],
)
def test_byte_level_ids_are_those_of_transformers(arch: str, pre: str, tmp_path: Path) -> None:
    """Words are cut as ``tokenizer.ggml.pre`` says, tokens that are no text stay whole."""
    path = write(tmp_path / "m.gguf", arch, lambda writer: add_tokenizer(writer, pre))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = built(path)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False).endswith(text)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece_ids_are_those_of_transformers(arch: str, bos: bool, tmp_path: Path) -> None:
    """Merges come from scores; what no piece spells is its bytes; the first token as it is said."""
    add = lambda writer: pieces(writer, add_add_bos_token=bos)  # noqa: E731
    path = write(tmp_path / "m.gguf", arch, add)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = built(path)
    for text in (*TEXTS, "the hen in the hut", "  the", "<s>the</s>"):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_no_space_is_put_before_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    """``add_space_prefix`` false is honoured, which transformers does not read."""
    with_, without = tmp_path / "with.gguf", tmp_path / "without.gguf"
    write(with_, "llama", pieces)
    write(without, "llama", lambda writer: pieces(writer, add_add_space_prefix=False))
    assert built(with_).encode("the").tokens == ["<s>", f"{SPACE}the"]
    assert built(without).encode("the").tokens == ["<s>", "the"]
    assert built(without).decode(built(without).encode("the").ids) == "the"


def test_ends_of_turns_of_phi3_take_the_spaces_behind_them(tmp_path: Path) -> None:
    """As in the model's own tokenizer.json, and only there."""
    for arch, tokens in (("phi3", ["</s>", "the"]), ("llama", ["</s>", "<0x0A>", "the"])):
        add = lambda writer: pieces(writer, add_add_bos_token=False)  # noqa: E731
        path = write(tmp_path / f"{arch}.gguf", arch, add)
        found = [t.strip(f"{SPACE}\n") for t in built(path).encode("</s>\nthe").tokens]
        assert [t for t in found if t] == tokens
        assert built(path).encode("<s>\n").tokens[-1] == "<0x0A>"


def test_digits_of_smollm_are_tokens_of_their_own(tmp_path: Path) -> None:
    """A merge of the vocabulary, 12, is cut before it is found: as the model's own does."""
    for pre, tokens in (("gpt-2", ["12"]), ("smollm", ["1", "2"])):
        path = write(tmp_path / f"{pre}.gguf", "llama", lambda w, pre=pre: add_tokenizer(w, pre))
        assert built(path).encode("12").tokens == tokens


@pytest.mark.parametrize("name", KNOWN)
def test_words_lose_nothing(name: str) -> None:
    """Each way to cut words gives back the whole text, in order."""
    splitter, whole = word_splitter(name), decoders.ByteLevel()
    for text in TEXTS:
        assert whole.decode([word for word, _ in splitter.pre_tokenize_str(text)]) == text


def test_word_pieces_are_bert_s_own(tmp_path: Path) -> None:
    """llama.cpp marks the beginnings of words, WordPiece their rest; capitals tell cased ones."""
    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "a", ",", "##h"]

    def add(writer: gguf.GGUFWriter, words: list[str]) -> None:
        marked = [w if w[0] == "[" else w[2:] if w[:2] == "##" else SPACE + w for w in words]
        writer.add_tokenizer_model("bert")
        writer.add_token_list(marked)
        writer.add_token_types([3] * 5 + [1] * (len(words) - 5))
        ids = {"padding": 0, "unknown": 1, "cls": 2, "seperator": 3, "mask": 4}
        for name, value in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)

    path = write(tmp_path / "m.gguf", "bert", lambda writer: add(writer, own))
    assert built(path).encode("Cats, áh").tokens == [
        "[CLS]",
        "cat",
        "##s",
        ",",
        "a",
        "##h",
        "[SEP]",
    ]
    assert built(path).encode("a", "cat").type_ids == [0, 0, 0, 1, 1]
    path = write(tmp_path / "n.gguf", "bert", lambda writer: add(writer, [*own, "Cat"]))
    assert built(path).encode("Cats").tokens == ["[CLS]", "Cat", "##s", "[SEP]"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"model": "gpt2"}, "no tokenizer"),
    "kind": ({"model": "rwkv", "list": ["a"]}, "kind 'rwkv'"),
    "cutting": (
        {"model": "gpt2", "list": ["a", "aa"], "merges": ["a a"], "pre": "klingon"},
        "'klingon' is a way to cut words",
    ),
    "twice": ({"model": "gpt2", "list": ["a", "a"]}, "'a' twice"),
    "no merges": ({"model": "gpt2", "list": ["a"]}, "merges is missing"),
    "half a merge": ({"model": "gpt2", "list": ["a"], "merges": ["ab"]}, "'ab', not two tokens"),
    "other merge": ({"model": "gpt2", "list": ["a"], "merges": ["a b"]}, "does not fit together"),
    "special id": ({"model": "llama", "list": ["a"], "bos": 5}, "is 5, there are 1 tokens"),
    "no scores": ({"model": "llama", "list": ["a"]}, "scores is None"),
    "too many": ({"model": "gpt2", "list": [str(n) for n in range(700)]}, "its model has 600"),
    "kinds": ({"model": "gpt2", "list": ["a"], "types": [1, 1]}, "not one kind for each of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_tokenizers_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    """The message says what is wrong, with the value."""
    parts, said = BAD[name]

    def add(writer: gguf.GGUFWriter) -> None:
        methods = {"model": "tokenizer_model", "pre": "tokenizer_pre", "bos": "bos_token_id"}
        for part, value in parts.items():
            getattr(writer, f"add_{methods.get(part, f'token_{part}')}")(value)

    path = write(tmp_path / "m.gguf", "llama", add)
    with pytest.raises(WeightsError, match=said):
        built(path)


def test_template_and_ids_lie_where_transformers_looks(tmp_path: Path) -> None:
    """Chat template, named ones too; what ends a text, the end of a turn among it."""
    case = CASES[0]
    path = write_case(tmp_path / "m.gguf", case, make_model(case))
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", case.arch)
    for name, values in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, values.contents(), values.types[0])
    add_tokenizer(writer)
    writer.add_eot_token_id(2)
    writer.add_chat_template(
        [
            {"name": "default", "template": "{{ messages[0]['content'] }}"},
            {"name": "tool_use", "template": "tools"},
        ]
    )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = tmp_path / "folder"
    folder.mkdir()
    lay_out(open_model(tmp_path / "n.gguf"), folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 2}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"
    assert tokenizer.get_chat_template("tool_use") == "tools"
    assert (tokenizer.bos_token, tokenizer.eos_token) == tuple(CONTROL[:2])
    assert len(tokenizer) == len(TOKENS)
