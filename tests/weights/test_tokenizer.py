"""tokenizer.json in a bundle does what transformers' own tokenizer does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from memopt.bundle import Bundle
from memopt.errors import WeightsError
from memopt.runtimes.text import TextFrontEnd
from memopt.weights import tokenizer as tokenizer_module
from memopt.weights.convert import convert

TEXTS = [
    *tokenizer_module.PROBES,
    "left [unused] right [MASK]",
    "the first half is about boats " * 30 + "and the second one about snow " * 30,
]


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny BERT's folder without sentence-transformers' files."""
    folder = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    return folder


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def ours(bundle: Bundle) -> list[list[int]]:
    front = TextFrontEnd(bundle, ("input_ids", "attention_mask"))
    found = []
    for text in TEXTS:
        (batch,) = front.prepare([text])
        kept = batch.feed["attention_mask"][0].astype(bool)
        found.append(batch.feed["input_ids"][0][kept].tolist())
    return found


def theirs(folder: Path, limit: int | None) -> list[list[int]]:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder)
    cut = {"truncation": True, "max_length": limit} if limit else {}
    return [made(text, **cut)["input_ids"] for text in TEXTS]


TOKEN = {
    "content": "[unused]",
    **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False),
    "special": True,
}
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "case kept": {"do_lower_case": False},
    "accents kept": {"strip_accents": False},
    "added token": {"added_tokens_decoder": {"5": TOKEN}},
    "cut on the left": {"truncation_side": "left", "model_max_length": 8},
    "other end token": {"sep_token": "[MASK]"},
    "padded on the left": {"padding_side": "left"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_token_ids_are_those_of_transformers(
    source: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Whatever tokenizer_config.json changes is in tokenizer.json afterwards."""
    edit(source, "tokenizer_config.json", **change)
    bundle = convert(source, tmp_path / "bundle", on_warning=pytest.fail)
    wanted = theirs(source, bundle.manifest.max_length)
    assert ours(bundle) == wanted
    plain = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    assert [encoding.ids for encoding in map(plain.encode, TEXTS)] == wanted


def test_saved_truncation_and_padding_do_not_count(source: Path, tmp_path: Path) -> None:
    """A model without a limit gets whole texts, though its tokenizer was saved while cutting."""
    stored = Tokenizer.from_file(str(source / "tokenizer.json"))
    stored.enable_truncation(5)
    stored.enable_padding(length=200)
    stored.save(str(source / "tokenizer.json"))
    edit(source, "tokenizer_config.json", model_max_length=10**30)
    config = {"model_type": "t5", "architectures": ["T5EncoderModel"], "n_positions": 9}
    (source / "config.json").write_text(json.dumps(config))
    edit(source, "tokenizer_config.json", tokenizer_class="BertTokenizer")
    bundle = convert(source, tmp_path / "bundle", on_warning=pytest.fail)
    assert bundle.manifest.max_length is None
    found = ours(bundle)
    assert found == theirs(source, None)
    assert max(map(len, found)) > 100


def test_an_older_bundle_is_cut_as_its_config_says(source: Path, tmp_path: Path) -> None:
    """A tokenizer.json that was only copied is still read with the configured side."""
    bundle = convert(source, tmp_path / "bundle")
    edit(bundle.path, "tokenizer.json", truncation=None)
    edit(bundle.path, "tokenizer_config.json", truncation_side="left")
    edit(source, "tokenizer_config.json", truncation_side="left")
    assert ours(bundle) == theirs(source, bundle.manifest.max_length)


def test_a_tokenizer_that_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    """split_special_tokens is no part of tokenizer.json: convert says so and writes nothing."""
    edit(source, "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(WeightsError, match="gives other token ids than transformers"):
        convert(source, tmp_path / "made" / "bundle")
    assert not (tmp_path / "made" / "bundle").exists()


def test_a_tokenizer_transformers_cannot_read_is_told(source: Path, tmp_path: Path) -> None:
    """tokenizer.json alone still serves, and a line says that nobody vouched for it."""
    edit(source, "tokenizer_config.json", tokenizer_class="NobodysTokenizer", auto_map={"x": "y"})
    lines: list[str] = []
    before = (source / "tokenizer.json").read_bytes()
    bundle = convert(source, tmp_path / "bundle", on_warning=lines.append)
    if lines:  # transformers may read it with a class of its own
        assert "taken as it lies" in lines[0]
        assert (bundle.path / "tokenizer.json").read_bytes() == before
    else:
        assert ours(bundle) == theirs(source, bundle.manifest.max_length)


def test_without_transformers_the_tokenizer_is_taken_as_it_lies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """convert needs no transformers where tokenizer.json is there; it says what it did not do."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines: list[str] = []
    convert(source, tmp_path / "bundle", on_warning=lines.append)
    assert len(lines) == 1
    assert "transformers is needed to read the tokenizer" in lines[0]


# Kinds of models whose checkpoints may come with a SentencePiece vocabulary alone, and its name.
PIECES = {
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", "spm.model"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", "sentencepiece.bpe.model"),
    "camembert": ("CamembertConfig", "CamembertModel", "sentencepiece.bpe.model"),
    "albert": ("AlbertConfig", "AlbertModel", "spiece.model"),
    "t5": ("T5Config", "T5EncoderModel", "spiece.model"),
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece vocabulary of a few hundred pieces, with the names that DeBERTa's has."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("pieces") / "spm"
    named = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(prefix),
        vocab_size=180,
        hard_vocab_limit=False,
        minloglevel=2,
        **{f"{name}_id": number for number, name in enumerate(named)},
        **{f"{name}_piece": piece for name, piece in named.items()},
    )
    return prefix.with_suffix(".model")


def of_pieces(kind: str, pieces: Path, folder: Path) -> Path:
    """Write a checkpoint whose tokenizer is its SentencePiece vocabulary."""
    import transformers

    config, model, name = PIECES[kind]
    sizes: dict[str, Any] = {"vocab_size": 1_000, "hidden_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 130}
    if kind == "t5":
        sizes = {"vocab_size": 1_000, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    if kind == "albert":
        sizes["embedding_size"] = 16
    getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    shutil.copy(pieces, folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))
    return folder


@pytest.mark.parametrize("kind", PIECES)
def test_a_vocabulary_of_pieces_alone_is_a_tokenizer(
    kind: str, pieces: Path, tmp_path: Path
) -> None:
    """As microsoft/deberta-v3-base and older checkpoints have it; the ids are transformers' own."""
    source = of_pieces(kind, pieces, tmp_path / "source")
    bundle = convert(str(source), tmp_path / "bundle")
    assert (bundle.path / "tokenizer.json").is_file()
    found = [
        Tokenizer.from_file(str(bundle.path / "tokenizer.json")).encode(text).ids for text in TEXTS
    ]
    assert found == theirs(source, bundle.manifest.max_length)


def test_its_pieces_are_what_sentencepiece_cuts(pieces: Path, tmp_path: Path) -> None:
    """Beside transformers' reading of the file, the library's own."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    source = of_pieces("deberta-v2", pieces, tmp_path / "source")
    bundle = convert(str(source), tmp_path / "bundle")
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_truncation()
    for text in (tokenizer_module.PROBES[1], TEXTS[-1]):
        assert tokenizer.encode(text, add_special_tokens=False).tokens == library.encode(
            text, out_type=str
        )


@pytest.mark.parametrize("kind", PIECES)
def test_letters_that_transformers_does_not_rewrite_are_told(
    kind: str, pieces: Path, tmp_path: Path
) -> None:
    """DeBERTa's, which it reads without them; the others, with options of their own, are right."""
    source = of_pieces(kind, pieces, tmp_path / "source")
    edit(source, "tokenizer_config.json", do_lower_case=True, truncation_side="left")
    lines: list[str] = []
    convert(str(source), tmp_path / "bundle", on_warning=lines.append)
    if kind != "deberta-v2":
        assert lines == []
        return
    assert len(lines) == 1
    assert "spm.model unlike it is" in lines[0]
    assert "\u25811" in lines[0].partition("where the file has")[2]


def test_so_are_those_of_a_tokenizer_that_was_right(pieces: Path, tmp_path: Path) -> None:
    """Its tokenizer.json lies there with them; transformers makes it anew without."""
    import sentencepiece.sentencepiece_model_pb2 as proto
    from tokenizers import normalizers

    source = of_pieces("deberta-v2", pieces, tmp_path / "source")
    convert(str(source), tmp_path / "first")
    letters = proto.ModelProto.FromString(pieces.read_bytes()).normalizer_spec.precompiled_charsmap
    right = Tokenizer.from_file(str(tmp_path / "first" / "tokenizer.json"))
    right.normalizer = normalizers.Precompiled(letters)
    right.save(str(source / "tokenizer.json"))
    (source / "spm.model").unlink()
    lines: list[str] = []
    convert(str(source), tmp_path / "bundle", on_warning=lines.append)
    assert len(lines) == 1
    assert "tokenizer.json unlike it is" in lines[0]


@pytest.mark.parametrize(("added", "longest"), [(False, 200), (True, 130)])
def test_a_deberta_takes_what_its_pipeline_says(
    added: bool, longest: int, pieces: Path, tmp_path: Path
) -> None:
    """Past its positions too, where they are not added to the tokens; as sentence-transformers."""
    source = of_pieces("deberta-v2", pieces, tmp_path / "source")
    edit(source, "config.json", position_biased_input=added)
    edit(source, "tokenizer_config.json", model_max_length=512)
    (source / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 200}))
    kind = "sentence_transformers.models.Transformer"
    modules = [{"idx": 0, "name": "0", "path": "", "type": kind}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": kind[:-11] + "Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert convert(str(source), tmp_path / "bundle").manifest.max_length == longest


def test_without_sentencepiece_the_missing_package_is_named(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not tiktoken, which transformers tries next and asks for."""
    source = of_pieces("deberta-v2", pieces, tmp_path / "source")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (why,) = tokenizer_module.write_tokenizer(source, tmp_path, 128)
    assert "sentencepiece" in why
    assert "pip install" in why
    assert "tiktoken" not in why
