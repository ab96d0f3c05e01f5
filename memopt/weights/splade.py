"""What a sentence-transformers SparseEncoder says of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import read_json
from memopt.errors import WeightsError
from memopt.registry import nearest
from memopt.weights.modules import MODULES, SETTINGS, read_modules

POOLINGS = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")


@dataclass(frozen=True, slots=True)
class Splade:
    """How the weight of a word is made of its logits at all tokens.

    ``pooling`` is max or sum over the tokens; ``twice`` saturates by a second logarithm; ``top``
    weights of a text are kept, None for all.
    """

    pooling: str = "max"
    twice: bool = False
    top: int | None = None


def read_splade(folder: Path) -> Splade:
    """Return the pooling of the folder; of a plain masked language model SPLADE's own (max).

    Raises:
        WeightsError: a value that sentence-transformers does not write.

    >>> read_splade(Path("/nowhere"))
    Splade(pooling='max', twice=False, top=None)
    """
    if not (folder / MODULES).is_file():
        return Splade()
    module = next((m for m in read_modules(folder) if m.kind == "SpladePooling"), None)
    path = folder / (module.path if module else "") / "config.json"
    config: dict[str, Any] = read_json(path) if module and path.is_file() else {}
    pooling = config.get("pooling_strategy", "max")
    activation = config.get("activation_function", "relu")
    for value, known in ((pooling, POOLINGS), (activation, ACTIVATIONS)):
        if value not in known:
            raise WeightsError(f"{path} says {value!r}", fix=nearest(str(value), known))
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    top = settings.get("max_active_dims")
    return Splade(pooling, activation == "log1p_relu", top if type(top) is int else None)
