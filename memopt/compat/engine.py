"""ArrowEngine of a folder or of a weight file, and the torch providers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memopt import metrics
from memopt.bundle import Bundle, open_bundle
from memopt.errors import DeviceError, WeightsError
from memopt.runtimes import engine as core
from memopt.runtimes import limits
from memopt.runtimes.cpu import cpu_features

_PLAIN = ("onnx-fp32", "openvino-fp32")


class ArrowEngine(core.ArrowEngine):
    """:class:`memopt.ArrowEngine` that also takes a weight file, and ``optimize``.

    Args:
        path: a bundle, or a Parquet file that lies in one: its own weights, or quantized ones
            (V2), of which a graph is made in the bundle.
        device: as of :class:`memopt.ArrowEngine`.
        optimize: False runs the plain float graph, True the best that was measured here.
        options: as of :class:`memopt.ArrowEngine`.

    Raises:
        WeightsError: the file lies in no bundle.
        BundleError, DeviceError: as of :class:`memopt.ArrowEngine`.
    """

    def __init__(
        self, path: str | Path | Bundle, device: str = "auto", optimize: bool = True, **options: Any
    ) -> None:
        bundle, variant = _bundle_of(path)
        if variant is None and not optimize:
            names = [name for name in _PLAIN if name in bundle.manifest.variants]
            variant = names[0] if names else None
        options.setdefault("variant", variant or "auto")
        super().__init__(bundle, device, **options)


def _bundle_of(path: str | Path | Bundle) -> tuple[Bundle, str | None]:
    """Return the bundle of a folder or a weight file, and the variant of quantized weights."""
    if isinstance(path, Bundle) or Path(path).suffix != ".parquet":
        return path if isinstance(path, Bundle) else open_bundle(path), None
    from memopt.weights.reader import WeightLoader

    file = Path(path)
    if not (file.parent / "memopt.json").is_file():
        raise WeightsError(
            f"{file} lies in no bundle: there is no config or tokenizer beside it",
            fix=f"run: memopt convert {file} --config FOLDER -o BUNDLE",
        )
    bundle = open_bundle(file.parent)
    if file.resolve() == bundle.weights.resolve():
        return bundle, None
    with WeightLoader(file) as weights:
        if weights.version == 1:
            raise WeightsError(
                f"{file} is not the float weights of {bundle.path}",
                fix=f"run: memopt convert {file} --config {bundle.path} -o BUNDLE",
            )
    from memopt.exporters.from_v2 import export_v2

    variant = export_v2(bundle, file)
    return open_bundle(file.parent), variant.name


class AcceleratedProvider:
    """A torch model on a device, as the founding design's backends call it.

    Args:
        device: auto, cuda, mps or cpu; None takes the backend's own.
        dtype: of the weights; None keeps the model's.
        config: the options named in the subclasses.
    """

    device_name = "auto"

    def __init__(
        self,
        device: str | None = None,
        dtype: Any = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.device = self._resolve_device(device or self.device_name)
        self.dtype = dtype
        self.config = config or {}
        self.model: Any = None
        self._initialize_backend()

    def _initialize_backend(self) -> None:
        """Read the options."""

    def _resolve_device(self, device: str) -> str:
        if device != "auto":
            return device
        from memopt.extras import require

        torch = require("torch", extra="export", why="run models in torch")
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def optimize_model(self, model: Any) -> Any:
        """Move a ``torch.nn.Module`` to the device, for inference, and keep it."""
        model = model.to(self.device) if self.dtype is None else model.to(self.device, self.dtype)
        self.model = model.eval()
        return self.model

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """Return what the model makes of tokens (batch, length).

        Raises:
            DeviceError: there is no model yet.
        """
        if self.model is None:
            raise DeviceError("no model was given", fix="call optimize_model(model) first")
        import torch

        with torch.inference_mode():
            return self.model(input_ids.to(self.device), attention_mask.to(self.device))

    def get_device_info(self) -> dict[str, Any]:
        """Return device, dtype and backend."""
        return {"device": self.device, "dtype": str(self.dtype), "backend": type(self).__name__}


class CPUBackend(AcceleratedProvider):
    """torch on the CPU; options ``use_compile``, ``use_ipex``, ``compile_mode``.

    >>> backend = CPUBackend(config={"compile_mode": "max-autotune"})
    >>> backend.compile_mode, isinstance(backend.has_avx512, bool)
    ('max-autotune', True)
    """

    device_name = "cpu"

    def _initialize_backend(self) -> None:
        import importlib.util

        self.use_compile: bool = self.config.get("use_compile", True)
        self.use_ipex: bool = self.config.get("use_ipex", True)
        self.compile_mode: str = self.config.get("compile_mode", "default")
        self.has_avx512 = "avx512f" in cpu_features()
        self.has_amx = "amx_tile" in cpu_features()
        self.ipex_available = importlib.util.find_spec("intel_extension_for_pytorch") is not None
        if self.use_ipex and not self.ipex_available:
            metrics.fallback("ipex", "torch", "unavailable")

    def optimize_model(self, model: Any) -> Any:
        """Compile the model, where ``use_compile`` says so, and keep it."""
        model = super().optimize_model(model)
        if self.use_ipex and self.ipex_available:
            import importlib

            model = importlib.import_module("intel_extension_for_pytorch").optimize(model)
        if self.use_compile:
            import torch

            model = torch.compile(model, mode=self.compile_mode)
        self.model = model
        return model


class GPUBackend(AcceleratedProvider):
    """torch on a GPU; options ``use_amp``, ``vram_threshold``, ``fallback_to_cpu``.

    Raises:
        DeviceError: the GPU is not there.
    """

    device_name = "cuda"

    def _initialize_backend(self) -> None:
        from memopt.extras import require

        torch = require("torch", extra="export", why="run models in torch")
        self.use_amp: bool = self.config.get("use_amp", True)
        self.vram_threshold: float = self.config.get("vram_threshold", 0.9)
        self.fallback_to_cpu: bool = self.config.get("fallback_to_cpu", True)
        there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if self.device not in there or not there[self.device]():
            raise DeviceError(f"{self.device} is not available", fix="use CPUBackend")

    def check_vram_usage(self) -> float:
        """Return the share of the GPU's memory in use, 0 where the driver does not say."""
        found = limits.vram()
        return found.used_mb / found.total_mb if found else 0.0

    def should_fallback_to_cpu(self) -> bool:
        """Return whether the GPU is fuller than ``vram_threshold``, and the CPU may take over."""
        return self.fallback_to_cpu and self.check_vram_usage() > self.vram_threshold

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """Run on the GPU, or on the CPU where its memory is full."""
        import torch

        if self.device != "cpu" and self.should_fallback_to_cpu():
            metrics.fallback(self.device, "cpu", "memory")
            self.device, self.use_amp = "cpu", False
            self.model = self.model.to("cpu")
        with torch.autocast(self.device, enabled=self.use_amp):
            return super().forward(input_ids, attention_mask)
