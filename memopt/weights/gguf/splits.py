"""How a byte-level vocabulary cuts a text into words before it merges: ``tokenizer.ggml.pre``.

The names are llama.cpp's (``llama-vocab.cpp``), the expressions those of the models' own
``tokenizer.json``.
"""

from __future__ import annotations

from typing import Any

from memopt.errors import WeightsError
from memopt.registry import nearest

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_QWEN2 = rf"{_WORDS}|\p{{N}}{_REST}"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_SLASHES}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}{_SLASHES}"
)
# Names that one expression cuts.
_EXPRESSIONS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
# GPT-2's own words; of the second kind each digit is one.
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_FALCON = "falcon"
# Whole words of the vocabulary are taken before anything is merged.
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
# They begin every text, unless the file says otherwise.
BEGINS = _WHOLE_WORDS
KNOWN = (*_GPT2, *_DIGITS, _FALCON, *_EXPRESSIONS)


def word_splitter(name: str | None) -> Any:
    """Return the pre-tokenizer of a ``tokenizer.ggml.pre``; GPT-2's where a file says none.

    Raises:
        WeightsError: one that memopt does not know.

    >>> [word for word, _ in word_splitter("smollm").pre_tokenize_str("in 12")]
    ['in', 'Ġ', '1', '2']
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    words = ByteLevel(add_prefix_space=False, use_regex=True)
    if name is None or name in _GPT2:
        return words
    if name in _DIGITS:
        return Sequence([Digits(individual_digits=True), words])
    if name == _FALCON:
        three = Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")
        return Sequence([Punctuation("contiguous"), words, Digits(individual_digits=False), three])
    if name not in _EXPRESSIONS:
        raise WeightsError(
            f"tokenizer.ggml.pre {name!r} is a way to cut words that memopt does not know",
            fix=nearest(name, KNOWN),
        )
    return Sequence(
        [
            Split(Regex(_EXPRESSIONS[name]), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def takes_whole_words(name: str | None) -> bool:
    """Whether a word that is a token stays one, whatever the merges say.

    >>> takes_whole_words("llama-bpe"), takes_whole_words("gpt-2")
    (True, False)
    """
    return name in _WHOLE_WORDS
