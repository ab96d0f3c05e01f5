"""The torch backend: the reference that every exported graph is compared with.

The model is built by transformers from ``config.json`` and the weights come from
``weights.parquet``, so a bundle runs here before anything was exported.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from memopt.bundle import Bundle, Manifest
from memopt.errors import BundleError, DeviceError, ExportError, MissingExtra
from memopt.extras import require
from memopt.runtimes.base import TOKENS_ON_CPU, Placement, Settings
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.heads import head_outputs

if TYPE_CHECKING:
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.torch_model import LoadedModel


def probe(name: str) -> str:
    """Multiply two matrices; return what answered.

    Raises:
        Exception: torch does not work here.
    """
    torch = require("torch", extra="export", why="run the reference")
    torch.eye(2) @ torch.eye(2)
    return f"torch {torch.__version__}"


class TorchBackend:
    """A bundle's transformers model in float32 on the CPU, with the head the manifest declares.

    Raises:
        MissingExtra: torch or transformers is not installed.
        BundleError: the bundle has no weights, or they do not fit the architecture.
    """

    def __init__(self, bundle: Bundle, candidate: Placement, settings: Settings) -> None:
        torch = require("torch", extra="export", why="run the reference")
        from concurrent.futures import ThreadPoolExecutor

        self._torch = torch
        self._threads = settings.threads or usable_cpus()
        self.tokens = TOKENS_ON_CPU
        self.step, self.row = 1, 0
        torch.set_num_threads(self._threads)
        self._loaded: Any = _load(bundle)
        self._model: Any = self._loaded.module
        if settings.use_ipex:
            self._model = _optimized(self._model)
        self.inputs = _inputs(self._loaded, bundle.manifest)
        self.dimension = bundle.manifest.dimension
        if bundle.task.answer == "classes" or bundle.task.name == "token-classification":
            # As many as the head's weights have; config.json may name fewer.
            self.dimension = int(self._loaded.config.num_labels)
        self.streams = 1
        if settings.use_compile:
            self._model = torch.compile(self._model, dynamic=True, mode=settings.compile_mode)
        self._compiled = settings.compile_mode if settings.use_compile else None
        self._pool = ThreadPoolExecutor(1, "memopt-torch")
        # The modules are shared between threads; torch.compile is not safe to enter twice.
        self._lock = threading.Lock()

    def run(self, feed: Feed) -> Rows:
        """Run one batch."""
        import numpy as np

        torch, model = self._torch, self._model
        if model is None:
            raise DeviceError("the model on torch is closed")
        tensors = {name: torch.from_numpy(feed[name]) for name in self.inputs}
        with self._lock, torch.inference_mode():
            kept = tensors.pop("pooling_mask", None)
            result = getattr(model, self._loaded.method or "__call__")(**tensors)
            mask = tensors.get("attention_mask")
            rows = head_outputs(self._loaded.head, result, mask, kept)[-1]
        return np.asarray(rows.float().numpy(), dtype=np.float32)

    def submit(self, feed: Feed) -> Future[Rows]:
        """Run one batch beside the caller."""
        return self._pool.submit(self.run, feed)

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Refuse: torch has a model and no graph.

        Raises:
            DeviceError: always.
        """
        raise DeviceError("torch runs models, not graphs", fix="use another device")

    def free(self) -> None:
        """Nothing is kept that could be given back."""

    def info(self) -> dict[str, Any]:
        """Return what runs where."""
        return {
            "runtime": f"torch {self._torch.__version__}",
            "threads": self._threads,
            "streams": 1,
            "nodes": {},
            "compiled": self._compiled,
        }

    def close(self) -> None:
        """Drop the model."""
        self._model = None
        self._loaded = None
        self._pool.shutdown(wait=False)


def _optimized(model: Any) -> Any:
    """Return the model with Intel's own kernels.

    Raises:
        MissingExtra: intel_extension_for_pytorch is not installed.
    """
    import importlib

    try:
        ipex = importlib.import_module("intel_extension_for_pytorch")
    except ImportError as error:
        raise MissingExtra(
            f"use_ipex needs intel_extension_for_pytorch, which cannot be imported ({error})",
            fix="leave use_ipex out; Intel's successor is OpenVINO (device openvino)",
        ) from error
    return ipex.optimize(model)


def _load(bundle: Bundle) -> LoadedModel:
    from memopt.runtimes.torch_model import load_model

    try:
        return load_model(bundle, bundle.manifest.task, attention=None)
    except ExportError as error:
        problem = f"torch cannot build the model of {bundle.path}: {error.problem}"
        raise BundleError(problem, fix=error.fix) from error


def _inputs(loaded: LoadedModel, manifest: Manifest) -> tuple[str, ...]:
    config, head = loaded.config, loaded.head
    if manifest.modality == "image":
        return ("pixel_values",)
    if manifest.modality == "audio":
        return ("input_features",) if config.model_type == "whisper" else ("input_values",)
    types = (getattr(config, "type_vocab_size", 0) or 0) > 1
    further = ("token_type_ids",) * types + ("pooling_mask",) * (not head.include_prompt)
    return ("input_ids", "attention_mask", *further)
