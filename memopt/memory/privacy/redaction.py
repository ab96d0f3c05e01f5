"""Take what identifies or unlocks out of a text before it is stored or sent anywhere."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from memopt.errors import ConfigurationError
from memopt.extras import require
from memopt.memory.model.unicode import FILLER, normalised
from memopt.memory.privacy.redaction_rules import RULES
from memopt.moved import old_names

__getattr__ = old_names(__name__)


@dataclass(frozen=True, slots=True)
class Redaction:
    """A text without its secrets, and how many of each kind were taken out."""

    text: str
    counts: dict[str, int] = field(default_factory=dict)


def redact(text: str) -> Redaction:
    """Replace personal data and secrets by placeholders such as ``[EMAIL]``.

    Kinds: EMAIL, PHONE, CARD (issuer, length and Luhn's formula, ISO/IEC 7812-1), IBAN (country,
    length and checksum modulo 97, ISO 13616), IP, KEY. What is searched is a normalised copy (NFKC,
    no invisible characters), what is replaced is the text as written. Linear in its length.

    >>> redact("mail ann@example.org, card 4111 1111 1111 1111").text
    'mail [EMAIL], card [CARD]'
    >>> redact("order 4111 1111 1111 1112").text
    'order 4111 1111 1111 1112'
    """
    copy = normalised(text)
    searched = copy.text
    found: list[tuple[int, int, str]] = []
    for kind, rule in RULES:
        spans = _apart(rule(searched))
        found += ((start, end, kind) for start, end in spans)
        searched = _covered(searched, spans)
    parts: list[str] = []
    at = 0
    for start, end, kind in sorted(found):
        parts += (text[at : copy.starts[start]], f"[{kind}]")
        at = copy.ends[end - 1]
    return Redaction("".join([*parts, text[at:]]), dict(Counter(kind for *_, kind in found)))


def _apart(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order; of two that overlap the one that begins first."""
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept


def _covered(text: str, spans: list[tuple[int, int]]) -> str:
    parts: list[str] = []
    at = 0
    for start, end in spans:
        parts += (text[at:start], FILLER * (end - start))
        at = end
    return "".join([*parts, text[at:]])


def redactor(engine: str = "auto") -> Callable[[str], str]:
    """Return text -> redacted text.

    Args:
        engine: ``patterns``; ``presidio`` for names and places as well, by Microsoft Presidio;
            ``auto`` takes both where presidio is installed, with an English spaCy model.

    Raises:
        ConfigurationError: an unknown engine, or presidio was asked for and has no model.
        MissingExtra: presidio was asked for and is not installed.

    >>> redactor("patterns")("call +49 30 1234567")
    'call [PHONE]'
    """
    if engine not in ("auto", "patterns", "presidio"):
        raise ConfigurationError(
            f"unknown redaction {engine!r}", fix="use auto, patterns or presidio"
        )
    installed = importlib.util.find_spec("presidio_analyzer") is not None
    if engine == "patterns" or (engine == "auto" and not (installed and _english_models())):
        return lambda text: redact(text).text
    analyzer = _presidio()

    def both(text: str) -> str:
        text = redact(text).text
        found = sorted(analyzer.analyze(text=text, language="en"), key=lambda r: -r.start)
        end = len(text)
        for result in found:
            if result.end <= end and "[" not in text[result.start : result.end]:
                text = f"{text[: result.start]}[{result.entity_type}]{text[result.end :]}"
                end = result.start
        return text

    return both


@cache
def _presidio() -> Any:
    """Open presidio's analyzer once; by itself it would download half a gigabyte."""
    presidio = require("presidio_analyzer", extra="presidio", why="find names")
    engines = require("presidio_analyzer.nlp_engine", extra="presidio", why="find names")
    models = _english_models()
    if not models:
        raise ConfigurationError(
            "presidio finds no names without an English spaCy model",
            fix="run: python -m spacy download en_core_web_sm",
        )
    named = [{"lang_code": "en", "model_name": models[0]}]
    provider = engines.NlpEngineProvider(
        nlp_configuration={"nlp_engine_name": "spacy", "models": named}
    )
    return presidio.AnalyzerEngine(nlp_engine=provider.create_engine(), supported_languages=["en"])


def _english_models() -> list[str]:
    spacy = require("spacy.util", extra="presidio", why="find names")
    return sorted(name for name in spacy.get_installed_models() if name.startswith("en_"))
