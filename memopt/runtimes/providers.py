"""The execution targets memopt knows, and which of them work here.

A provider counts as usable only when a session was really opened on it, never because a wheel
lists it: ONNX Runtime lists what was compiled in, whatever the machine has.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from memopt.errors import DeviceError, brief
from memopt.extras import pip_command
from memopt.registry import Entry, nearest

if TYPE_CHECKING:
    from memopt.runtimes.base import Opener


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider(Entry):
    """One row of the table: which graphs a provider runs and how it is opened."""

    formats: tuple[str, ...] = ("onnx",)
    execution_provider: str | None = None  # ONNX Runtime's name for it
    plugin: str | None = None  # package of the plugin wheel that brings it
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "int4", "int2", "nf4")
    fused: bool = False  # runs graphs with ONNX Runtime's own operators


_ORT = "memopt.runtimes.onnx:OnnxBackend"
# A GPU computes fp16 at twice the speed or more; both were checked against torch at export.
_GPU = ("fp16", "fp32", "bf16", "int8", "int4", "int2", "nf4")
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            name="cuda",
            target=_ORT,
            summary="NVIDIA GPU through ONNX Runtime",
            extra="gpu",
            execution_provider="CUDAExecutionProvider",
            precisions=_GPU,
            fused=True,
        ),
        Provider(
            name="rocm",
            target=_ORT,
            summary="AMD GPU through ONNX Runtime's MIGraphX",
            execution_provider="MIGraphXExecutionProvider",
            plugin="onnxruntime_ep_migraphx",
            precisions=_GPU,
        ),
        Provider(
            name="coreml",
            target=_ORT,
            summary="Apple GPU and Neural Engine through ONNX Runtime",
            extra="cpu",
            execution_provider="CoreMLExecutionProvider",
        ),
        Provider(
            name="openvino",
            target="memopt.runtimes.openvino:OpenvinoBackend",
            summary="OpenVINO on the CPU",
            extra="openvino",
            formats=("openvino", "onnx"),
        ),
        Provider(
            name="webgpu",
            target=_ORT,
            summary="any GPU with Vulkan, Metal or D3D12 through ONNX Runtime's WebGPU",
            execution_provider="WebGpuExecutionProvider",
            plugin="onnxruntime_ep_webgpu",
            precisions=_GPU,
            fused=True,
        ),
        Provider(
            name="cpu",
            target=_ORT,
            summary="CPU through ONNX Runtime",
            extra="cpu",
            execution_provider="CPUExecutionProvider",
            fused=True,
        ),
        Provider(
            name="aoti",
            target="memopt.runtimes.aoti:AotiBackend",
            summary="NVIDIA GPU, or the CPU, through packages compiled by torch's inductor",
            extra="export",
            formats=("torch-aoti",),
            precisions=_GPU,
        ),
        Provider(
            name="torch",
            target="memopt.runtimes.torch:TorchBackend",
            summary="the reference: transformers on torch, weights from weights.parquet",
            extra="export",
            formats=(),
        ),
    )
}
# Providers whose library can be opened in a child of fork() after its parent used it.
FORKS = ("openvino", "cpu", "torch")
AUTO_ORDER = ("cuda", "aoti", "rocm", "coreml", "openvino", "cpu")
ALIASES = {"vulkan": "webgpu", "mps": "coreml", "arm": "cpu"}
DEVICES = ("auto", *PROVIDERS, *ALIASES)


def canonical(device: str) -> str:
    """Return the provider (or ``auto``) that a device name means.

    Raises:
        DeviceError: an unknown name; the message names the nearest.

    >>> canonical("vulkan"), canonical("mps")
    ('webgpu', 'coreml')
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}", fix=nearest(device, DEVICES))
    return ALIASES.get(device, device)


def installed(name: str) -> bool:
    """Return whether ``name`` can be tried here.

    Cheap and pessimistic only about what is not installed: opening a session is the real test.
    """
    return _absent(name) is None


def missing(name: str) -> str | None:
    """Return why ``name`` cannot even be tried here and what installs it, None when it can."""
    found = _absent(name)
    if found is None:
        return None
    why, extra = found
    return f"{why} ({pip_command(extra)})" if extra else why


def _absent(name: str) -> tuple[str, str | None] | None:
    """Return why ``name`` cannot be tried, and the extra that brings what is not installed."""
    provider = PROVIDERS[name]
    if provider.execution_provider is not None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed", provider.extra
        if damage := damaged():
            return f"{damage} (run: memopt doctor)", None
        if provider.execution_provider in compiled():
            return None
        if provider.plugin and importlib.util.find_spec(provider.plugin) is not None:
            return None
        wheel = {"cuda": "onnxruntime-gpu", "rocm": "onnxruntime-migraphx"}.get(name)
        if provider.plugin and not wheel:
            wheel = provider.plugin.replace("_", "-")
        hint = f" (it comes with {wheel})" if wheel else ""
        return f"this onnxruntime has no {provider.execution_provider}{hint}", None
    module = {"openvino": "openvino", "torch": "torch", "aoti": "torch"}.get(name)
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed", provider.extra
    return None


@lru_cache(maxsize=1)
def damaged() -> str | None:
    """Return why the installed onnxruntime is of no use, None when it is whole.

    Its wheels share one folder: uninstalling one of two takes the other's files along, and Python
    then imports what is left as an empty package.
    """
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        return f"onnxruntime cannot be imported: {one_line(error)}"
    if hasattr(onnxruntime, "get_available_providers"):
        return None
    return "onnxruntime is damaged: another wheel of it has overwritten or removed its files"


@lru_cache(maxsize=1)
def compiled() -> frozenset[str]:
    """Return the execution providers compiled into the installed onnxruntime."""
    import onnxruntime

    return frozenset(onnxruntime.get_available_providers())


class Unavailable(DeviceError):
    """A provider that is not installed or has no device here: no variant will open on it."""


def opener(name: str) -> Opener:
    """Return the function that opens a variant on provider ``name``.

    Raises:
        Unavailable: what the provider needs is not installed.
    """
    why = missing(name)
    if why:
        raise Unavailable(why)
    found: Opener = PROVIDERS[name].load()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Whether a provider works here: a session was opened on it, or why not."""

    name: str
    usable: bool
    detail: str
    summary: str


def detect() -> list[Status]:
    """Try every provider by opening a session of one matrix product on it.

    >>> any(status.usable for status in detect())
    True
    """
    found = []
    for name, provider in PROVIDERS.items():
        why = missing(name)
        usable, detail = (False, why) if why else _try(name)
        found.append(Status(name=name, usable=usable, detail=detail, summary=provider.summary))
    return found


def _try(name: str) -> tuple[bool, str]:
    import importlib

    module, _, _ = PROVIDERS[name].target.partition(":")
    try:
        version: Any = importlib.import_module(module).probe(name)
    except Exception as error:  # noqa: BLE001 - every way of failing is the answer asked for
        return False, one_line(error)
    return True, str(version)


def one_line(error: BaseException) -> str:
    """Return an error as one short line with its type.

    >>> one_line(ValueError("a\\n  b"))
    'ValueError: a b'
    """
    kind = type(error).__name__
    return f"{kind}: {brief(error, 300)}" if str(error).strip() else kind
