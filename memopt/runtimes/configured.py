"""An engine opened as the settings (memopt.yaml, environment) say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from memopt.bundle import Bundle
from memopt.config import OptimizationConfig, load_config
from memopt.runtimes.engine import ArrowEngine

E = TypeVar("E")


def open_engine(
    path_or_bundle: str | Path | Bundle,
    device: str | None = None,
    variant: str = "auto",
    strict: bool = False,
    *,
    config: OptimizationConfig | None = None,
) -> ArrowEngine:
    """Open a bundle as the settings say, the way ``memopt embed`` does.

    Args and errors: as of :func:`open_configured`.

    >>> open_engine("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """
    return open_configured(ArrowEngine, path_or_bundle, device, variant, strict, config=config)


def open_configured(
    engine: Callable[..., E],
    path_or_bundle: str | Path | Bundle,
    device: str | None = None,
    variant: str = "auto",
    strict: bool = False,
    *,
    config: OptimizationConfig | None = None,
) -> E:
    """Open a bundle with an engine as the settings say.

    Args:
        engine: its class.
        path_or_bundle, device, variant, strict: as of :class:`ArrowEngine`; None takes
            ``device.target``, and ``device.fallback_enabled: false`` is strict.
        config: the settings; None reads ``memopt.yaml`` and the environment.

    Raises:
        ConfigurationError: the settings are wrong.
        BundleError, DeviceError: as :class:`ArrowEngine`.

    >>> open_configured(ArrowEngine, "/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """
    chosen = config or load_config()
    on, cpu, gpu = chosen.device, chosen.cpu, chosen.gpu
    return engine(
        path_or_bundle,
        device or on.target,
        variant,
        strict or not on.fallback_enabled,
        vram_threshold=min(on.vram_threshold, gpu.vram_threshold),
        use_compile=cpu.use_compile,
        compile_mode=cpu.compile_mode,
        use_ipex=cpu.use_ipex,
        use_amp=gpu.use_amp,
        fallback_to_cpu=gpu.fallback_to_cpu,
    )
