"""What keys, tokens and passwords look like, and what only looks like them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from memopt.memory.model.unicode import FILLER

Span = tuple[int, int]

# --- private keys

_MARK = re.compile(
    r"(?i)-{4,5} ?(?P<edge>BEGIN|END) [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-{4,5}"
    r"|(?P<putty>Private-Lines: ?\d{1,5})"
)
_BODY = re.compile(
    r"(?P<gap>(?:\s|\\[nr]|[\"'>,])++)|(?P<head>[A-Za-z][A-Za-z0-9-]{1,30}: [^\n\\]{0,200})"
    r"|(?P<chunk>[A-Za-z0-9+/=]++)"
)
_SHORTEST_LINE = 16


def private_keys(text: str) -> Iterator[Span]:
    """Yield private keys: PEM and PGP, encrypted or not, PuTTY's, and what is left of a cut one."""
    marks = list(_MARK.finditer(text))
    done = 0
    for number, mark in enumerate(marks):
        following = marks[number + 1] if number + 1 < len(marks) else None
        limit = following.start() if following else len(text)
        edge = (mark["edge"] or "BEGIN").upper()
        if edge == "BEGIN":
            if following and (following["edge"] or "").upper() == "END":
                limit = end = following.end()
            else:
                end = _body_end(text, mark.end(), limit)
            yield mark.start(), end
            done = end
        elif mark.start() >= done:
            yield _body_start(text, done, mark.start()), mark.end()
            done = mark.end()


def _is_line(chunk: str) -> bool:
    return len(chunk) >= _SHORTEST_LINE or bool(re.search(r"[0-9+/=]", chunk))


def _body_end(text: str, at: int, limit: int) -> int:
    end = at
    while at < limit and (item := _BODY.match(text, at, limit)):
        at = item.end()
        if item["chunk"] and at < limit and not _is_line(item["chunk"]):
            break
        if not item["gap"]:
            end = at
    return end


def _body_start(text: str, begin: int, end: int) -> int:
    start = end
    for item in reversed([*re.finditer(r"[^\s\\]+|\\[nr]?", text[begin:end])]):
        word = item[0]
        if word in ("\\n", "\\r"):
            continue
        # An escaped line break leaves its letter on the next line's first character.
        if not re.fullmatch(r"[A-Za-z0-9+/=]+", word):
            break
        if start != end and len(word) < _SHORTEST_LINE:
            break
        start = begin + item.start()
    return start


# --- other keys

# Formats their makers publish: AWS, GitHub, GitLab, Slack, Google, Stripe, OpenAI, Anthropic,
# Hugging Face, npm, age, and JSON web tokens (RFC 7519).
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"
    r"|gh[pousr]_[A-Za-z0-9]{36,}+|github_pat_[A-Za-z0-9_]{22,}+"
    r"|glpat-[A-Za-z0-9_-]{20,}+"
    r"|xox[abposr]-[A-Za-z0-9-]{10,}+"
    r"|AIza[0-9A-Za-z_-]{35}"
    r"|[rs]k_(?:live|test)_[0-9A-Za-z]{16,}+"
    r"|(?P<sk>sk-[A-Za-z0-9_-]{20,}+)"
    r"|hf_[A-Za-z0-9]{30,}+|npm_[A-Za-z0-9]{36}|AGE-SECRET-KEY-1[A-Z0-9]{20,}+"
    r"|(?P<jwt>eyJ[A-Za-z0-9_-]*+(?P<rest>\.eyJ[A-Za-z0-9_-]++\.[A-Za-z0-9_-]*+)?))"
)
_PASSWORD = (
    r"passw(?:or)?[dt]|passphrase|passwd|pwd|kennwort|mot de passe|contrase[nñ]a|wachtwoord"
    r"|senha|parola|пароль|密码|密碼|口令|パスワード"
)
_ASSIGNED = re.compile(
    rf"(?i)(?<![A-Za-z0-9])(?:(?P<password>{_PASSWORD})"
    r"|api[_-]?key|secret(?:[_-]?access)?(?:[_-]?key)?|access[_-]?key|token"
    r"|auth(?:orization)?|bearer)(?:[_-][A-Za-z0-9_-]{1,20}+)?(?![A-Za-z0-9])"
    r"[\"']?\s{0,3}(?P<sign>:=|=>|[:=]|\b(?:is|ist|est|es)\b|是)?\s{0,3}"
    r"(?:\"(?P<quoted>[^\"\n]{4,200})\"|[\"']?(?P<value>[^\s\"',;]{4,64}))"
)
_LOGIN = re.compile(r"://[^/\s:@]{0,64}:(?P<value>[^/\s@]{1,128})@")
_PLACEHOLDER = re.compile(
    r"\[[A-Z_]{2,20}\]|[<{$*]|(?i:required|optional|string|none|null|true|false)\b"
)
# A word, perhaps with a year: the name of something.
_WORD = re.compile(r"(?:[^\W\d_]?[^\W\d_A-Z]+|[A-Z]+)\d{0,4}[.!?:)]?")
# Bits per character: English words have 2 to 3.2, random base64 of 20 characters about 4.
_RANDOM_BITS = 3.3
_VALUE_END = re.compile(r"[^\s\"',;]*+")


def tokens(text: str) -> Iterator[Span]:
    """Yield keys of a published format."""
    for match in _TOKEN.finditer(text):
        if (match["jwt"] and not match["rest"]) or (match["sk"] and not re.search(r"\d", match[0])):
            continue
        yield match.span()


def assigned(text: str) -> Iterator[Span]:
    """Yield the values of passwords, tokens and secrets that are named as such."""
    for login in _LOGIN.finditer(text):
        if not _PLACEHOLDER.match(login["value"]):
            yield login.span("value")
    at = 0
    while match := _ASSIGNED.search(text, at):
        kind = "quoted" if match["quoted"] else "value"
        if _is_secret(match[kind], match["password"], match["sign"]):
            end = match.end(kind)
            if kind == "value" and (rest := _VALUE_END.match(text, end)):
                end = rest.end()
            yield match.start(kind), end
            at = end
        else:
            at = match.start() + 1


def _is_secret(value: str, password: str | None, sign: str | None) -> bool:
    if FILLER in value or _PLACEHOLDER.match(value):
        return False
    if password and sign and not sign.isalpha():
        return True
    if password and (sign or re.search(r"[^\W\d_]", value)) and re.search(r"\d", value):
        return True
    return not _WORD.fullmatch(value) and _looks_random(value)


def _looks_random(value: str) -> bool:
    if len(value) < 8:
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    bits = -sum(share * math.log2(share) for share in shares)
    kinds = sum(bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", "[0-9]", r"[^\w]"))
    return (bits >= _RANDOM_BITS and kinds >= 2) or (kinds >= 3 and bits >= _RANDOM_BITS - 0.8)
