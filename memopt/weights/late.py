"""What a late-interaction checkpoint says of its queries and documents.

Three kinds of folder say it: sentence-transformers' MultiVectorEncoder, PyLate's ColBERT before it,
and Stanford's ColBERT (``artifact.metadata``). Each is read as sentence-transformers 6.2 reads it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import read_json
from memopt.errors import WeightsError
from memopt.weights.modules import MODULES, SETTINGS, read_modules
from memopt.weights.sentence import transformer_settings

STANFORD = "artifact.metadata"
# The class of Stanford's checkpoints, and the name of their projection.
STANFORD_CLASS, PROJECTION = "HF_ColBERT", "linear.weight"
_DOCUMENTS = ("document", "passage", "corpus")
_LENGTH = 32  # ColBERT's own width of a query


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """Queries are filled up to ``length`` tokens with a token of their own, whose vectors count.

    ``fixed`` cuts longer queries; ``attend`` lets the other tokens see the filling.
    """

    length: int
    token: str | None = None  # None is the tokenizer's mask token
    fixed: bool = True
    attend: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """How texts become queries and documents.

    Attributes:
        query_prompt, document_prompt: what stands before each.
        query_length, document_length: tokens at most; None is the model's own limit.
        expansion: of queries, None for none.
        skipped: words whose tokens are not scored.
        skipped_of: of which texts they are not, ``query`` and ``document``.
        markers: whether prompts begin with tokens of their own that the tokenizer must know.
    """

    query_prompt: str = ""
    document_prompt: str = ""
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None
    skipped: tuple[str, ...] = ()
    skipped_of: tuple[str, ...] = ("document",)
    markers: bool = False


def read_late(folder: Path) -> Late:
    """Return what the folder says; of a plain encoder that each text is taken as it is.

    Raises:
        WeightsError: a value that none of the three kinds writes.

    >>> read_late(Path("/nowhere")).query_prompt
    ''
    """
    if (folder / STANFORD).is_file():
        return _stanford(read_json(folder / STANFORD))
    settings = _object(folder / SETTINGS)
    if not (folder / MODULES).is_file():
        return Late()
    stated, origin = transformer_settings(folder, read_modules(folder)[0].path)
    mask = next((m for m in read_modules(folder) if m.kind == "MultiVectorMask"), None)
    mask_config = _object(folder / mask.path / "config.json") if mask else {}
    prompts = _prompts(settings)
    pylate = settings.get("model_type") == "ColBERT"
    skipped = mask_config.get("skiplist_words", settings.get("skiplist_words"))
    if skipped is None:
        skipped = list(string.punctuation) if pylate else []
    of = mask_config.get("skiplist_tasks", ["document"])
    known = {**{key: settings[key] for key in _KNOBS if settings.get(key) is not None}, **stated}
    if mask_config.get("keep_only_token_ids"):
        raise WeightsError(f"{folder}: keep_only_token_ids is of pictures, which memopt leaves out")
    return Late(
        query_prompt=prompts.get("query", ""),
        document_prompt=next((prompts[name] for name in _DOCUMENTS if name in prompts), ""),
        query_length=known.get("query_length"),
        document_length=known.get("document_length"),
        expansion=_expansion({**settings, **stated}, pylate or _is_old(settings), origin),
        skipped=tuple(skipped),
        skipped_of=(of,) if isinstance(of, str) else tuple(of),
        markers=any(key in settings for key in ("query_prefix", "document_prefix")),
    )


_KNOBS = ("query_length", "document_length")
_OLD = ("do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens")


def _is_old(settings: Mapping[str, Any]) -> bool:
    keys = (*_KNOBS, *_OLD, "query_prefix", "document_prefix", "skiplist_words")
    return any(key in settings for key in keys)


def _prompts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the prompts; PyLate's markers stand before them."""
    prompts = {k: str(v) for k, v in (settings.get("prompts") or {}).items() if v}
    for key, name in (("query_prefix", "query"), ("document_prefix", "document")):
        if prefix := settings.get(key):
            prompts[name] = prefix + prompts.get(name, "").removeprefix(prefix)
    return prompts


def _expansion(known: Mapping[str, Any], old: bool, origin: Path) -> Expansion | None:
    stated = known.get("query_expansion")
    if stated is None and (not old or "query_expansion" in known):
        return None
    if stated is None:
        if known.get("do_query_expansion") is False:
            return None
        attend = known.get("attend_to_expansion_tokens", known.get("attend_to_mask_tokens"))
        return Expansion(length=int(known.get("query_length") or _LENGTH), attend=bool(attend))
    strategy, length = stated.get("strategy"), stated.get("length")
    if strategy not in ("fixed", "min") or type(length) is not int or length < 1:
        raise WeightsError(f"{origin}: query_expansion {dict(stated)!r} is not known to memopt")
    return Expansion(
        length=length,
        token=stated.get("token"),
        fixed=strategy == "fixed",
        attend=bool(stated.get("attend", False)),
    )


def _stanford(metadata: Mapping[str, Any]) -> Late:
    return Late(
        query_prompt=(metadata.get("query_token_id") or "[unused0]") + " ",
        document_prompt=(metadata.get("doc_token_id") or "[unused1]") + " ",
        document_length=metadata.get("doc_maxlen"),
        expansion=Expansion(
            length=metadata.get("query_maxlen") or _LENGTH,
            attend=bool(metadata.get("attend_to_mask_tokens")),
        ),
        skipped=tuple(string.punctuation) if metadata.get("mask_punctuation", True) else (),
        markers=True,
    )


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
