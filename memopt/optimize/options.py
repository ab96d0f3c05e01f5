"""Which open options suit a placement on this processor: measured and judged, never assumed."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from memopt.benchmark.record import BenchmarkMetrics
from memopt.benchmark.runner import run
from memopt.bundle import Manifest, Variant, open_bundle
from memopt.optimize.judge import REFERENCE, ROUND_SECONDS, contender, gated
from memopt.optimize.plan import Candidate, Outcome, Plan
from memopt.progress import Step
from memopt.quantization.accuracy.gate import Gate
from memopt.runtimes.cpu import BF16, cpu_features, machine_key, physical_cores, usable_cpus
from memopt.runtimes.providers import canonical

# Others than the graph's own must win by this much: within it the noise of a machine decides.
MARGIN = 1.03
# Options of its own for one input are the graph once more in memory: they must win by more.
SECOND_MARGIN = 1.1
# Each way of opening is a process; of so many single inputs and rounds a median is good enough.
SINGLES, ROUNDS = 40, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """One way to open a graph: OpenVINO's properties over the graph's own, and threads.

    >>> str(OpenOptions()), str(OpenOptions(properties={"SNIPPETS_MODE": "ENABLE"}, threads=4))
    ('as it is', 'SNIPPETS_MODE=ENABLE, 4 threads')
    """

    properties: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None

    def __str__(self) -> str:
        told = [f"{name}={value}" for name, value in self.properties.items()]
        told += [f"{self.threads} threads"] if self.threads else []
        return ", ".join(told) or "as it is"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionsTuning:
    """What was measured of a placement: the best way to open it for batches and for one input.

    Attributes:
        second: for one input, where it would be opened beside ``batches``.
        cosine_min: by way, where vectors were compared.
        notes: how fast each way was, and why one was left out.
    """

    batches: OpenOptions
    single: OpenOptions
    second: OpenOptions
    cosine_min: Mapping[str, float | None]
    notes: tuple[str, ...] = ()


def combinations(
    variant: Variant, device: str, features: Collection[str], cores: int, physical: int
) -> tuple[OpenOptions, ...]:
    """Return the ways to open a variant that are worth measuring, as it is first.

    Args:
        device: a device name of the runtime.
        features: CPU features as ``memopt doctor`` names them.
        cores: usable ones, second threads of a core too.
        physical: those among them that are no second threads.

    >>> v = Variant(name="v", format="openvino", precision="int8", file="v.xml")
    >>> [str(way) for way in combinations(v, "openvino", (), 4, 2)]
    ['as it is', 'SNIPPETS_MODE=DISABLE', 'ENABLE_CPU_PINNING=YES', '2 threads']
    """
    ways = [OpenOptions()]
    provider = canonical(device)
    if provider == "openvino":
        own = dict(variant.options)
        precision, snippets = own.get("INFERENCE_PRECISION_HINT", "f32"), own.get("SNIPPETS_MODE")
        precisions = [precision] + (["bf16"] if BF16 & set(features) else [])
        for hint in dict.fromkeys(precisions):
            for mode in ("ENABLE", "DISABLE"):
                told = {} if hint == precision else {"INFERENCE_PRECISION_HINT": hint}
                told |= {} if mode == (snippets or "ENABLE") else {"SNIPPETS_MODE": mode}
                if told:
                    ways.append(OpenOptions(properties=told))
        # Not where it fails: then it is left out with the reason.
        ways.append(OpenOptions(properties={"ENABLE_CPU_PINNING": "YES"}))
    if provider in ("openvino", "cpu") and physical < cores:
        ways.append(OpenOptions(threads=physical))
    return tuple(ways)


def tune_options(
    path: Path,
    name: str,
    device: str,
    inputs: Sequence[Any],
    gate: Gate,
    *,
    deadline: float | None,
    say: Step,
) -> OptionsTuning | None:
    """Measure the ways to open a variant in one run, rounds in turn; None: there is only one.

    Another precision gives other answers, so each way is judged by the gate with its own.

    Args:
        path: the bundle.
        name, device: the variant, and where it is opened.
        inputs: not used for calibration.
        deadline: of ``time.monotonic``; past it one round is measured.

    Raises:
        MemoptError: the graph as it is cannot be opened.
    """
    bundle = open_bundle(path)
    cores = usable_cpus()
    ways = combinations(bundle.variant(name), device, cpu_features(), cores, physical_cores())
    if len(ways) == 1:
        return None
    contenders = []
    for way in ways:
        made = contender(path, str(way), name, device)
        spec = made.spec | {"openvino_options": dict(way.properties)}
        spec["threads"] = way.threads or spec["threads"]
        contenders.append(replace(made, spec=spec))
    failed: dict[str, str] = {}
    records = run(
        contenders,
        inputs,
        rounds=ROUNDS,
        singles=SINGLES,
        round_seconds=ROUND_SECONDS,
        on_step=lambda line: say(f"open options of {name}: {line}"),
        failures=failed,
        deadline=deadline,
        reference=contender(path, "reference", REFERENCE, "cpu"),
        task=bundle.manifest.task,
        config=bundle.config(),
    )
    right, notes = [], [f"{name} with {way}: {why}" for way, why in failed.items()]
    known = {str(way): way for way in ways}
    for record in records:
        outcome = Outcome(
            candidate=Candidate(name=name, kind="export", device=device), status="kept", reason=""
        )
        judged = gated(outcome, record, gate)
        # As it is it has passed, on more inputs than these may be.
        if judged.status == "kept" or record.label == str(ways[0]):
            right.append(record)
        else:
            notes.append(f"{name} with {record.label}: {judged.reason}")
    notes.append(f"{name} on {device}, {_gains(records)}")
    batches = fastest({r.label: r.rounds_seconds for r in right})
    latencies = {r.label: r.rounds_latency_ms for r in right}
    others = {label: times for label, times in latencies.items() if label != batches}
    return OptionsTuning(
        batches=known[batches],
        single=known[fastest(latencies)],
        second=known[fastest({batches: latencies[batches], **others}, SECOND_MARGIN)],
        cosine_min={r.label: r.cosine_min for r in records},
        notes=tuple(notes),
    )


def _gains(records: Sequence[BenchmarkMetrics]) -> str:
    """Return how many times as fast each way is as the first, for batches and for one input."""
    first = records[0]

    def gain(mine: Sequence[float], base: Sequence[float]) -> str:
        return f"{median(b / a for a, b in zip(mine, base, strict=False)):.2f}x"

    told = [
        f"{r.label} {gain(r.rounds_seconds, first.rounds_seconds)} and "
        f"{gain(r.rounds_latency_ms, first.rounds_latency_ms)}"
        for r in records[1:]
    ]
    return "batches and one input against the graph as it is: " + "; ".join(told)


def fastest(times: Mapping[str, Sequence[float]], margin: float = MARGIN) -> str:
    """Return the label with the least paired times; the first one unless another is really faster.

    That is: by ``margin`` at the median of the pairs, and in every pair but one.

    >>> fastest({"as it is": [2.0, 4.0, 2.0], "a": [1.0, 2.0, 3.0], "b": [1.99, 3.9, 1.99]})
    'a'
    >>> fastest({"as it is": [2.0, 4.0, 2.0], "b": [1.99, 3.9, 1.99]})
    'as it is'
    """
    first = next(iter(times))
    best, most = first, margin
    for label, mine in times.items():
        gains = sorted(a / b for a, b in zip(times[first], mine, strict=False))
        if gains and median(gains) > most and gains[min(1, len(gains) - 1)] > 1:
            best, most = label, median(gains)
    return best


def remember_options(
    path: Path, plan: Plan, inputs: Sequence[Any], gate: Gate, deadline: float, say: Step
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Tune what a plan chose, and write what was better than its graph's own into the manifest.

    Returns:
        The properties by placement (``device:variant``; ``single device:variant`` where one input
        is answered with others than a batch), and notes: what was left out and why.
    """
    wanted = [(plan.chosen, plan.chosen_device), (plan.single, plan.single_device)]
    placements = dict.fromkeys((n, canonical(d)) for n, d in wanted if n and d)
    options: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    tuned: dict[tuple[str, str], OptionsTuning | None] = {}
    for name, device in placements:
        if time.monotonic() > deadline:
            notes.append(f"open options of {name} on {device} were not measured: the budget is up")
            continue
        tuned[name, device] = tune_options(
            path, name, device, inputs, gate, deadline=deadline, say=say
        )
    batches, *others = placements
    for (name, device), found in tuned.items():
        if found is None:
            continue
        notes += found.notes
        batch = (name, device) == batches and plan.prefer != "latency"
        best = found.batches if batch else found.single
        options[f"{device}:{name}"] = dict(best.properties)
        alone = batch and plan.single is not None and not others
        if alone and found.second.properties != best.properties and not found.second.threads:
            options[f"single {device}:{name}"] = dict(found.second.properties)
    threads = {
        f"{device}:{name}": best.threads
        for (name, device), found in tuned.items()
        if found and (best := found.batches if (name, device) == batches else found.single).threads
    }
    open_bundle(path).update(lambda manifest: _recorded(manifest, tuned, options, threads))
    return options, tuple(notes)


def _recorded(
    manifest: Manifest,
    tuned: Mapping[tuple[str, str], OptionsTuning | None],
    options: Mapping[str, Mapping[str, str]],
    threads: Mapping[str, int | None],
) -> Manifest:
    """Return the manifest with the options of this machine; what was measured now counts alone."""
    key = machine_key()
    record = dict(manifest.chosen.get(key) or {})
    labels = {f"{device}:{name}" for name, device in tuned}
    plain = {name: dict(told) for name, told in options.items() if name in labels}
    record["options"] = {**record.get("options", {}), **plain}
    known = {n: count for n, count in record.get("threads", {}).items() if n not in labels}
    if known or threads:
        record["threads"] = {**known, **threads}
    alone = [dict(told) for name, told in options.items() if name.startswith("single ")]
    if alone and isinstance(record.get("single"), dict):
        record["single"] = {**record["single"], "options": alone[0]}
    # What the answers are with other options is no longer what the variant's record says.
    worst = {
        label: found.cosine_min.get(str(OpenOptions(properties=options[label])))
        for (name, device), found in tuned.items()
        for label in (f"{device}:{name}", f"single {device}:{name}")
        if found is not None and options.get(label)
    }
    record.pop("options_cosine_min", None)
    if worst:
        record["options_cosine_min"] = worst
    return replace(manifest, chosen={**manifest.chosen, key: record})
