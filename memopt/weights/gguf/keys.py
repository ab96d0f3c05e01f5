"""The metadata of one architecture, each key asked for once; what nobody asked for is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.weights.gguf.file import GgufFile

# They say nothing that a model computes with, or what the tensors say themselves.
_HARMLESS = frozenset(
    {
        "vocab_size",
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "attention.causal",
        "pooling_type",
    }
)


@dataclass(slots=True)
class Keys:
    """What a file says of its architecture (``llama.block_count`` is asked for as block_count)."""

    file: GgufFile
    _asked: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self.file.metadata

    def _name(self, name: str) -> str:
        return f"{self.file.architecture}.{name}"

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as it is; one for each layer counts as one where they are all the same."""
        self._asked.add(name)
        value = self.file.metadata.get(self._name(name), default)
        if isinstance(value, np.ndarray):
            if not value.size or (value != value[0]).any():
                raise self.wrong(name, f"{value.tolist()!s:.80}", "the same for every layer")
            value = value[0].item()
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0."""
        value = self.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.wrong(name, repr(value), "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number, of a float32 the shortest one that is it (1e-05)."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(name, repr(value), "a number")
        return float(str(np.float32(value))) if type(value) is float else float(value)

    def wrong(self, name: str, value: str, wanted: str) -> WeightsError:
        """Return the error that says what a key should be."""
        return WeightsError(
            f"{self.file.path}: {self._name(name)} is {value}, not {wanted}",
            fix="the file is damaged, or of a kind of model that memopt does not know",
        )

    def refuse_rest(self) -> None:
        """Refuse keys that nothing asked for: they may change what the model computes.

        Raises:
            WeightsError: there is one; the message names it.
        """
        start = f"{self.file.architecture}."
        names = [k.removeprefix(start) for k in self.file.metadata if k.startswith(start)]
        for name in names:
            if name not in self._asked | _HARMLESS:
                value = self.file.metadata[start + name]
                raise WeightsError(
                    f"{self.file.path}: {start}{name} ({value!s:.60}) is not known, so it would "
                    "not be honoured",
                    fix="convert the safetensors of the model",
                )
