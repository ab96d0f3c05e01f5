"""Import paths of before: a module that has moved is still found under its old name.

``from memopt.memory.schema import Memory`` was right until memory and federation got rooms, and
people's programs say so. The old name gives the very module that lies elsewhere now, with a
DeprecationWarning. Where a package has the old module's name it gives the names itself.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "memopt.federation.adapters": "memopt.federation.delta.adapters",
    "memopt.federation.aggregate": "memopt.federation.delta.aggregate",
    "memopt.federation.arrays": "memopt.federation.delta.arrays",
    "memopt.federation.audit": "memopt.federation.trust.audit",
    "memopt.federation.authority": "memopt.federation.trust.authority",
    "memopt.federation.codecs": "memopt.federation.delta.codecs",
    "memopt.federation.delta_settings": "memopt.federation.delta.settings",
    "memopt.federation.gate": "memopt.federation.wire.tls",
    "memopt.federation.manager": "memopt.federation.client.manager",
    "memopt.federation.payload": "memopt.federation.delta.payload",
    "memopt.federation.session": "memopt.federation.client.session",
    "memopt.federation.signing": "memopt.federation.trust",
    "memopt.federation.store": "memopt.federation.server.store",
    "memopt.memory.access_log": "memopt.memory.privacy.access_log",
    "memopt.memory.condense": "memopt.memory.lifecycle.consolidation",
    "memopt.memory.consolidation": "memopt.memory.lifecycle.worker",
    "memopt.memory.encoders": "memopt.memory.model.encoders",
    "memopt.memory.erase": "memopt.memory.privacy.erase",
    "memopt.memory.joint": "memopt.joint.layer",
    "memopt.memory.joint_bundle": "memopt.joint.bundle",
    "memopt.memory.joint_pairs": "memopt.joint.pairs",
    "memopt.memory.joint_train": "memopt.joint.train",
    "memopt.memory.keys": "memopt.memory.privacy.keys",
    "memopt.memory.llm": "memopt.memory.lifecycle.llm",
    "memopt.memory.models": "memopt.memory.io.models",
    "memopt.memory.reclaim": "memopt.memory.privacy.erase",
    "memopt.memory.redaction": "memopt.memory.privacy.redaction",
    "memopt.memory.retention": "memopt.memory.lifecycle.retention",
    "memopt.memory.retriever": "memopt.memory.graph.retriever",
    "memopt.memory.schedule": "memopt.memory.lifecycle.schedule",
    "memopt.memory.schema": "memopt.memory.model.schema",
    "memopt.memory.tiering": "memopt.memory.lifecycle.tiering",
    "memopt.memory.verify": "memopt.memory.lifecycle.verify",
    "memopt.quantization.activations": "memopt.quantization.math.hessians",
    "memopt.quantization.calibration": "memopt.quantization.accuracy.calibration",
    "memopt.quantization.extremes": "memopt.quantization.accuracy.extremes",
    "memopt.quantization.gptq": "memopt.quantization.math.gptq",
    "memopt.quantization.graph_runner": "memopt.graphs.session",
    "memopt.quantization.onnx_nbits": "memopt.quantization.methods.weight_only",
    "memopt.quantization.report": "memopt.quantization.accuracy.report",
    "memopt.quantization.result": "memopt.quantization.accuracy.result",
    "memopt.quantization.rounding": "memopt.quantization.math.rounding",
    "memopt.quantization.smooth": "memopt.quantization.math.smooth",
    "memopt.quantization.static": "memopt.quantization.method",
    "memopt.quantization.statistics": "memopt.quantization.math.statistics",
    "memopt.quantization.validate": "memopt.quantization.accuracy.validate",
}

# What a module's public names are called now, and where they lie.
RENAMED = {
    "memopt.memory.io.models": {
        "remember": "memopt.memory.io.models:write_models",
        "remembered": "memopt.memory.io.models:read_models",
    },
    "memopt.memory.lifecycle.llm": {"Limits": "memopt.memory.lifecycle.llm:CallLimits"},
    "memopt.memory.privacy.erase": {"Erased": "memopt.memory.privacy.erase:Erasure"},
    "memopt.memory.privacy.redaction": {"Found": "memopt.memory.privacy.redaction:Redaction"},
    "memopt.quantization.accuracy.validate": {"Gate": "memopt.quantization.accuracy.gate:Gate"},
    "memopt.runtimes.base": {"Candidate": "memopt.runtimes.base:Placement"},
    "memopt.weights.crypto": {
        name: f"memopt.sealing:{name}" for name in ("load_key", "parse_key", "write_key")
    },
}


def old_names(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose names are others now; each use is warned of."""

    def find(name: str) -> Any:
        if name not in RENAMED[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = RENAMED[module][name].partition(":")
        warnings.warn(f"{module}.{name} is {home}.{new} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new)

    return find


class _Old:
    # A finder and loader by its methods: importlib.abc would double what `import memopt` takes.
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        # The import system is about to write the old name over it.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        state = module.__spec__
        assert state is not None
        module.__spec__ = state.loader_state


def find_moved() -> None:
    """Let the import system find what has moved, after everything else."""
    if not any(isinstance(finder, _Old) for finder in sys.meta_path):
        sys.meta_path.append(_Old())
