"""Take what identifies or unlocks out of a text before it is stored or sent anywhere."""

from __future__ import annotations

import importlib.util
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from memopt.errors import ConfigurationError
from memopt.extras import require

# Every pattern is linear: no group repeats something that can itself be split in several ways.
# Letters of any script: addresses may be internationalised (RFC 6531).
_EMAIL = re.compile(
    r"(?<![\w.+%'-])[\w.+%'-]{1,64}@(?:(?!_)[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)"
)
_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
_IBAN = re.compile(r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{1,4}){3,8}\b")
_PHONE = re.compile(
    r"(?<![\w.+])(?:\+\d{1,3}[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d(?:[ ./-]?\d){5,12}"
    r"|\(\d{2,5}\)[ ./-]?\d(?:[ ./-]?\d){4,9}"
    r"|00 ?\d(?:[ /-]?\d){6,13}"
    r"|0\d{1,4}[ /-]\d(?:[ /-]?\d){4,9}"
    r"|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w])"
)
# Plain digits are a telephone number where the text says so.
_CALLED = re.compile(
    r"(?i)\b(?P<name>(?:phone|tel(?:e(?:ph|f)on[eo]?)?|mobile|cell|handy|fax)\b[^\d\n]{0,12}?)"
    r"(?P<value>\d{7,15})(?!\w)"
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_PEM = re.compile(
    r"-----BEGIN (?P<kind>[A-Z ]{0,40}PRIVATE KEY)-----[^-]{0,20000}(?:-----END [A-Z ]{0,40}-----)?"
)
# Formats their makers publish: AWS, GitHub, GitLab, Slack, Google, Stripe, OpenAI, Anthropic,
# Hugging Face, npm, and JSON web tokens (RFC 7519).
_TOKEN = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}"
    r"|glpat-[A-Za-z0-9_-]{20,64}"
    r"|xox[abposr]-[A-Za-z0-9-]{10,255}"
    r"|AIza[0-9A-Za-z_-]{35}"
    r"|[rs]k_(?:live|test)_[0-9A-Za-z]{16,255}"
    r"|sk-[A-Za-z0-9_-]{20,255}"
    r"|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}"
    r"|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{4,4000}\.[A-Za-z0-9_-]{8,1000})"
)
_ASSIGNED = re.compile(
    r"(?i)(?<![A-Za-z0-9])(?P<name>(?:api[_-]?key|secret(?:[_-]?access)?(?:[_-]?key)?"
    r"|access[_-]?key|token|passw(?:or)?[dt]|pwd|auth(?:orization)?|bearer))"
    r"(?P<gap>[\"']?\s{0,3}(?:[:=]|\bis\b)?\s{0,3}[\"']?)"
    r"(?P<value>[^\s\"',;]{8,512})"
)
# Bits per character: English words have 2 to 3.2, random base64 of 20 characters about 4.
_RANDOM_BITS = 3.3
_IBAN_LENGTHS = range(15, 35)
# Country and checksum, four characters that are read before the search goes on.
_IBAN_START = 4


@dataclass(frozen=True, slots=True)
class Found:
    """A text without its secrets, and how many of each kind were taken out."""

    text: str
    counts: dict[str, int] = field(default_factory=dict)


def redact(text: str) -> Found:
    """Replace personal data and secrets by placeholders such as ``[EMAIL]``.

    Kinds: EMAIL, PHONE, CARD (checked by Luhn's formula, ISO/IEC 7812-1), IBAN (checksum modulo 97,
    ISO 13616), IP, KEY. Linear in the length of the text.

    >>> redact("mail ann@example.org, card 4111 1111 1111 1111").text
    'mail [EMAIL], card [CARD]'
    >>> redact("order 4111 1111 1111 1112").text
    'order 4111 1111 1111 1112'
    """
    counts: Counter[str] = Counter()

    def put(kind: str, holds: Callable[[str], bool] = lambda _: True) -> Callable[..., str]:
        def one(match: re.Match[str]) -> str:
            if not holds(match[0]):
                return match[0]
            counts[kind] += 1
            return f"[{kind}]"

        return one

    def assigned(match: re.Match[str]) -> str:
        value = match["value"]
        if value.startswith("[") or not _looks_random(value):
            return match[0]
        counts["KEY"] += 1
        return f"{match['name']}{match['gap']}[KEY]"

    def called(match: re.Match[str]) -> str:
        counts["PHONE"] += 1
        return f"{match['name']}[PHONE]"

    text = _PEM.sub(put("KEY"), text)
    text = _TOKEN.sub(put("KEY"), text)
    text = _ASSIGNED.sub(assigned, text)
    text = _EMAIL.sub(put("EMAIL"), text)
    text = _without_ibans(text, counts)
    text = _DIGITS.sub(put("CARD", _is_card), text)
    text = _IPV4.sub(put("IP", _is_address), text)
    text = _IPV6.sub(put("IP", _is_address), text)
    text = _PHONE.sub(put("PHONE", _is_phone), text)
    text = _CALLED.sub(called, text)
    return Found(text, dict(counts))


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


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _without_ibans(text: str, counts: Counter[str]) -> str:
    """Replace IBANs; what looks like one may run on into the words after it."""
    parts: list[str] = []
    at = 0
    while match := _IBAN.search(text, at):
        found = match[0]
        ends = [len(found), *(space.start() for space in re.finditer(" ", found))]
        end = next((end for end in sorted(ends, reverse=True) if _is_iban(found[:end])), 0)
        parts.append(text[at : match.start()])
        if end:
            parts.append("[IBAN]")
            counts["IBAN"] += 1
        else:
            end = _IBAN_START
            parts.append(found[:end])
        at = match.start() + end
    return "".join([*parts, text[at:]])


def _is_iban(text: str) -> bool:
    code = text.replace(" ", "")
    if len(code) not in _IBAN_LENGTHS:
        return False
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # "a::b" is a name in C++: an address spells more.
    return not address.is_unspecified and len(text.replace(":", "")) >= 4


def _is_phone(text: str) -> bool:
    digits = [character for character in text if character.isdigit()]
    return 7 <= len(digits) <= 15 and len(set(digits)) > 2


def _looks_random(value: str) -> bool:
    if len(value) < 8:
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    bits = -sum(share * math.log2(share) for share in shares)
    kinds = sum(bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", "[0-9]", r"[^\w]"))
    return (bits >= _RANDOM_BITS and kinds >= 2) or (kinds >= 3 and bits >= _RANDOM_BITS - 0.8)
