"""Write ``tokenizer.json`` as the tokenizer that transformers would use really works.

transformers lets ``tokenizer_config.json`` change what lies in ``tokenizer.json`` (case folding,
added tokens, prefix space, special tokens, the side that is cut off), and throws away truncation
and padding that were saved with it. The bundle gets the outcome, for ``tokenizers`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from memopt.errors import MissingExtra, WeightsError, first_line
from memopt.extras import require
from memopt.weights.sentence import Sentence

# What a tokenizer without tokenizer.json consists of.
VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")
# Case, accents, spaces, digits, scripts, controls, joiners: what normalizers treat differently.
PROBES = (
    "",
    "A kettle boils; the 2nd of 1,024 isn't hers.",
    "Ünder the BRIDGE, naïve café ÀÉÎÕÜ straße İstanbul",
    "  two  spaces,\ttab\nand line ",
    "日本語の文章 한국어 中文 عربى हिन्दी ไทย",
    "e\u0301 \ufb01 \u2460 zero\u200bwidth no\u00a0break \U0001f469\u200d\U0001f52c",
    "don't_split snake_case CamelCase x=y+1; https://example.org/a?b=c#d me@example.org",
)
# Plain words, then what most SentencePiece vocabularies write in other letters, and one that few
# know. What a configuration may change on purpose (case, accents, punctuation, spaces) is not here.
PLAIN = "a kettle that boils here fits \ufb01 \u2460 \uff46\uff55\uff4c\uff4c \u65e5"


def write_tokenizer(
    source: Path, folder: Path, max_length: int | None, sentence: Sentence | None = None
) -> list[str]:
    """Write ``tokenizer.json`` into ``folder``; return why it cannot be vouched for, if so.

    Args:
        source: the folder of the model's own files.
        folder: the bundle; a ``tokenizer.json`` copied there is replaced.
        max_length: tokens the model takes, special ones included.
        sentence: the sentence-transformers pipeline, which may lower texts and pass arguments.

    Returns:
        Lines for the user: the tokenizer is taken as it lies, there is none, or transformers
        cuts texts unlike the file that it reads.

    Raises:
        WeightsError: what was written gives other ids than transformers on a probe text.
    """
    target = folder / "tokenizer.json"
    there = target.is_file()
    if not there and not any(p for pattern in VOCABULARIES for p in source.glob(pattern)):
        return [_without(source, "no vocabulary is there either")]
    try:
        tokenizer = _load(source, sentence)
    except WeightsError as error:
        if there:
            return [f"{source / 'tokenizer.json'} is taken as it lies: {error}"]
        return [_without(source, str(error))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        target.unlink(missing_ok=True)
        kind = type(tokenizer).__name__
        return [_without(source, f"{kind} is written in Python and cannot be one")]
    if sentence and sentence.lower_case:
        lower_case(backend)
    _settle(backend, tokenizer, max_length)
    backend.save(str(target))
    _compare(target, tokenizer, max_length)
    return _other_pieces(source, target)


def lower_case(tokenizer: Any) -> None:
    """Lower the text before anything else, as sentence-transformers does where its file says so."""
    import tokenizers

    normalizers: Any = tokenizers.normalizers
    own = tokenizer.normalizer
    parts = list(own) if isinstance(own, normalizers.Sequence) else [own] if own else []
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def _without(source: Path, why: str) -> str:
    return f"{source} has no tokenizer.json: the bundle can be exported, but not embed text ({why})"


def _load(source: Path, sentence: Sentence | None) -> Any:
    try:
        transformers = require("transformers", extra="export", why="read the tokenizer")
        # Code that came with a model is never run, and nobody is asked whether it should be.
        return transformers.AutoTokenizer.from_pretrained(
            source,
            **(sentence.tokenizer if sentence else {}),
            local_files_only=True,
            trust_remote_code=False,
        )
    except MissingExtra as error:
        raise WeightsError(str(error)) from error
    except Exception as error:
        if any(source.glob("*.model")):  # else it says that tiktoken is missing
            try:
                require("sentencepiece", extra="export", why="read the tokenizer")
            except MissingExtra as missing:
                raise WeightsError(str(missing)) from error
        reason = first_line(error)
        raise WeightsError(f"transformers cannot read the tokenizer: {reason}") from error


def _settle(backend: Any, tokenizer: Any, max_length: int | None) -> None:
    """Put the real truncation and padding in place of whatever was saved with the file."""
    backend.no_truncation()
    if max_length is not None:
        backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.no_padding()
    if tokenizer.pad_token_id is not None:
        backend.enable_padding(
            direction=tokenizer.padding_side,
            pad_id=tokenizer.pad_token_id,
            pad_token=tokenizer.pad_token,
        )


def _compare(target: Path, tokenizer: Any, max_length: int | None) -> None:
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(target))
    special = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    named = " ".join(f"left{token}right {token} x" for token in dict.fromkeys(special[:64]))
    long = " ".join(f"{word} {i}" for i, word in enumerate(PROBES[1].split() * 9))
    long *= 1 + (max_length or 0) // 90  # past the limit, whatever it is
    limit = {"truncation": True, "max_length": max_length} if max_length else {}
    for probe in (*PROBES, named, long):
        wanted = tokenizer(probe, **limit)["input_ids"]
        if written.encode(probe).ids != wanted:
            raise WeightsError(
                f"the tokenizer of {type(tokenizer).__name__} cannot be written as tokenizer.json: "
                f"{probe[:60]!r} gives other token ids than transformers",
                fix="report the model; a wrong tokenizer would give wrong vectors",
            )


def _other_pieces(source: Path, target: Path) -> list[str]:
    """Return a line where what was written cuts plain words unlike the file it was made from.

    transformers reads some SentencePiece vocabularies without the letters they write in others'
    place, their bytes or their order of merges: what a model knows becomes unknown to it.
    """
    from tokenizers import Tokenizer

    kept = _pieces_of_file(source)
    if kept is None:
        return []
    name, probe, pieces = kept
    found = _pieces(Tokenizer.from_file(str(target)), probe)
    differ = (i for i, pair in enumerate(zip_longest(found, pieces)) if pair[0] != pair[1])
    first = next(differ, None)
    if first is None:
        return []
    here, there = (" ".join(p or "(unknown)" for p in x[first:][:4]) for x in (found, pieces))
    return [
        f"transformers reads {source / name} unlike it is: {probe.strip()!r} is cut into {here!r} "
        f"where the file has {there!r}; the model was hardly trained with such tokens"
    ]


def _pieces_of_file(source: Path) -> tuple[str, str, list[str | None]] | None:
    """Return the file whose word it is, a text, and its pieces there; None where there is none."""
    from tokenizers import Tokenizer

    try:
        import sentencepiece
    except ImportError:
        models = []
    else:
        models = sorted(source.glob("*.model"))
    for path in models:
        try:
            library = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            continue  # tiktoken's files have the same ending
        cut = zip(library.encode(PLAIN, out_type=str), library.encode(PLAIN), strict=True)
        return path.name, PLAIN, _joined(None if i == library.unk_id() else p for p, i in cut)
    if (source / "tokenizer.json").is_file():
        # Whether a space comes first is the configuration's to say.
        probe = f" {PLAIN}"
        file = Tokenizer.from_file(str(source / "tokenizer.json"))
        return "tokenizer.json", probe, _pieces(file, probe)
    return None


def _pieces(tokenizer: Any, text: str) -> list[str | None]:
    """Return the pieces of a text, None for what the vocabulary does not hold."""
    tokenizer.no_truncation()
    tokenizer.no_padding()  # saved with many a file, MiniLM's among them
    unknown = getattr(tokenizer.model, "unk_token", None)
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    return _joined(None if t == unknown or tokenizer.token_to_id(t) is None else t for t in tokens)


def _joined(pieces: Iterable[str | None]) -> list[str | None]:
    """Return pieces with each run of unknown ones as one: libraries join them or do not."""
    runs = ((piece, list(run)) for piece, run in groupby(pieces))
    return [entry for piece, run in runs for entry in (run if piece is not None else [None])]
