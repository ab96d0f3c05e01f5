"""Which variants to try on which providers, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memopt.bundle import Bundle, Variant
from memopt.errors import BundleError, DeviceError
from memopt.registry import nearest
from memopt.runtimes.aoti import trusted
from memopt.runtimes.base import Placement, Settings, usual_streams
from memopt.runtimes.cpu import covers, machine_key, usable_cpus
from memopt.runtimes.providers import AUTO_ORDER, DEVICES, PROVIDERS, canonical, installed

# The device a variant was made for -> the providers that are such a device.
_TARGETS = {
    "cpu": ("cpu", "openvino", "torch", "aoti"),
    "openvino": ("openvino",),
    "gpu": ("cuda", "aoti", "rocm", "coreml", "webgpu"),
}
# One of these is among the inputs of a graph of that modality (docs/architecture.md).
_INPUTS = {
    "text": {"input_ids"},
    "image": {"pixel_values"},
    "audio": {"input_features", "input_values"},
}
# What torch runs.
_REFERENCE = Variant(name="torch-fp32", format="onnx", precision="fp32", file="weights.parquet")


def candidates(
    bundle: Bundle, device: str, variant: str, *, half: bool = True, cpu_fallback: bool = True
) -> list[Placement]:
    """Return what to try, best first.

    The provider asked for comes first, then what may take over: for the variant asked for (or
    tuned on this machine, or the best), each provider of the automatic order. On one provider
    variants that ``memopt optimize`` measured on a processor like this come first, the fastest at
    the front; then the float variants, then what is quantized and not measured. A variant that
    failed its quality gate is only there when asked for by name.

    Args:
        bundle: what to run.
        device: a provider, one of its other names, or auto.
        variant: a variant's name, or auto.
        half: take float16 before float32 on a GPU.
        cpu_fallback: let the CPU take over from a GPU; False leaves GPUs only, where there are any.

    Raises:
        DeviceError: an unknown device.
        BundleError: an unknown variant, or nothing in the bundle that could run.
    """
    asked = canonical(device)
    forced = bundle.variant(variant) if variant != "auto" else None
    if forced is not None and not of_task(forced, bundle):
        raise BundleError(
            f"variant {variant!r} takes {', '.join(forced.inputs)}: it is another tower of "
            f"{bundle.path}, whose task is {bundle.manifest.task}",
            fix="convert the model with another --task into a bundle of its own",
        )
    found = [c for c in _all(bundle, asked, forced, half) if _safe(c, bundle, asked, forced)]
    if not found:
        raise BundleError(
            f"bundle {bundle.path} has only packages compiled elsewhere, which are native code",
            fix="ask for device aoti, if you trust whoever made it",
        )
    gpus = _TARGETS["gpu"]
    if cpu_fallback or asked not in ("auto", *gpus):
        return found
    return [c for c in found if c.provider in gpus] or found


def _safe(placement: Placement, bundle: Bundle, asked: str, forced: Variant | None) -> bool:
    """Say whether a variant is a graph, or a package compiled here, or one asked for by name."""
    variant = placement.variant
    if variant.format != "torch-aoti" or asked == "aoti" or variant is forced:
        return True
    return trusted(str(bundle.manifest.files.get(variant.file, {}).get("sha256", "")))


def _all(bundle: Bundle, asked: str, forced: Variant | None, half: bool) -> list[Placement]:
    wanted = _wanted(bundle, asked, forced, half)
    if asked not in ("auto", "torch") and not any(c.provider == asked for c in wanted):
        raise _nothing_for(bundle, asked, forced)
    others: list[Placement] = []
    for provider in AUTO_ORDER:
        found = _of_provider(bundle, provider, half)
        if provider == "openvino":
            # Its reader of ONNX graphs is for when ONNX Runtime is not there.
            foreign = [c for c in found if c.variant.format != "openvino"]
            found = [c for c in found if c.variant.format == "openvino"]
        others += found
    others = _by_speed(others + foreign)
    usable = [c for c in others if installed(c.provider)]
    unique: dict[tuple[str, str], Placement] = {}
    for candidate in [*wanted, *usable]:
        unique.setdefault((candidate.provider, candidate.variant.name), candidate)
    ranked = list(unique.values()) or others
    if not ranked:
        raise BundleError(
            f"bundle {bundle.path} has nothing to run", fix=f"run: memopt export {bundle.path}"
        )
    return ranked


def _wanted(bundle: Bundle, asked: str, forced: Variant | None, half: bool) -> list[Placement]:
    """Return what was asked for by name, or tuned here: told about even if it is not installed."""
    if asked == "torch":
        return [Placement("torch", forced or _REFERENCE)]
    if forced is not None:
        able = [Placement(p, forced) for p in _order(asked, forced) if runnable(forced, p)]
        here = [c for c in able if c.provider == asked or installed(c.provider)]
        wanted = here or able[-1:]
        # When its graph is what fails, a float one on the same provider is the nearest.
        return [*wanted, *(_of_provider(bundle, wanted[-1].provider, half) if wanted else [])]
    tuned = _tuned(bundle, asked)
    named = _of_provider(bundle, asked, half) if asked != "auto" else []
    return [*([tuned] if tuned else []), *named]


def runnable(variant: Variant, provider: str) -> bool:
    """Return whether ``provider`` can read the graph of ``variant``.

    >>> from memopt.bundle import Variant
    >>> fused = Variant(name="f", format="onnx", precision="fp32", file="m.onnx", fused=True)
    >>> runnable(fused, "cpu"), runnable(fused, "openvino")
    (True, False)
    """
    row = PROVIDERS[provider]
    if variant.format not in row.formats or variant.precision not in row.precisions:
        return False
    if variant.target in _TARGETS and provider not in _TARGETS[variant.target]:
        return False
    return row.fused or not variant.fused


def of_task(variant: Variant, bundle: Bundle) -> bool:
    """Return whether a variant answers the bundle's own task, not that of a second tower.

    Older bundles do not say a variant's task: there its inputs tell. One that does not say what it
    takes either is believed to.
    """
    if variant.task and variant.task != bundle.manifest.task:
        return False
    if bundle.task.answer == "any":
        return True  # of a graph that memopt makes no inputs for
    wanted = _INPUTS.get(bundle.manifest.modality)
    return not variant.inputs or wanted is None or bool(wanted & set(variant.inputs))


def _of_provider(bundle: Bundle, provider: str, half: bool) -> list[Placement]:
    """Return the variants for one provider, best first: its own format, float, fused."""
    row = PROVIDERS[provider]
    ranks = {name: rank for rank, name in enumerate(row.precisions)}
    if not half and ranks["fp16"] < ranks["fp32"]:
        ranks["fp16"], ranks["fp32"] = ranks["fp32"], ranks["fp16"]
    usable = [
        v
        for v in bundle.manifest.variants.values()
        if v.passed and runnable(v, provider) and of_task(v, bundle)
    ]
    # Quantized variants come after float ones until `memopt optimize` measured them on a processor
    # like this: without that nobody knows that they are faster, or as right, here.
    usable.sort(
        key=lambda v: (
            -(measured_speed(v, provider) or 0.0),
            row.formats.index(v.format),
            ranks[v.precision],
            not v.fused,
            v.name,
        )
    )
    return [Placement(provider, v) for v in usable]


def measured_speed(variant: Variant, provider: str) -> float | None:
    """Return the inputs per second measured on ``provider`` of a machine like this, None if never.

    Other instruction sets make it another measurement; another number of cores changes all alike.
    """
    record = variant.benchmark or {}
    device, speed = record.get("device"), record.get("items_per_second")
    if device not in DEVICES or canonical(str(device)) != provider or not speed:
        return None
    return float(speed) if covers(str(record.get("machine", ""))) else None


def _by_speed(others: list[Placement]) -> list[Placement]:
    """Put the CPU's measured candidates before its others, the fastest of all providers first."""

    def on_host(c: Placement) -> bool:
        return c.provider in ("openvino", "cpu") or c.variant.options.get("device") == "cpu"

    hosts = [c for c in others if on_host(c)]
    hosts.sort(key=lambda c: -(measured_speed(c.variant, c.provider) or 0.0))
    hosts.sort(key=lambda c: c.provider == "aoti" and not measured_speed(c.variant, "aoti"))
    return [c for c in others if not on_host(c)] + hosts


def _order(asked: str, variant: Variant) -> list[str]:
    # An ONNX variant belongs to ONNX Runtime; OpenVINO's reader is for where that is not.
    foreign = variant.format != "openvino" and installed("cpu")
    rest = [p for p in AUTO_ORDER if p != "openvino" or not foreign]
    return rest if asked == "auto" else [asked, *(p for p in rest if p != asked)]


def tuned_record(bundle: Bundle) -> dict[str, object]:
    """Return what `memopt optimize` or tune_streams remembered for this machine, {} if nothing."""
    record = bundle.manifest.chosen.get(machine_key())
    return dict(record) if isinstance(record, dict) else {}


def tuned_elsewhere(bundle: Bundle) -> str | None:
    """Return where `memopt optimize` measured, in words; None where it was here, or nowhere.

    A choice is of one processor: it is not taken on another, and whoever asks is told so.
    """
    key = machine_key()
    others = [name for name, record in bundle.manifest.chosen.items() if isinstance(record, dict)]
    return None if key in others or not others else f"{others[-1]}, not on this processor"


def tuned_single(bundle: Bundle) -> Placement | None:
    """Return what `memopt optimize` measured as fastest for one input on this machine."""
    record = tuned_record(bundle).get("single")
    placement = _chosen(bundle, record) if isinstance(record, dict) else None
    safe = placement is not None and _safe(placement, bundle, "auto", None)
    return placement if safe else None


def tuned_settings(
    bundle: Bundle, candidate: Placement, settings: Settings, *, single: bool = False
) -> Settings:
    """Return settings with what was measured here as best for a placement, where nothing is said.

    Args:
        single: for requests of one input, where other options were better for those.
    """
    record = tuned_record(bundle)
    name = str(candidate)

    def known(what: str) -> Any:
        values = record.get(what)
        return values.get(name) if isinstance(values, dict) else None

    found: dict[str, Any] = {}
    for what in ("streams", "threads"):
        count = known(what)
        if getattr(settings, what) is None and isinstance(count, int) and count > 0:
            found[what] = count
    # Measured with nothing beside it. Where less was best, what is usual costs a few percent there,
    # and gains a tenth where threads of one batch would wait for each other.
    usual = usual_streams(settings.threads or usable_cpus())
    if settings.shares_cores and found.get("streams", usual) < usual:
        del found["streams"]
    if settings.openvino_options is None:
        options, alone = known("options"), record.get("single")
        if single and isinstance(alone, dict) and "options" in alone:
            options = alone["options"]
        told = options if isinstance(options, dict) else {}
        found["openvino_options"] = {str(key): str(value) for key, value in told.items()}
    return replace(settings, **found)


def _tuned(bundle: Bundle, asked: str) -> Placement | None:
    """Return the choice of `memopt optimize` for this machine when it fits what was asked."""
    chosen = _chosen(bundle, tuned_record(bundle))
    return chosen if chosen is None or asked in ("auto", chosen.provider) else None


def _chosen(bundle: Bundle, record: Mapping[str, object]) -> Placement | None:
    """Return the placement that a record names, None where this bundle cannot be run so."""
    name, device = record.get("variant"), record.get("device")
    if not isinstance(name, str) or not isinstance(device, str) or device not in PROVIDERS:
        return None
    variant = bundle.manifest.variants.get(name)
    if variant is None or not variant.passed or not runnable(variant, device):
        return None
    if not of_task(variant, bundle):
        return None
    return Placement(device, variant)


def _nothing_for(bundle: Bundle, asked: str, forced: Variant | None) -> DeviceError:
    if forced is not None:
        able = [p for p in PROVIDERS if runnable(forced, p)]
        return DeviceError(
            f"variant {forced.name!r} cannot run on {asked}", fix=nearest(asked, able)
        )
    names = ", ".join(bundle.manifest.variants)
    return DeviceError(
        f"no variant of {bundle.path} runs on {asked} (there are: {names})",
        fix=f"run: memopt export {bundle.path}",
    )
