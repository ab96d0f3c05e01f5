"""What transformers renames, splits and joins in a checkpoint while it loads.

Modules get renamed between releases (ViT's ``attention.attention.query`` became
``attention.q_proj``), and some checkpoints keep query, key and value in one matrix that the model
has as three. transformers keeps the steps in private modules; this is the one place that uses them.
``rename_source_key`` and ``convert`` have been there since transformers 5.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.weights.reader import WeightInfo, WeightLoader


class Converted:
    """A weight file as the installed transformers sees it: current names, split and joined.

    Args:
        loader: of the file.
        module: whose weights they are.
        without: beginnings of the names of weights that are not the module's.

    Attributes:
        names: what the module may call a weight -> what this object calls it. A renamed weight is
            called as in the file; one that was split or joined has its current name only.
    """

    def __init__(self, loader: WeightLoader, module: Any, without: tuple[str, ...] = ()) -> None:
        self._loader = loader
        renamings, converters = _steps(module)
        self.names: dict[str, str] = {}
        self._made: dict[str, np.ndarray] = {}
        groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for stored in loader.names():
            if stored.startswith(without):
                continue
            name = stored
            for step in renamings:
                name, _ = step.rename_source_key(name)
            for step in converters:
                target, pattern = step.rename_source_key(name)
                if pattern is not None:
                    sources = groups.setdefault(target, (step, {}))[1]
                    sources.setdefault(pattern, []).append(stored)
                    break
            else:
                self.names[name] = stored
        for target, (step, sources) in groups.items():
            self._convert(step, target, sources, module)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape without reading it."""
        if name in self._made:
            return self._made[name].shape
        info: WeightInfo = self._loader.info(name)
        return tuple(info.shape)

    def load(self, name: str) -> np.ndarray:
        """Return a weight as float32 or in its stored type."""
        return self._made[name] if name in self._made else self._loader.load(name)

    def _convert(
        self, step: Any, target: str, sources: Mapping[str, list[str]], module: Any
    ) -> None:
        import torch

        step = deepcopy(step)
        for pattern, stored in sources.items():
            for name in stored:
                values = np.asarray(self._loader.load(name)).astype(np.float32)
                step.add_tensor(target, name, pattern, torch.from_numpy(values))
        named = ", ".join(name for stored in sources.values() for name in stored[:3])
        try:
            made = step.convert(target, model=module, config=module.config)
        except Exception as error:
            raise ExportError(
                f"transformers cannot convert the weights {named} to {target}: {error}",
                fix="check that config.json and the weights are of the same model",
            ) from error
        for name, tensor in made.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            self._made[name] = tensor.contiguous().numpy()
            self.names[name] = name


def _steps(module: Any) -> tuple[list[Any], list[Any]]:
    if not hasattr(module, "base_model_prefix"):
        return [], []  # not a model of transformers
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        # A transformers that moved them: its modules are called as in the file, or _match says
        # which weight is missing.
        return [], []
    mapping = get_model_conversion_mapping(module)
    return (
        [step for step in mapping if isinstance(step, WeightRenaming)],
        [step for step in mapping if isinstance(step, WeightConverter)],
    )
