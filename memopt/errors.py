"""The exceptions memopt raises, all in one place.

    MemoptError
    ├── ExportError          a model that cannot be turned into a right graph
    ├── QuantizationError    a quantized variant that cannot be built or fails its gate
    ├── DeviceError          a provider that cannot be opened or died
    ├── WeightsError         a weight file or checkpoint that cannot be trusted
    ├── BundleError          a bundle or its manifest that is missing, damaged or incomplete
    ├── ConsolidationError   a memory store or its lifecycle
    ├── SyncError            the weight-sync protocol
    ├── InputError           data given to encode, embed, calibrate (also a ValueError)
    ├── ConfigurationError   a setting, flag or YAML key (also a ValueError)
    └── MissingExtra         an optional dependency that is not installed (also an ImportError)

Every message says what was wrong, with the value; ``fix`` says what to do about it.
"""

from __future__ import annotations

import re

# Those of an absolute path; of a URL nothing.
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")


class MemoptError(Exception):
    """Base of every error memopt raises on purpose.

    Args:
        problem: what was wrong, naming the offending value.
        fix: what the reader can do about it, one sentence.

    >>> str(MemoptError("no file 'x'", fix="check the path"))
    "no file 'x'; check the path"
    """

    exit_code = 1

    def __init__(self, problem: str, *, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}" if self.fix else self.problem


class ExportError(MemoptError):
    """A model could not be exported, or the exported graph gave different answers."""


class QuantizationError(MemoptError):
    """A quantized variant could not be built or did not pass its quality gate."""


class DeviceError(MemoptError, RuntimeError):
    """A provider is unknown, unusable, or failed while running."""


class WeightsError(MemoptError):
    """A weight file or checkpoint is missing, truncated, inconsistent or unsafe to read."""


class BundleError(MemoptError):
    """A bundle is missing, damaged, or lacks the variant asked for."""


class ConsolidationError(MemoptError):
    """The memory store or its consolidation could not do what was asked."""


class SyncError(MemoptError):
    """A weight-sync message, signature, peer or transfer was refused."""


class InputError(MemoptError, ValueError):
    """An input (text, image, audio, calibration file) cannot be used."""


class ConfigurationError(MemoptError, ValueError):
    """A setting has an unknown key, a wrong type or a value out of range."""

    exit_code = 2


class MissingExtra(MemoptError, ImportError):
    """An optional dependency is needed and not installed."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing.

    >>> first_line(ValueError("no such file\\n  at line 3")), first_line(KeyboardInterrupt())
    ('no such file', 'KeyboardInterrupt')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def brief(error: object, most: int = 200) -> str:
    """Return what an error says in one line of up to ``most`` characters.

    Its kind where it says nothing. What is too long loses the folders of its paths, then its
    middle: libraries say where first and why last.

    >>> brief(ValueError("no such\\n  file"))
    'no such file'
    >>> brief("cannot load /home/me/a/model.onnx: unknown operator Sorcery", most=50)
    'cannot load model.onnx: unknown operator Sorcery'
    >>> brief("from node.cpp: " + "at " * 100 + "std::bad_alloc", most=42)
    'from node.cpp: at at at ... std::bad_alloc'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > most:
        text = _FOLDERS.sub("", text)
    if len(text) > most:
        end = most // 3
        text = f"{text[: most - end - 5].rstrip()} ... {text[-end:].lstrip()}"
    return text
