"""What ``memopt bench`` does: choose contenders and inputs, run them, compare two records."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from memopt.benchmark.peers import Contender, peer_contenders, peer_python
from memopt.benchmark.runner import BenchmarkMetrics, run
from memopt.benchmark.workload import default_inputs, read_texts
from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError, MemoptError
from memopt.runtimes.providers import missing
from memopt.runtimes.selection import runnable

Step = Callable[[str], None]


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
    on_step: Step | None = None,
) -> list[BenchmarkMetrics]:
    """Measure variants of a bundle, and peers, in one run; cosines are against its float graph.

    Args:
        path: bundle folder or name.
        variants: names, or "auto"; None measures all that passed their gate.
        inputs: a text file; None takes seeded default inputs of the bundle's modality.
        count: how many inputs at most.
        peers: any of sentence-transformers, fastembed, optimum; installed on first use.

    Raises:
        BundleError: no such bundle or variant. ConfigurationError: peers for a non-text bundle.
    """
    bundle = open_bundle(path)
    names = (
        list(variants)
        if variants
        else [name for name, variant in bundle.manifest.variants.items() if variant.passed]
    )
    for name in names:
        if name != "auto":
            bundle.variant(name)
    texts = read_texts(inputs, count) if inputs else default_inputs(bundle.manifest, count)
    contenders = [
        Contender(
            label=f"memopt {name}",
            spec={
                "kind": "memopt",
                "path": str(bundle.path.absolute()),
                "variant": name,
                "device": device,
            },
        )
        for name in names
    ]
    if peers:
        contenders += _peers(bundle, list(peers))
    return run(
        contenders,
        texts,
        rounds=rounds,
        singles=singles,
        on_step=on_step,
        reference=_reference(bundle, contenders[0]),
    )


def _reference(bundle: Bundle, first: Contender) -> Contender | None:
    """Return the float graph whose vectors are the right ones, None when `first` is that."""
    for name in ("onnx-fp32-fused", "onnx-fp32", "openvino-fp32"):
        variant = bundle.manifest.variants.get(name)
        for device in ("cpu", "openvino"):
            if variant is None or not runnable(variant, device) or missing(device) is not None:
                continue
            spec = {
                "kind": "memopt",
                "path": str(bundle.path.absolute()),
                "variant": name,
                "device": device,
            }
            same = (spec["path"], name) == (first.spec["path"], first.spec.get("variant"))
            return None if same else Contender(label=f"memopt {name}", spec=spec)
    return None


def compare(
    first: Path,
    second: Path,
    *,
    rounds: int = 5,
    singles: int = 200,
    on_step: Step | None = None,
) -> list[BenchmarkMetrics]:
    """Measure the contenders of two records again, in alternating rounds of one run.

    Two runs at different times differ by the machine's mood as much as by the code, so the ratio
    of two old numbers says little; the records are used for what was measured, not for how fast.

    Raises:
        InputError: a file that is no record. BundleError: a bundle that is gone.
    """
    records = [BenchmarkMetrics.load(first), BenchmarkMetrics.load(second)]
    contenders = [
        Contender(label=record.label, spec=dict(record.spec), python=record.python)
        for record in records
    ]
    if contenders[0].label == contenders[1].label:
        contenders = [
            Contender(label=f"{c.label} ({path.name})", spec=c.spec, python=c.python)
            for c, path in zip(contenders, (first, second), strict=True)
        ]
    bundle = open_bundle(records[0].spec["path"])
    texts = default_inputs(bundle.manifest, records[0].items)
    return run(
        contenders,
        texts,
        rounds=rounds,
        singles=singles,
        on_step=on_step,
        reference=_reference(bundle, contenders[0]),
    )


def _peers(bundle: Bundle, names: list[str]) -> list[Contender]:
    if bundle.manifest.modality != "text":
        raise ConfigurationError(
            f"peers embed text, {bundle.path} is an {bundle.manifest.modality} model",
            fix="leave --peers out; device torch gives the reference",
        )
    python = peer_python()
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
