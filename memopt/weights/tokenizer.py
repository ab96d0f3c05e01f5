"""Make ``tokenizer.json`` from the vocabulary files that older models ship instead."""

from __future__ import annotations

from pathlib import Path

from memopt.errors import MissingExtra, WeightsError
from memopt.extras import require

# What a tokenizer without tokenizer.json consists of.
VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")


def make_tokenizer(source: Path, target: Path) -> None:
    """Write ``target`` with transformers' own translation of the slow tokenizer in ``source``.

    Raises:
        WeightsError: there is no vocabulary, transformers is not installed or cannot translate it;
            the message is a reason to follow a colon.
    """
    if not any(path for pattern in VOCABULARIES for path in source.glob(pattern)):
        raise WeightsError("no vocabulary is there either")
    try:
        transformers = require("transformers", extra="export", why="make one")
        # Code that came with a model is never run, and nobody is asked whether it should be.
        made = transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        made.backend_tokenizer.save(str(target))
    except MissingExtra as error:
        raise WeightsError(str(error)) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"transformers cannot make one: {reason}") from error
