"""``memopt info``: the manifest as tables; ``--verify`` recomputes every hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memopt.commands.console import echo
from memopt.tasks.quality import MEASURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memopt.bundle import Bundle, Manifest


def info(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute every SHA-256; exit 1 when one differs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a bundle holds: variants, sizes, checks, hashes, history."""
    from memopt.bundle import open_bundle
    from memopt.errors import BundleError

    opened = open_bundle(bundle)
    problems = opened.verify() if verify else []
    if as_json:
        document: dict[str, Any] = json.loads(opened.manifest.to_json())
        document["path"] = str(opened.path)
        if verify:
            document["problems"] = problems
        echo(json.dumps(document, indent=1))
    else:
        _print(opened, verified=verify and not problems)
    if problems:
        raise BundleError(
            f"{opened.path} does not match its manifest: " + ", ".join(problems),
            fix="convert and export it again",
        )


def _print(bundle: Bundle, *, verified: bool) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    console = stdout(160)
    m = bundle.manifest
    console.print(
        f"{m.name}: {m.architecture} ({m.model_type}), {m.task}, dimension {m.dimension}, "
        f"pooling {m.pooling}, normalize {m.normalize}, max length {m.max_length}\n"
        f"from {m.source}"
    )
    variants = Table("variant", "file", "MB", "passed", "export check", "validation", "speed")
    chosen = {c.get("variant") for c in m.chosen.values()}
    single = {(c.get("single") or {}).get("variant") for c in m.chosen.values()}
    for variant in m.variants.values():
        variants.add_row(
            variant.name
            + (" *" if variant.name in chosen else "")
            + (" 1" if variant.name in single else ""),
            variant.file,
            f"{bundle.size(variant) / 1e6:.1f}",
            "yes" if variant.passed else "NO",
            _check(variant.check),
            _validation(variant.validation, m.validation),
            _speed(variant.benchmark, variant.validation),
        )
    for file, made in _weights(m).items():
        variants.add_row(
            "weights (V2)",
            file,
            f"{m.files[file]['bytes'] / 1e6:.1f}",
            "yes" if made.get("passed") else "NO",
            "-",
            _validation(made.get("validation"), m.validation),
            "-",
        )
    console.print(variants)
    for line in _choices(m):
        console.print(line)
    files = Table("file", "bytes", "sha256" + (" (verified)" if verified else ""))
    for name, record in m.files.items():
        files.add_row(name, f"{record['bytes']:,}", record["sha256"])
    console.print(files)
    history = Table("when", "what", "details")
    for event in m.history:
        rest = {k: v for k, v in event.items() if k not in ("at", "event") and v not in (None, [])}
        details = ", ".join(f"{k}={_short(v)}" for k, v in rest.items())
        history.add_row(str(event.get("at", "")), str(event.get("event", "")), details)
    console.print(history)


def _placed(choice: Mapping[str, Any], manifest: Manifest) -> str:
    gone = "" if choice["variant"] in manifest.variants else " (no longer here: another answers)"
    return f"{choice['variant']} on {choice.get('device')}{gone}"


def _choices(manifest: Manifest) -> list[str]:
    """Return a line for each machine that `memopt optimize` chose on, and whether it is this."""
    from memopt.runtimes.cpu import machine_key

    lines = []
    for machine, record in manifest.chosen.items():
        if not record.get("variant"):
            continue
        alone = record.get("single") or {}
        line = f"* chosen by memopt optimize: {_placed(record, manifest)}"
        if alone.get("variant"):
            line += f"; 1 for one input: {_placed(alone, manifest)}"
        told = [
            f"{placement} with {' '.join(f'{k}={v}' for k, v in options.items())}"
            for placement, options in (record.get("options") or {}).items()
            if options
        ]
        where = "on this processor" if machine == machine_key() else "not on this processor"
        lines.append("; ".join([line, *told, f"measured on {machine}, {where}"]))
    if lines and machine_key() not in manifest.chosen:
        lines.append(f"nothing was measured here: memopt optimize {manifest.name} measures again")
    return lines


def _check(check: Any) -> str:
    if not check:
        return "-"
    if "min_cosine" not in check:
        return "the imported graph as it is"
    return f"cosine {check['min_cosine']:.7f}, max error {check['max_abs_error']:.1e}"


def _validation(record: Any, proven_on: Any) -> str:
    if not record:
        return "-"
    named = (
        *(("min", "cosine_min"), ("elsewhere", "cosine_low"), ("mean", "cosine_mean")),
        ("spearman", "spearman"),
    )
    parts = [f"{label} {record[key]:.4f}" for label, key in named if record.get(key) is not None]
    if record.get("perplexity") is not None:
        parts.append(f"ppl {record['perplexity']:.2f}")
    bound = (record.get("gate") or {}).get("min_cosine")
    if bound is not None and record.get("cosine_min") is not None:
        parts[0] += f" (gate {bound:g})"
    bounds = (record.get("gate") or {}).get("bounds") or {}
    for name, measure in MEASURES.items():
        if record.get(name) is not None:
            least = bounds.get(name, measure.bound)
            gate = f" (gate {least:g})" if least is not None else ""
            parts.append(f"{name} {record[name]:.4f}{gate}")
    if proven_on and record.get("set_sha256") not in (None, proven_on.get("sha256")):
        parts.append("on another set")
    return ", ".join(parts) or "-"


def _speed(record: Any, validation: Any) -> str:
    if record:
        return f"{record['items_per_second']:,.0f}/s"
    # What quantizing measured, beside the float variant it started from.
    ratio = (validation or {}).get("speedup")
    return f"{ratio:.2f}x float" if ratio else "-"


def _weights(manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Return the quantized weight files that are there, each with what was recorded of it last."""
    events = [e for e in manifest.history if e.get("method") in ("arrow", "gguf")]
    made = {event["file"]: event for event in events}
    return {file: event for file, event in made.items() if file in manifest.files}


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
