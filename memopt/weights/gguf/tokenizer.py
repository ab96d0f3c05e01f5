"""``tokenizer.json`` of a GGUF file, built from its vocabulary with the ``tokenizers`` package.

The pieces are those of the models' own tokenizers, as transformers has them, with the cutting of
words that ``tokenizer.ggml.pre`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from memopt.errors import WeightsError, first_line
from memopt.registry import nearest
from memopt.weights.gguf.splits import BEGINS, takes_whole_words, word_splitter
from memopt.weights.gguf.vocabulary import Vocabulary

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def build_tokenizer(vocabulary: Vocabulary) -> Any:
    """Return the ``tokenizers.Tokenizer`` of a file.

    Raises:
        WeightsError: a kind of tokenizer that memopt does not know, by name, or merges that do not
            fit the vocabulary.
    """
    if vocabulary.model not in _BUILDERS:
        raise WeightsError(
            f"{vocabulary.file.path} has a tokenizer of kind {vocabulary.model!r}, which "
            "memopt does not read",
            fix=nearest(vocabulary.model, _BUILDERS),
        )
    try:
        tokenizer = _BUILDERS[vocabulary.model](vocabulary)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{vocabulary.file.path}: its tokenizer does not fit together: {first_line(error)}",
            fix="the file is damaged; convert it again with llama.cpp",
        ) from error
    _add_tokens(tokenizer, vocabulary)
    if vocabulary.model != "bert":
        tokenizer.post_processor = _template(vocabulary)
    return tokenizer


def adds(vocabulary: Vocabulary, which: str) -> bool:
    """Whether every text gets the ``bos`` or the ``eos`` token: as the file says, or llama.cpp."""
    usual = which == "bos" and (
        vocabulary.model == "llama" or (vocabulary.model == "gpt2" and _pre(vocabulary) in BEGINS)
    )
    return vocabulary.flag(f"add_{which}_token", usual) and which in vocabulary.special


def _pre(vocabulary: Vocabulary) -> str | None:
    name = vocabulary.get("pre")
    return None if name in (None, "default") else str(name)


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = vocabulary.strings("merges")
    if merges is None:
        raise vocabulary.wrong("merges", "missing", "a list of strings")
    pairs = [_pair(vocabulary, merge) for merge in merges]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = {*vocabulary.control, *vocabulary.user_defined}
    tokens = {
        token if token in added or alphabet.issuperset(token) else _spelled(token): index
        for index, token in enumerate(vocabulary.tokens)
    }
    pre = _pre(vocabulary)
    model = models.BPE(tokens, pairs, fuse_unk=False, ignore_merges=takes_whole_words(pre))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = word_splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(vocabulary: Vocabulary, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or " " in right:
        raise vocabulary.wrong("merges", f"{merge!r:.60}", "two tokens with a space between")
    return left, right


def _spelled(token: str) -> str:
    """Return a token in the letters that stand for its bytes.

    >>> _spelled("a b")
    'aĠb'
    """
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)
    return "".join(piece for piece, _ in pieces)


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    architecture = vocabulary.file.architecture
    if architecture.startswith("gemma"):
        return _gemma(vocabulary)
    tokenizer = Tokenizer(_scored(vocabulary, vocabulary.tokens, vocabulary.scores()))
    prefix = vocabulary.flag("add_space_prefix", True)
    if architecture == "phi3":
        # Its own tokenizer.json turns spaces before it cuts: "  a" has one more in front.
        replace = [normalizers.Replace(" ", _SPACE)]
        before = [normalizers.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, *replace])
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _gemma(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    # Several spaces lie there as spaces, one as the mark; merges follow the order of the tokens.
    tokens = [
        _SPACE * len(token) if " " in token and not token.strip() else token
        for token in vocabulary.tokens
    ]
    tokenizer = Tokenizer(_scored(vocabulary, tokens, [-float(i) for i in range(len(tokens))]))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _scored(vocabulary: Vocabulary, tokens: list[str], scores: list[float]) -> Any:
    from tokenizers import models

    ids = {token: index for index, token in enumerate(tokens)}
    stated = vocabulary.strings("merges")
    if stated is not None:
        merges = [_pair(vocabulary, merge) for merge in stated]
    else:
        merges = derive_merges(ids, scores)
    unknown = vocabulary.token("unk")
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def derive_merges(ids: dict[str, int], scores: Iterable[float]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's scores stand for, the best first.

    Every cut of a token into two others is one; among equal scores the longer left half goes
    first, then the longer right one, as transformers has it.

    >>> derive_merges({"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4}, [0, 0, -1, -3, -2])
    [('a', 'b'), ('b', 'b'), ('ab', 'b'), ('a', 'bb')]
    """
    ranked: list[tuple[float, int, int, str, str]] = []
    for (token, _), score in zip(ids.items(), scores, strict=True):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        inside = [(ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
        ranked += [(score, len(a), len(b), a, b) for _, _, a, b in sorted(inside)]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _word_piece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = {*vocabulary.control, *(vocabulary.tokens[i] for i in vocabulary.special.values())}
    words = {_as_word_piece(t, special): i for i, t in enumerate(vocabulary.tokens)}
    unknown = vocabulary.token("unk") or "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(words, unk_token=unknown))
    # llama.cpp lowers what a file does not speak of; a vocabulary with capitals was not lowered.
    capitals = any(token != token.lower() for token in words if token not in special)
    lower = vocabulary.flag("normalizer.lowercase", not capitals)
    strip = vocabulary.flag("normalizer.strip_accents", lower)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    first = vocabulary.token("bos") or vocabulary.token("cls") or "[CLS]"
    last = vocabulary.token("sep") or vocabulary.token("eos") or "[SEP]"
    for token in (first, last):
        if token not in words:
            raise vocabulary.wrong("tokens", "without " + repr(token), "a vocabulary of BERT's")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, words[first]), (last, words[last])],
    )
    return tokenizer


def _as_word_piece(token: str, special: set[str]) -> str:
    """Undo llama.cpp's marking: it marks the beginnings of words, WordPiece their rest."""
    if token in special or (token.startswith("[") and token.endswith("]")):
        return token
    return token[1:] if token.startswith(_SPACE) else f"##{token}"


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Add tokens that are found whole: those that are no text, and the user-defined."""
    from tokenizers import AddedToken

    named = [vocabulary.tokens[index] for index in vocabulary.special.values()]
    special = [t for t in vocabulary.tokens if t in {*vocabulary.control, *named}]
    # Phi-3's take the spaces behind them, all but these; no file says so, llama.cpp knows it too.
    phi3 = vocabulary.file.architecture == "phi3" and vocabulary.model == "llama"
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True, rstrip=phi3 and t not in _PHI3_PLAIN)
            for t in special
        ]
    )
    # Gemma's runs of spaces are no longer called so.
    plain = [t for t in vocabulary.user_defined if tokenizer.token_to_id(t) is not None]
    plain = [t for t in plain if t not in special]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    if tokenizer.get_vocab_size() != len(vocabulary.tokens):
        raise WeightsError(
            f"{vocabulary.file.path}: its {len(vocabulary.tokens)} tokens become "
            f"{tokenizer.get_vocab_size()} in tokenizer.json",
            fix="convert the safetensors of the model",
        )


def _template(vocabulary: Vocabulary) -> Any:
    from tokenizers import processors

    ids = {
        str(vocabulary.token(name)): vocabulary.special[name]
        for name in ("bos", "eos")
        if adds(vocabulary, name)
    }
    begin = [vocabulary.token("bos")] if adds(vocabulary, "bos") else []
    end = [vocabulary.token("eos")] if adds(vocabulary, "eos") else []

    def pieces(text: str, number: int) -> list[str]:
        return [f"{token}:{number}" for token in (*begin, text, *end)]

    return processors.TemplateProcessing(
        single=pieces("$A", 0),
        pair=pieces("$A", 0) + pieces("$B", 1),
        special_tokens=list(ids.items()),
    )


_BUILDERS: dict[str, Callable[[Vocabulary], Any]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _word_piece,
}
