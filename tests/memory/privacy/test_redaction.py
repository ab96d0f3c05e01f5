"""What redaction takes out however it is written, and what it leaves alone."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.memory.model.unicode import normalised
from memopt.memory.privacy.redaction import redact

LINE = "MIIBOgIBAAJBAKj34GkxFhD90vcNLYLInFEX6Ppy1tPf"
# A number of each kind, its kind.
SECRETS = [
    ("+44 20 7946 0958", "PHONE"),
    ("5500 0055 5555 5559", "CARD"),
    ("GB82 WEST 1234 5698 7654 32", "IBAN"),
    ("zoë@example.net", "EMAIL"),
]
WRITTEN: dict[str, Callable[[str], str]] = {
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "narrow spaces": lambda text: text.replace(" ", "\u202f"),
    "zero-width spaces": lambda text: "\u200b".join(text),
    "soft hyphens": lambda text: "\u00ad".join(text),
    "full width": lambda text: "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else "\u3000" if c == " " else c for c in text
    ),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "among ideographs": lambda text: f"我的号码{text}请保存",
    "non-breaking hyphens": lambda text: text.replace(" ", "\u2011"),
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(("secret", "kind"), SECRETS)
def test_the_way_it_is_written_hides_nothing(secret: str, kind: str, written: str) -> None:
    """And what stands before and after it stays as it was."""
    text = f"é ﬁ: {WRITTEN[written](secret)} ﬁn"
    found = redact(text)
    assert found.counts == {kind: 1}
    assert found.text.startswith("é ﬁ: ")
    assert found.text.endswith(" ﬁn")
    assert not any(c.isdecimal() or c in "@＠" for c in found.text)


def test_digits_of_other_scripts_are_digits() -> None:
    """Arabic-Indic and Devanagari."""
    for zero in (0x0660, 0x0966):
        text = "".join(chr(zero + int(c)) for c in "5500005555555559")
        assert redact(text).text == "[CARD]"


@pytest.mark.parametrize(
    "text",
    [
        "id_GB82WEST12345698765432_x",
        "卡5500005555555559。",
        "no_5500005555555559",
        "5500 0055\n5555 5559",
        "1 5500 0055 5555 5559 2",
        "5500 0055 5555 5559 123",
        "write a%2Bb%40example.net",
        "邮箱ann@example.net谢谢",
        "ann@example.net_old",
        "ann@example.xn--80asehdb",
        "fax 04.91.22.33.44",
        "电话：13912345678",
        "Telefonnummer: 0301234567",
        "(555) 123-4567",
        "+1 (555) 123-4567",
        "::ffff:192.168.7.20",
        "at 2001:db8::8a2e: up",
        "ping 9.9.9.9",
        "password: tulipsandroses",
        "密码：tulips",
        "Passwort ist Tulpen2024",
        'passphrase = "tulips and roses"',
        "DB_PASSWORD=tulips",
        "postgres://app:tulips@db:5432/main",
        "token_" + "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "sk-" + "a1B2" * 100,
    ],
)
def test_one_secret_is_found(text: str) -> None:
    """Beside an underscore, an ideograph, a further number, in words of other languages."""
    found = redact(text)
    assert sum(found.counts.values()) == 1
    assert not any(
        c in found.text for c in ("5555", "example", "tulips", "Tulpen", "123456", "B2a1")
    )


@pytest.mark.parametrize(
    "kind",
    [
        "PRIVATE KEY",
        "ENCRYPTED PRIVATE KEY",
        "EC PRIVATE KEY",
        "OPENSSH PRIVATE KEY",
        "PGP PRIVATE KEY BLOCK",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\\n"])
@pytest.mark.parametrize("cut", ["whole", "end", "begin"])
def test_private_keys(kind: str, newline: str, cut: str) -> None:
    """With headers, escaped line breaks, of any length, and cut off at either end."""
    lines = [f"-----BEGIN {kind}-----", "Proc-Type: 4,ENCRYPTED", "", *[LINE] * 900, "Ab3="]
    lines.append(f"-----END {kind}-----")
    if cut == "end":
        lines = lines[:-2]
    if cut == "begin":
        lines = lines[4:]
    found = redact("see " + newline.join(lines) + newline + "Well, that was it.")
    assert found.counts == {"KEY": 1}
    assert LINE[:12] not in found.text
    assert LINE[-12:] not in found.text
    assert found.text.startswith("see [KEY]")
    assert found.text.endswith("Well, that was it.")


@pytest.mark.parametrize(
    "text",
    [
        "on 12/11/2025 09:30 and 12-11-2025, 2025-11-12T09:30:00+01:00",
        "at 2025-11-12 09:30:00.123456 UTC+1, from 01.02.2025 to 03.04.2025",
        "epoch 1763000000, 1763000000123, 1763000000123456, 1763000000123456789",
        "EAN 4006381333931, 5901234123457 and 9783161484100",
        "ISBN 978-3-16-148410-0",
        "versions 2.10.0.1 and v1.2.3.4, tool==1.4.0.2, Chrome 99.0.4844.51",
        "chapter 3.1.4.1",
        "order number 0120-123-456",
        "order 302-1234567-7654321",
        "pages 0210-0240 5678",
        "built (1998) 7654321 bricks",
        "growth of +12 345 678",
        "set 00 11 22 33 44",
        "card 4000 1111 1111 1111",
        "git@example.com:group/project.git",
        "secret: Ostereier2023",
        "mobile release 20251112",
        "dead::beef and add::bad in C++",
        "sk-learn-contrib-something-else",
        "uuid 123e4567-e89b-12d3-a456-426614174000",
        "-----BEGIN CERTIFICATE-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOC\n-----END CERTIFICATE-----",
        "password: [KEY]",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """Dates, times, article numbers, versions, sections, orders."""
    assert redact(text).text == text


@given(st.text(max_size=80))
def test_any_text_around_hides_nothing(text: str) -> None:
    """The way back from the copy stays within the text, and no neighbour hides an address."""
    copy = normalised(text)
    assert len(copy.text) == len(copy.starts) == len(copy.ends)
    assert all(0 <= a < b <= len(text) for a, b in zip(copy.starts, copy.ends, strict=True))
    once = redact(f"{text}\n\nann@example.net\n\n{text}").text
    assert "[EMAIL]" in once
    assert "ann@example.net" not in once


@pytest.mark.performance
@pytest.mark.parametrize(
    "unit",
    [
        *(
            "DE89",
            "DE89 ",
            "DE89 3704 ",
            "AB12",
            "1",
            "12 ",
            "1234 ",
            "4111 ",
            "01 ",
            "0123-",
            "+49",
        ),
        *("+49 1", "00 49 ", "(030) ", "01.02.2025 ", "2001:", "a::", "1.2.3.4 ", "tel 1", "tel: "),
        *(
            "a@",
            "a@b.",
            "%40",
            "@a.b",
            "eyJ-",
            "eyJa.",
            "sk-",
            "token=",
            "password ",
            "://",
            "://a:",
        ),
        *(
            "-----BEGIN PRIVATE KEY-----\n",
            "-----END PRIVATE KEY-----",
            "-----BEGIN ",
            "-----",
            "ab12 ",
            "1-",
            "x=",
            ":",
            "Aa1+",
        ),
        *("e\u0301", "\u0301\u0323", "\u200b", "ﷺ", "密码", "a b", "\\n", "Private-Lines: 1\n"),
    ],
)
def test_work_grows_with_the_length_alone(unit: str) -> None:
    """Eight times the text is no more than some eight times the work, whatever it is made of."""

    def work(size: int) -> float:
        text = unit * (size // len(unit))
        begin = time.process_time()
        redact(text)
        return time.process_time() - begin

    few, many = min(work(4_000), work(4_000)), work(32_000)
    assert many < 40 * max(few, 2e-3)
