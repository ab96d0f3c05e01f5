"""Words as a reader sees them: one form for what is spelled, accented or inflected differently.

What is stored beside a text, indexed and compared with a question are these forms, made here and
nowhere else. They are not the text: nothing is shown of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from memopt.memory.model.unicode import stream_safe

# Letters that no decomposition takes apart.
_LETTERS = str.maketrans(
    {"æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i", "ـ": ""}
)
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼʹ＇`´′", "'"))
# Canonical combining classes of accents, Hebrew points and Arabic vowel signs. The signs of other
# scripts (viramas, nuktas, voicing, tones) make another word.
_ACCENTS = frozenset({1, *range(10, 37), *range(202, 241)})
# Scripts without spaces between words; Korean joins particles to them.
_JOINED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_SPELLED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Vowel signs belong to their letter; the regular expressions of Python take them for gaps.
_SIGNS = "".join(
    chr(code) for code in range(0x300, 0x1E00) if unicodedata.category(chr(code))[0] == "M"
)
_LETTER = rf"(?:(?![{_JOINED}{_SPELLED}_])[\w{_SIGNS}])"
_PIECES = re.compile(
    rf"(?P<joined>[{_JOINED}]+)|(?P<spelled>[{_SPELLED}]+)"
    rf"|(?P<word>{_LETTER}+(?:'{_LETTER}+)*)"
    r"|(?P<sign>[^\w\s])"
)
_ASCII = re.compile(r"[a-z]+")
# The least that stays of a word without its ending.
_STEM = 3
_ENDINGS = ("ing", "ed", "es", "s", "ly", "e")

# Words that ask or join and say nothing of what is asked for, so that a question is not answered by
# whatever asks another. Only of the language most of them belong to: "die" is a word in English.
_FUNCTION = {
    "en": "a an the of in on at to for and or but is are was were be been do does did has have "
    "had what which who whom whose when where why how with from by as it its this that "
    "these those i you he she they we his her their my your our me him them us would could "
    "should will can not no so if about into than then there some any am s t m re ve d ll "
    "don doesn didn isn wasn",
    "de": "der die das den dem des ein eine einen einem einer und oder ist sind war waren was "
    "wer wen wem wann wo warum wie mit von zu zum zur im in auf für hat haben hatte ich du "
    "er sie es wir ihr sein ihre nicht an bei welche welcher welches",
    "fr": "le la les l un une des du de d et ou est sont était qui que quoi quel quelle quels "
    "quand où pourquoi comment avec pour dans sur au aux en a ont je tu il elle nous vous "
    "ils elles son sa ses ne pas ce cette c qu s",
    "es": "el la los las un una unos unas de del y o es son era fue qué que quién quien cuál "
    "cuándo cuando dónde donde por cómo como con para en al a ha han su sus no se lo",
    "it": "il lo la i gli le un una uno di del della dei e o è sono era chi che cosa quale "
    "quando dove perché come con per in su al a ha hanno suo sua non si",
    "pt": "o a os as um uma de do da dos das e ou é são era foi que quem qual quando onde por "
    "como com para em no na ao tem seu sua não se",
    "nl": "de het een van en of is zijn was waren wat wie welke wanneer waar waarom hoe met voor "
    "in op aan te heeft hebben had hij zij ze we hun niet",
}


def words(text: str) -> list[str]:
    """Return the words of a text in their one form, in order.

    Composed and decomposed letters, upper and lower case, accents, full-width forms, vowel signs
    and apostrophes make no difference; dotted names are cut; English endings are taken off. Of
    scripts without spaces each character and each pair is a word; an emoji is one.

    >>> words("Zürich isn’t in İstanbul"), words("ZU\\u0308RICH")
    (['zurich', 'isn', 'isnt', 'in', 'istanbul'], ['zurich'])
    >>> words("foo_bar.baz"), words("東京都"), words("🎉")
    (['foo', 'bar', 'baz'], ['東', '東京', '京', '京都', '都'], ['u1f389'])
    """
    return [form for piece in _PIECES.finditer(plain(text)) for form in _forms(piece)]


def query_words(text: str) -> list[str]:
    """Return the words of a question that say what is asked for, each once; all where none does.

    >>> query_words("When did Maria donate her car?")
    ['maria', 'donat', 'car']
    >>> query_words("the who")
    ['the', 'who']
    """
    found = list(dict.fromkeys(words(text)))
    language = max(_FUNCTION, key=lambda name: sum(word in _function(name) for word in found))
    kept = [word for word in found if word not in _function(language)]
    return kept or found


def plain(text: str) -> str:
    """Return letters without case, accents and marks that are not seen.

    >>> plain("Zürich Ⅳ")
    'zurich iv'
    """
    text = text.translate(_APOSTROPHES)
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", stream_safe(text)).casefold()
    text = unicodedata.normalize("NFKD", text)
    seen = (
        character
        for character in text
        if unicodedata.combining(character) not in _ACCENTS
        and unicodedata.category(character) != "Cf"
    )
    plain = unicodedata.normalize("NFC", "".join(seen))
    return plain.translate(_LETTERS).translate(_APOSTROPHES)


def _forms(piece: re.Match[str]) -> Sequence[str]:
    kind, text = piece.lastgroup, piece[0]
    if kind == "joined":
        return [form for at in range(len(text)) for form in (text[at], text[at : at + 2])][:-1]
    if kind == "spelled":
        return [text[at : at + 2] for at in range(max(1, len(text) - 1))]
    if kind == "sign":
        other = unicodedata.category(text) == "So"
        return [f"u{ord(text):x}"] if other else []
    first, *rest = text.split("'")
    if not rest:
        return [_stem(first)]
    if rest == ["s"]:  # whose it is
        return [_stem(first)]
    parts = [_stem(part) for part in (first, *rest) if len(part) > 1]
    return [*parts, _stem(text.replace("'", ""))]


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """Return an English word without its commonest endings; others as they are.

    >>> {_stem(word) for word in ("donate", "donates", "donated", "donating")}
    {'donat'}
    """
    if not _ASCII.fullmatch(word):
        return word
    if len(word) > _STEM + 1 and word.endswith("ies"):
        return word[:-2]
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _STEM:
            word = word.removesuffix(ending)
            break
    if len(word) > _STEM and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]
    if len(word) > _STEM and word.endswith("y"):
        word = f"{word[:-1]}i"
    return word


@lru_cache(maxsize=len(_FUNCTION))
def _function(language: str) -> frozenset[str]:
    return frozenset(form for word in _FUNCTION[language].split() for form in words(word))
