"""Which bundles make the vectors of a store, remembered beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.files import atomic_path, read_plain
from memopt.jsontext import parse_json
from memopt.memory.model.schema import Embedder
from memopt.memory.store.meta import MODELS_FILE
from memopt.moved import old_names

__getattr__ = old_names(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Bundle folders; ``joint`` and what it joins, or ``text`` alone.

    >>> Models(joint="j").check()
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: a joint layer without encoders; give text, vision or audio too
    """

    text: str | None = None
    vision: str | None = None
    audio: str | None = None
    joint: str | None = None

    def check(self) -> None:
        """Refuse what makes no embedder.

        Raises:
            ConfigurationError: a joint layer alone, or pictures or sound without one.
        """
        if self.joint and not (self.text or self.vision or self.audio):
            raise ConfigurationError(
                "a joint layer without encoders", fix="give text, vision or audio too"
            )
        if (self.vision or self.audio) and not self.joint:
            raise ConfigurationError(
                "pictures and sounds need a joint layer to be compared with texts",
                fix="train one (memopt memory train-joint) and give --joint",
            )

    def open(self) -> Embedder | None:
        """Return the embedder, on the device of the settings; None where no bundle is named.

        Raises:
            ConfigurationError, BundleError: the bundles do not fit together.
        """
        from memopt.memory.model.encoders import (
            AudioEncoder,
            JointEmbedder,
            TextEmbedder,
            TextEncoder,
            VisionEncoder,
        )
        from memopt.runtimes.configured import open_engine

        self.check()
        if self.joint:
            from memopt.joint.layer import JointEmbeddingLayer

            layer = JointEmbeddingLayer(self.joint)
            kinds = {"vision": VisionEncoder, "audio": AudioEncoder, "text": TextEncoder}
            encoders = {
                name: kind(open_engine(bundle), layer.config.dims[name])
                for name, kind in kinds.items()
                if (bundle := getattr(self, name))
            }
            return JointEmbedder(layer, **encoders)
        if self.text:
            engine = open_engine(self.text)
            return TextEmbedder(TextEncoder(engine, engine.dimension))
        return None


def read_models(folder: str | Path) -> Models:
    """Return what :func:`write_models` wrote into a store's folder; nothing named without it.

    Raises:
        ConsolidationError: the file is damaged.
    """
    path = Path(folder) / MODELS_FILE
    data = read_plain(path)
    if data is None:
        return Models()
    try:
        return Models(**parse_json(data, str(path)))
    except (ValueError, TypeError) as error:
        raise ConsolidationError(f"{path} is damaged ({error})", fix="delete it") from error


def write_models(folder: Path | None, models: Models) -> None:
    """Write the bundles beside a local store, so that later commands need no flag."""
    if folder is None:
        return
    with atomic_path(folder / MODELS_FILE, 0o600) as path:
        path.write_text(json.dumps(asdict(models), indent=1) + "\n", encoding="utf-8")
