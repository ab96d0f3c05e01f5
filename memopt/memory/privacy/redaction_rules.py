"""What e-mails, numbers and addresses look like, and what only looks like them."""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator

from memopt.memory.privacy.secret_rules import Span, assigned, private_keys, tokens

# Every rule is linear: what a pattern reads from one start is bounded, or is read once and
# stepped over. Neighbours are told in ASCII, since scripts without spaces have no word boundary.
Rule = Callable[[str], Iterator[Span]]


def _accepted(
    pattern: re.Pattern[str], text: str, length: Callable[[re.Match[str]], int]
) -> Iterator[Span]:
    """Yield what holds; after a match that does not, go on with the next character."""
    at = 0
    while match := pattern.search(text, at):
        if size := length(match):
            yield match.start(), match.start() + size
            at = match.start() + size
        else:
            at = match.start() + 1


# --- e-mail

_AT = re.compile(r"@|%40")
_CJK = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_LOCAL = re.compile(rf"(?:[^\W{_CJK}]|[.+%'-]){{1,64}}\Z|[\w.+%'-]{{1,64}}\Z")
# Letters of any script: addresses may be internationalised (RFC 6531).
_DOMAIN = re.compile(
    r"(?:[^\W_][\w-]{0,62}\.){1,8}"
    r"(?:xn--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24}(?![A-Za-z0-9])|[^\W\d_A-Za-z]{2,24})"
)
# Accounts of version control that everybody shares.
_NOBODY = ("git", "hg", "svn")


def emails(text: str) -> Iterator[Span]:
    """Yield e-mail addresses."""
    done = 0
    for sign in _AT.finditer(text):
        before = text[max(done, sign.start() - 64) : sign.start()]
        local, domain = _LOCAL.search(before), _DOMAIN.match(text, sign.end())
        if local and domain and local[0].lower() not in _NOBODY:
            done = domain.end()
            yield sign.start() - len(local[0]), done


# --- IBAN and cards

# ISO 13616, the registry of 2024: characters by country.
_REGISTRY = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18
DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23
IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27
MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19
SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30
"""
_IBAN_LENGTHS = {code: int(size) for code, size in re.findall(r"([A-Z]{2})(\d\d)", _REGISTRY)}
_IBAN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=IBAN))[A-Za-z]{2}[ -]?\d[ -]?\d(?:[ .\n-]?[A-Za-z0-9]){11,30}"
)
_IBAN_DIGITS = 8
_GAP = r"[ ._\n-]{1,2}"
_CARD = re.compile(
    r"(?<!\d)(?<!\d[.,])(?:\d{14,19}(?!\d)"
    rf"|\d{{4}}{_GAP}\d{{4}}{_GAP}\d{{4}}{_GAP}\d{{4}}(?:{_GAP}\d{{1,3}})?(?!\d)"
    rf"|\d{{4}}{_GAP}\d{{6}}{_GAP}\d{{4,5}}(?!\d))(?![.,]\d)"
)


def ibans(text: str) -> Iterator[Span]:
    """Yield account numbers whose country, length and checksum hold."""
    return _accepted(_IBAN, text, _iban)


def _iban(match: re.Match[str]) -> int:
    size = _IBAN_LENGTHS.get(match[0][:2].upper(), 0)
    places = [place for place, c in enumerate(match[0]) if c.isalnum()][:size]
    code = "".join(match[0][place] for place in places)
    if not size or len(code) < size or sum(map(str.isdigit, code)) < _IBAN_DIGITS:
        return 0
    number = int("".join(str(int(c, 36)) for c in code[4:] + code[:4]))
    return places[-1] + 1 if number % 97 == 1 else 0


def cards(text: str) -> Iterator[Span]:
    """Yield card numbers: an issuer's, of its length, in groups as cards have them, by Luhn."""
    return _accepted(_CARD, text, _card)


def _card(match: re.Match[str]) -> int:
    gaps = re.findall(r"\D+", match[0])
    if len({gap for gap in gaps if "\n" not in gap}) > 1 or match[0].count("\n") > 1:
        return 0
    whole = re.sub(r"\D", "", match[0])
    if _is_card(whole):
        return len(match[0])
    # A security code may follow.
    if len(gaps) == 4 and _is_card(whole[:16]):
        return match[0].rindex(gaps[-1])
    return 0


def _is_card(digits: str) -> bool:
    if len(set(digits)) < 2 or not _is_issued(digits):
        return False
    values = [int(digit) for digit in digits]
    doubled = [sum(divmod(2 * value, 10)) for value in values[-2::-2]]
    return (sum(values[-1::-2]) + sum(doubled)) % 10 == 0


def _is_issued(digits: str) -> bool:
    """Issuers and how many digits they give (ISO/IEC 7812)."""
    size, four = len(digits), int(digits[:4])
    two = four // 100
    if size == 14:
        return 3000 <= four <= 3059 or 3090 <= four <= 3099 or two in (36, 38, 39)
    if size == 15:
        return two in (34, 37)
    if size == 16 and (51 <= two <= 55 or 2221 <= four <= 2720 or two in (36, 38, 39)):
        return True
    if two // 10 == 4:
        return size in (16, 19)
    return size >= 16 and (
        two in (50, 56, 57, 58, 81, 82)
        or two // 10 == 6
        or 3528 <= four <= 3589
        or 2200 <= four <= 2204
        or four in (8600, 9792, 9860)
    )


# --- addresses of machines

_IPV4 = re.compile(r"(?<![A-Za-z0-9.])\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z0-9]|\.\d)")
_IPV6 = re.compile(r"(?<![A-Za-z0-9:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![A-Za-z0-9:])")
_VERSION = re.compile(
    r"(?i)(?:(?<![a-z])(?:v|ver|version|release|rev|revision|build|firmware|update|upgrade|driver"
    r"|section|chapter|paragraph|clause|article|figure|table|item|step|kapitel|abschnitt|ziffer"
    r"|stand|ausgabe)s?\b|§|第|版本|==|>=|<=|~=|[<>^])[^\n;!?]{0,12}\Z"
)
_NETWORK = re.compile(
    r"(?i)(?:(?<![a-z])(?:ips?|ipv4|host|server|address|addr|dns|from|client|node|peer|ping|ssh"
    r"|gateway|proxy|router|login|adresse|von)\b|//|地址)[^\n;!?]{0,12}\Z"
)
_SMALL = 20


def addresses(text: str) -> Iterator[Span]:
    """Yield addresses of machines; versions and numbers of sections look alike."""
    yield from _accepted(_IPV4, text, lambda match: len(match[0]) if _is_ipv4(match) else 0)
    yield from _accepted(_IPV6, text, _ipv6)


def _before(match: re.Match[str], size: int = 32) -> str:
    return match.string[max(0, match.start() - size) : match.start()]


def _is_ipv4(match: re.Match[str]) -> bool:
    parts = [int(part) for part in match[0].split(".")]
    if not _is_address(match[0]) or _VERSION.search(_before(match)):
        return False
    small = parts[0] != 10 and max(parts) < _SMALL
    return not small or bool(_NETWORK.search(_before(match)))


def _ipv6(match: re.Match[str]) -> int:
    # "abc::add" is a name in C++: an address spells more, and has digits.
    for found in (match[0], match[0].rstrip(":")):
        if re.match("[0-9A-Fa-f]{3}", found) and re.search(r"\d", found) and _is_address(found):
            return len(found)
    return 0


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


# --- telephone numbers

# Calling codes of countries (ITU-T E.164).
_CODE = (
    r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|(?:2[1-689]|3[578]|42|5[09]|6[789]|8[0578]|9[679])\d)"
)
_ALONE = r"(?<![A-Za-z0-9+])(?<!\d[.,:/-])"
_PHONE = re.compile(
    rf"(?P<abroad>(?:(?<![0-9+])(?<!\d[eE])\+ ?|{_ALONE}00 ?)"
    rf"{_CODE}(?:[ ./()_-]{{0,3}}\d){{5,13}}(?!\d))"
    rf"|(?P<area>(?<!\d)\(0[1-9]\d{{0,3}}\)[ ./-]{{0,2}}\d(?:[ ./-]?\d){{4,9}}(?!\d)"
    rf"|(?<!\d)\([2-9]\d\d\)[ .-]{{0,2}}\d{{3}}[ .-]?\d{{4}}(?!\d))"
    rf"|{_ALONE}(?P<home>0[1-9](?:[ ./-]{{0,2}}\d){{6,10}}(?![.:]?\d))"
    rf"|{_ALONE}(?P<us>(?:1[ .-])?[2-9]\d\d[ .-]\d{{3}}[ .-]\d{{4}}(?![.:-]?\d))"
)
# Plain digits are a telephone number where the text says so.
_CALLED = re.compile(
    r"(?i)(?:(?<![A-Za-z])(?:phone|t[eé]l(?:[eé](?:ph|f)on[eo]?)?|mobile|cell|handy|fax|m[oó]vil"
    r"|whatsapp|ruf)(?:nummer|number|nr|s)?(?![a-z])|手机|手機|电话|電話|携帯)"
    r"(?:[ .:=#-]{0,3}(?:is|was|ist|number|no|nr|num|nummer|numero|号码|號碼|番号|号|是|は)?){0,2}"
    r"[ .:=#-]{0,3}(?P<value>\d(?:[ ./-]?\d){6,14}(?![\d]))"
)
_DATE = re.compile(
    r"(?<!\d)(?:(?:0?[1-9]|[12]\d|3[01])(?P<a>[ ./-])(?:0?[1-9]|[12]\d|3[01])(?P=a)(?:19|20)\d\d"
    r"|(?:19|20)\d\d(?P<b>[ ./-])(?:0?[1-9]|1[0-2])(?P=b)(?:0[1-9]|[12]\d|3[01]|[1-9]))(?!\d)"
)
_COUNTED = re.compile(
    r"(?i)(?:(?<![a-z])(?:order|part|article|item|serial|device|version|isbn|ean|gtin|sku|asin|imei"
    r"|invoice|ticket|case|pages?|pp|section|lot|batch|model|bestellung|artikel|rechnung|seiten?"
    r"|teil)|订单|訂單)[ .:#-]{0,3}(?:numbers?|no|nr|id)?[ .:#-]{0,3}\Z"
)


def phones(text: str) -> Iterator[Span]:
    """Yield telephone numbers; dates, pages and numbers of articles look alike."""
    dates = [date.span() for date in _DATE.finditer(text)]

    def dated(begin: int, end: int) -> bool:
        place = bisect_left(dates, begin + 1, key=lambda span: span[1])
        return place < len(dates) and dates[place][0] < end

    def length(match: re.Match[str]) -> int:
        begin, end = match.span("value") if "value" in match.re.groupindex else match.span()
        digits = re.sub(r"\D", "", text[begin:end])
        if not 7 <= len(digits) <= 17 or len(set(digits)) <= 2 or dated(begin, end):
            return 0
        return end - match.start() if "value" in match.re.groupindex or _is_phone(match) else 0

    yield from _accepted(_PHONE, text, length)
    at = 0
    while match := _CALLED.search(text, at):
        if length(match):
            yield match.span("value")
            at = match.end()
        else:
            at = match.start() + 1


def _is_phone(match: re.Match[str]) -> bool:
    found = match[0]
    digits = re.sub(r"\D", "", found)
    groups, gaps = re.findall(r"\d+", found), re.findall(r"\D+", found)
    if match["abroad"]:
        number = digits if found[0] == "+" else digits[2:]
        if found[0] != "+" and len(number) < 9:
            return False
        # "+12 345 678" is a count, with its thousands apart.
        counted = len(number) <= 9 and re.fullmatch(r"\+\d{1,3}(?: \d{3})+", found)
        return 8 <= len(number) <= 15 and not counted and (number[0] != "1" or len(number) == 11)
    if _COUNTED.search(_before(match)):
        return False
    if not match["home"]:
        return True
    if len(digits) < 9 or not gaps:
        return False
    if all(len(group) == 2 for group in groups):
        return len(groups) == 5
    a_range = gaps[0] == "-" and " " in gaps and len(groups[0]) == len(groups[1])
    return not a_range and not (gaps == ["."] or gaps.count("/") > 1)


# In this order: what a longer secret holds is no address or number of its own.
RULES: tuple[tuple[str, Rule], ...] = (
    ("KEY", private_keys),
    ("KEY", tokens),
    ("KEY", assigned),
    ("EMAIL", emails),
    ("IBAN", ibans),
    ("CARD", cards),
    ("IP", addresses),
    ("PHONE", phones),
)
