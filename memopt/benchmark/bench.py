"""What ``memopt bench`` does: choose contenders and inputs, run them, compare two records."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memopt.benchmark.peers import (
    PEER_PYTHON,
    PEERS,
    Contender,
    peer_contenders,
    peer_python,
)
from memopt.benchmark.profile import profile
from memopt.benchmark.record import BenchmarkMetrics
from memopt.benchmark.runner import run
from memopt.benchmark.workload import default_inputs, read_inputs
from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError, ConfigurationError, InputError, MemoptError
from memopt.progress import Step, silent
from memopt.registry import check_names
from memopt.runtimes.profile import Profile
from memopt.runtimes.providers import AUTO_ORDER, canonical, installed
from memopt.runtimes.selection import runnable
from memopt.runtimes.text import takes_pairs
from memopt.tasks.quality import misses


def bench(
    path: str | Path,
    *,
    variants: Sequence[str] | None = None,
    device: str = "auto",
    inputs: Path | None = None,
    count: int = 1000,
    rounds: int = 5,
    singles: int = 200,
    peers: Sequence[str] = (),
    on_step: Step = silent,
) -> list[BenchmarkMetrics]:
    """Measure variants of a bundle, and peers, in one run; cosines are against its float graph.

    Args:
        path: bundle folder or name.
        variants: names, or "auto"; None measures all that passed their gate and can run here.
        inputs: a file of texts, or a folder of images or sounds; None takes seeded default inputs
            of the bundle's modality.
        count: how many inputs at most.
        peers: any of sentence-transformers, fastembed, optimum; installed on first use.

    Raises:
        BundleError: no such bundle or variant, or nothing exported yet.
        ConfigurationError: peers for a non-text bundle, or a bundle of no encoder.
        InputError: inputs that cannot be read.
    """
    bundle = _encoder(path)
    names = list(variants) if variants else _passed_here(bundle, canonical(device), on_step)
    for name in names:
        if name != "auto":
            bundle.variant(name)
    items = _inputs(bundle, inputs, count)
    contenders = [_contender(bundle, name, device) for name in names]
    if peers:
        contenders += _peers(bundle, list(peers), on_step)
    return run(
        contenders,
        items,
        rounds=rounds,
        singles=singles,
        on_step=on_step,
        reference=_reference(bundle, contenders[0]),
        origin=str(inputs.absolute()) if inputs else "",
        task=bundle.manifest.task,
        config=bundle.config(),
    )


def profiles(
    path: str | Path,
    variants: Sequence[str] | None,
    *,
    device: str = "auto",
    inputs: Path | None = None,
    count: int = 1000,
    on_step: Step = silent,
) -> list[Profile]:
    """Tell of each variant where the time of one input goes; arguments as of :func:`bench`.

    Raises:
        ConfigurationError: a variant whose runtime has no profiler here.
        BundleError, InputError: as of :func:`bench`.
    """
    bundle = _encoder(path)
    items = _inputs(bundle, inputs, count)
    found = []
    for name in variants or _passed_here(bundle, canonical(device), on_step):
        on_step(f"profile {name}")
        found.append(profile(bundle, name, device, items))
    return found


def _passed_here(bundle: Bundle, device: str, say: Step) -> list[str]:
    """Return the variants that passed their gate and that something installed here can run."""
    hosts = [p for p in AUTO_ORDER if installed(p)] if device == "auto" else [device]
    passed = [v for v in bundle.manifest.variants.values() if v.passed]
    able = [v.name for v in passed if any(runnable(v, host) for host in hosts)]
    if not able:
        raise BundleError(
            f"no variant of {bundle.path} that passed its gate can run here",
            fix="run: memopt doctor",
        )
    left = [v.name for v in passed if v.name not in able]
    if left:
        say(f"left out, nothing installed here runs them: {', '.join(left)}")
    return able


def _encoder(path: str | Path) -> Bundle:
    bundle = open_bundle(path)
    if not bundle.task.engine or bundle.task.answer in ("any", "text"):
        raise ConfigurationError(
            f"{bundle.path} has task {bundle.manifest.task}, of which bench has no measure",
            fix="give the bundle of another task",
        )
    if not bundle.manifest.variants:
        raise BundleError(
            f"{bundle.path} has no variant to measure", fix=f"run: memopt export {bundle.path}"
        )
    return bundle


def _inputs(bundle: Bundle, file: Path | None, count: int) -> list[Any]:
    if file is None:
        return default_inputs(bundle.manifest, count, pairs=takes_pairs(bundle))
    return read_inputs(file, bundle.manifest.modality, count, pairs=takes_pairs(bundle))


def _contender(bundle: Bundle, variant: str, device: str) -> Contender:
    path = str(bundle.path.absolute())
    spec = {"kind": "memopt", "path": path, "variant": variant, "device": device}
    return Contender(label=f"memopt {variant}", spec=spec)


def _reference(bundle: Bundle, first: Contender) -> Contender | None:
    """Return the float graph whose vectors are the right ones, None when `first` is that."""
    for name in ("onnx-fp32-fused", "onnx-fp32", "openvino-fp32"):
        variant = bundle.manifest.variants.get(name)
        for device in ("cpu", "openvino"):
            if variant is None or not runnable(variant, device) or not installed(device):
                continue
            made = _contender(bundle, name, device)
            same = all(made.spec[key] == first.spec.get(key) for key in ("path", "variant"))
            return None if same else made
    return None


def compare(
    first: Path,
    second: Path,
    *,
    rounds: int = 5,
    singles: int = 200,
    pythons: Sequence[str] = (),
    on_step: Step = silent,
) -> list[BenchmarkMetrics]:
    """Measure the contenders of two records again, in alternating rounds of one run.

    Two runs at different times differ by the machine's mood as much as by the code, so the ratio
    of two old numbers says little; the records are used for what was measured, not for how fast.

    Args:
        pythons: interpreters that a record may name beside this one and the peers' one here.

    Raises:
        InputError: a file that is no record, or one that names another interpreter.
        BundleError: a bundle that is gone.
    """
    records = [BenchmarkMetrics.load(first), BenchmarkMetrics.load(second)]
    workloads = {(record.inputs, record.items) for record in records}
    if len(workloads) > 1:
        told = " and ".join(f"{count} of {file or 'seeded inputs'}" for file, count in workloads)
        raise InputError(
            f"{first} and {second} were measured on different inputs: {told}",
            fix="measure both with the same --inputs and --count",
        )
    known = {sys.executable, str(PEER_PYTHON.absolute()), *pythons}
    for path, record in zip((first, second), records, strict=True):
        if record.python not in known:  # a record may come from anybody, and this would be run
            raise InputError(
                f"{path} was measured with {record.python}, neither this Python nor the peers'",
                fix=f"if you trust it: --python {shlex.quote(record.python)}",
            )
    contenders = [
        Contender(label=record.label, spec=dict(record.spec), python=record.python)
        for record in records
    ]
    if contenders[0].label == contenders[1].label:
        names = (first.name, second.name) if first.name != second.name else ("first", "second")
        contenders = [
            replace(contender, label=f"{contender.label} ({name})")
            for contender, name in zip(contenders, names, strict=True)
        ]
    ours = [c.spec["path"] for c in contenders if c.spec.get("kind") == "memopt"]
    if not ours:
        raise InputError(
            f"{first} and {second} are both of peers", fix="one must be of a bundle of memopt"
        )
    bundle = _encoder(ours[0])
    origin = records[0].inputs
    return run(
        contenders,
        _inputs(bundle, Path(origin) if origin else None, records[0].items),
        rounds=rounds,
        singles=singles,
        on_step=on_step,
        reference=_reference(bundle, contenders[0]),
        origin=origin,
        task=bundle.manifest.task,
        config=bundle.config(),
    )


def below_gate(records: Sequence[BenchmarkMetrics]) -> list[str]:
    """Return a line for each variant whose answers here are worse than the gate it passed."""
    lines = []
    for record in records:
        path, name = record.spec.get("path"), record.spec.get("variant")
        name = record.compared if name == "auto" else name
        if record.spec.get("kind") != "memopt" or record.nearness is None:
            continue
        variant = open_bundle(str(path)).manifest.variants.get(str(name))
        gate = ((variant and variant.validation) or {}).get("gate", {})
        if variant and variant.passed and gate:
            missed = misses(record.measures, gate.get("bounds") or {})
            lines += [f"{name} passed its gate on its validation set; here {m}" for m in missed]
        bound, cosine = gate.get("min_cosine"), record.cosine_min
        if cosine is None or bound is None:
            continue
        if variant and variant.passed and cosine < bound:
            lines.append(
                f"{name} passed {bound:g} on its validation set and has {cosine:.4f} "
                "here: if these inputs are yours, calibrate and prove it with inputs like them"
            )
    return lines


def _peers(bundle: Bundle, names: list[str], say: Step) -> list[Contender]:
    check_names("peer", names, PEERS)
    if bundle.manifest.task != "embedding":
        raise ConfigurationError(
            f"peers embed text, {bundle.path} is of task {bundle.manifest.task}",
            fix="leave --peers out; device torch gives the reference",
        )
    say("the peers' own environment: about 2 GB in .peers, minutes on first use")
    python = peer_python()
    say("the peers' own exports (a minute on first use)")
    folder = peer_model(bundle, python)
    return peer_contenders(names, bundle, folder, python)


def peer_model(bundle: Bundle, python: str, home: Path = Path(".peers")) -> Path:
    """Return the model as sentence-transformers' own tools make it: torch, ONNX, int8, OpenVINO.

    Made once per weight file from the bundle's weights, in ``<home>/models``.
    """
    from memopt.weights.convert import to_safetensors

    key = bundle.manifest.files["weights.parquet"]["sha256"][:16]
    folder = home / "models" / f"{bundle.manifest.name}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        staged = Path(name) / "model"
        ignore = shutil.ignore_patterns("onnx", "openvino", "*.parquet", "memopt.json", ".*")
        shutil.copytree(bundle.path, staged, ignore=ignore)
        to_safetensors(bundle, staged / "model.safetensors")
        script = Path(__file__).with_name("peer_models.py")
        command = [python, "-P", str(script), str(staged)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise MemoptError(f"the peers could not export {bundle.manifest.name}: {last}")
        staged.rename(folder)
    return folder
