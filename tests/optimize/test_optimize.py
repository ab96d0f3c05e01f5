"""optimize: candidates by machine, a replayable plan, and a choice that is measured and right."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memopt import ArrowEngine, Bundle, open_bundle
from memopt.commands.info import _choices
from memopt.errors import ConfigurationError, InputError
from memopt.optimize import options
from memopt.optimize.candidates import candidates
from memopt.optimize.judge import _as_at_home, choose, gated
from memopt.optimize.plan import Candidate, Optimized, Outcome, Plan, check_targets
from memopt.optimize.run import _differences, optimize
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.configured import seconds
from memopt.runtimes.cpu import BF16, cpu_features, machine_key
from memopt.sealing import KEY_VARIABLE, load_key
from memopt.weights.crypto import MAGIC
from memopt.weights.locked import encrypt_bundle

WORDS = [
    "rain",
    "sun",
    "boat",
    "tree",
    "stone",
    "river",
    "bread",
    "night",
    "train",
    "music",
    "market",
    "garden",
    "window",
]


def outcome(name: str, speed: float | None, cosine: float | None, size: int = 1) -> Outcome:
    candidate = Candidate(name=name, kind="export", device="cpu")
    status = "kept" if speed else "dropped"
    return Outcome(
        candidate=candidate,
        status=status,
        reason="",
        bytes=size,
        cosine_min=cosine,
        items_per_second=speed,
    )


def paired(name: str, rounds: tuple[float, ...], cosine: float) -> Outcome:
    return replace(outcome(name, 1 / sorted(rounds)[1], cosine), rounds_seconds=rounds)


def chosen(outcomes: list[Outcome]) -> str | None:
    return next((o.candidate.name for o in choose(outcomes) if o.status == "chosen"), None)


def test_candidates_follow_targets_and_instruction_sets() -> None:
    """bf16 is tried where the CPU has it; only the asked targets have candidates."""
    text: Any = SimpleNamespace(task="embedding")
    with_bf16 = [c.name for c in candidates(text, ["openvino"], {"avx512_bf16"})]
    without = [c.name for c in candidates(text, ["openvino"], {"avx2"})]
    assert "openvino-bf16" in with_bf16
    assert "openvino-bf16" not in without
    assert all(name.startswith("openvino") for name in with_bf16)
    on_cuda = candidates(text, ["cuda"], set())
    assert {c.device for c in on_cuda} == {"cuda"}
    assert {"onnx-int8-weight-only", "onnx-int4-weight-only"} < {c.name for c in on_cuda}
    # A graph of the other runtime would make answers depend on the batch.
    both = candidates(text, ["cpu", "openvino"], {"avx512_vnni"})
    assert all(c.name.startswith("openvino-") == (c.device == "openvino") for c in both)
    writers = candidates(SimpleNamespace(task="text-generation"), ["cpu"], set())  # type: ignore[arg-type]
    assert writers[0].name == "onnx-fp32-fused"
    assert {c.device for c in writers} == {"cpu"}
    assert len({c.name for c in writers}) == len(writers)
    made = {"event": "convert", "kept": {"float": 61, "int4": 210, "int8": 1}}
    of_gguf: Any = SimpleNamespace(task="text-generation", history=({"event": "export"}, made))
    own = {c.name for c in candidates(of_gguf, ["cpu"], set())} - {c.name for c in writers}
    assert own == {"onnx-int4-weight-only-stored"}
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
    fine = [c for c in candidates(of_gguf, ["cpu"], set(), names) if c.name.endswith("-mixed")]
    kept = {tuple(candidate.settings["keep_int8"]) for candidate in fine}
    assert kept == {("*lm_head*", "*down_proj*")}


def test_the_fastest_wins_unless_speeds_are_the_same() -> None:
    """Within the noise the better answers win; a dropped candidate never does."""
    assert chosen([outcome("a", 100, 0.999), outcome("b", 200, 0.99)]) == "b"
    assert chosen([outcome("a", 198, 0.999), outcome("b", 200, 0.99)]) == "a"
    assert chosen([outcome("a", 198, 0.99, size=9), outcome("b", 200, 0.99, size=3)]) == "b"
    assert chosen([outcome("a", None, None)]) is None
    assert chosen([outcome("a", 200, 0.99), outcome("b", 202, 0.9901)]) == "a"


def test_paired_rounds_decide_between_similar_speeds() -> None:
    """Some percent slower in every round is slower; one that won a round may be as fast."""
    fast = paired("fast", (1.0, 1.0, 1.0), 0.99)
    assert chosen([fast, paired("right", (1.1, 1.1, 1.1), 0.999)]) == "fast"
    assert chosen([fast, paired("right", (0.9, 1.1, 1.1), 0.999)]) == "right"
    assert chosen([fast, paired("right", (0.9, 2.0, 2.0), 0.999)]) == "fast"


def test_a_graph_is_no_better_elsewhere_than_where_it_was_made_for() -> None:
    """Failing the gate at home drops it on a second device too: the manifest has one verdict."""
    home = replace(outcome("a", 100, 0.9), status="dropped", reason="min cosine")
    away = replace(
        outcome("a", 200, 0.99),
        candidate=Candidate(name="a", kind="export", device="openvino"),
    )
    dropped = _as_at_home([home, away])[1]
    assert dropped.status == "dropped"
    assert "a on cpu" in dropped.reason


def test_a_plan_reads_back_and_strangers_are_refused(tmp_path: Path) -> None:
    """JSON and back is the identity; a newer version, foreign keys and garbage are named."""
    plan = Plan(
        source="minilm",
        min_cosine=0.98,
        samples=10,
        seed=1,
        candidates=(Candidate(name="x", kind="export", device="cpu", settings={"format": "onnx"}),),
    )
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    for raw in (
        {**asdict(plan), "version": 99},
        {**asdict(plan), "colour": "red"},
        {**asdict(plan), "min_cosine": 7},
        {**asdict(plan), "min_cosine": True},
        {**asdict(plan), "machine": "mine"},
        {**asdict(plan), "gate": {"agreement": "high"}},
        {**asdict(plan), "options": {"cpu:onnx-fp32": 3}},
        {**asdict(plan), "chosen": 3},
        {**asdict(plan), "candidates": [{"name": "x", "kind": "export", "device": "cda"}]},
        {**asdict(plan), "candidates": [{"name": "x", "kind": "quantize", "device": "cpu"}]},
        {"version": 1},
        [],
    ):
        path.write_text(json.dumps(raw))
        with pytest.raises(ConfigurationError, match=r"plan\.json"):
            Plan.load(path)


@pytest.mark.parametrize("text", ["", "0", "-1m", "soon", "nan", "m"])
def test_a_budget_must_be_a_duration(text: str) -> None:
    """Anything that is not a positive time is refused with examples."""
    with pytest.raises(ConfigurationError, match="write 90s"):
        seconds(text)


def test_an_unknown_target_names_the_nearest() -> None:
    """A typo is answered with what there is."""
    with pytest.raises(ConfigurationError, match="did you mean 'openvino'"):
        check_targets("cpu,openvno")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    lines = [
        f"the {WORDS[i % 13]} and the {WORDS[(i * 5 + 3) % 13]} number {i} " + "again " * (i % 7)
        for i in range(90)
    ]
    path.write_text("\n".join(lines))
    return path


def run(bundle: Bundle, data: Path, **options: Any) -> Optimized:
    return optimize(bundle.path, data, samples=40, rounds=1, **options)


@pytest.mark.slow  # minutes; the encrypted bundle's goes the same way
@pytest.mark.parametrize("source", ["tiny", "minilm"])
def test_optimize_leaves_a_bundle_whose_auto_is_the_choice(
    source: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The choice is the fastest that passes; auto opens it; a second call builds nothing anew."""
    made: Bundle = request.getfixturevalue(source)
    copied = Path(shutil.copytree(made.path, tmp_path / source))
    bundle = open_bundle(copied)
    result = run(bundle, data, min_cosine=0.9, targets=("openvino",))
    best = next(o for o in result.outcomes if o.status == "chosen")
    measured = [o for o in result.outcomes if o.items_per_second]
    assert best.cosine_min is not None
    assert best.cosine_min >= 0.9
    fastest = max(o.items_per_second or 0 for o in measured if o.status != "dropped")
    assert (best.items_per_second or 0) * 1.03 >= fastest
    with ArrowEngine(bundle.path) as engine:
        assert engine.device_info()["variant"] == best.candidate.name
        assert not engine.events
    page = (bundle.path / "optimize.html").read_text()
    own = re.sub("<script>.*?</script>", "", page, flags=re.DOTALL)
    assert 'class="chart"' in own
    assert "http" not in own.replace("http-equiv", "")
    assert result.at in own
    assert data.name in own
    plan = Plan.load(bundle.path / "plan.json")
    assert plan.chosen == best.candidate.name
    manifest = open_bundle(bundle.path).manifest
    assert manifest.variants[best.candidate.name].benchmark is not None
    # One set, one number: what quantize and this call measured on the same inputs, the worst of it.
    assert manifest.validation is not None
    quantized = [v for v in manifest.variants.values() if v.validation and v.benchmark]
    assert quantized
    for variant in quantized:
        proof, record = variant.validation or {}, variant.benchmark or {}
        assert proof["set_sha256"] == manifest.validation["sha256"]
        assert proof["cosine_min"] == record["cosine_min"]
        bound = proof["gate"]["min_cosine"]
        assert variant.passed == (min(proof["cosine_min"], proof["cosine_low"]) >= bound)

    again = run(bundle, data, min_cosine=0.9, plan=plan)
    assert [o.candidate for o in again.outcomes] == list(plan.candidates)
    assert all(o.reused for o in again.outcomes if o.status in ("kept", "chosen"))


def test_the_worst_that_was_measured_counts() -> None:
    """quantize's validator saw .9797, the engine sees .9815 on the same inputs: it fails .98."""
    seen = replace(outcome("onnx-int8-dynamic", None, 0.9797), cosine_low=0.97)
    record: Any = SimpleNamespace(
        cosine_min=0.9815,
        cosine_low=0.981,
        cosine_mean=0.99,
        measures={},
        items=512,
        items_per_second=1.0,
        latency_ms_p50=1.0,
        rounds_seconds=(1.0,),
        rounds_latency_ms=(1.0,),
    )
    judged = gated(seen, record, Gate(min_cosine=0.98))
    assert (judged.status, judged.cosine_min, judged.cosine_low) == ("dropped", 0.9797, 0.97)
    assert judged.reason == "min cosine 0.9797 is below 0.98"
    assert (
        gated(replace(seen, cosine_min=None, cosine_low=None), record, Gate(min_cosine=0.98)).status
        == "kept"
    )
    lucky = gated(replace(seen, cosine_min=None), record, Gate(min_cosine=0.98))
    assert "too near to 0.98" in lucky.reason


@pytest.mark.slow
def test_a_gate_nothing_quantized_passes_leaves_the_float_variant(
    minilm_copy: Bundle, data: Path
) -> None:
    """With an impossible gate quantized candidates are dropped with the number that failed."""
    result = run(minilm_copy, data, min_cosine=0.99999, targets=("openvino",))
    statuses = {o.candidate.name: o for o in result.outcomes}
    assert "min cosine" in statuses["openvino-int8-static"].reason
    assert statuses["openvino-int8-static"].status == "dropped"
    # Measured all the same, for the picture, and kept as failed: a later call takes it as it is.
    assert statuses["openvino-int8-static"].items_per_second
    failed = open_bundle(minilm_copy.path).variant("openvino-int8-static")
    assert not failed.passed
    assert not list(minilm_copy.path.glob(".staging-*"))
    assert result.plan.chosen == "openvino-fp32"


def test_what_is_not_usable_or_does_not_fit_the_budget_is_skipped_with_the_reason(
    minilm_copy: Bundle, data: Path
) -> None:
    """A provider that is not there and a spent budget are said; what is built is measured."""
    result = run(minilm_copy, data, targets=("cuda",))
    assert {o.status for o in result.outcomes} == {"skipped"}
    assert "CUDAExecutionProvider" in result.outcomes[0].reason
    spent = run(minilm_copy, data, targets=("openvino",), budget=1e-6)
    there = set(minilm_copy.manifest.variants)
    reused = [o for o in spent.outcomes if o.candidate.name in there]
    assert all(o.reused and o.items_per_second for o in reused)
    assert all("budget" in o.reason for o in spent.outcomes if o not in reused)
    assert spent.plan.chosen in {o.candidate.name for o in reused}


def test_an_encrypted_bundle_is_optimized_under_its_key(
    tiny: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built is put back encrypted, the choice is the bundle's, the page is readable."""
    copied = open_bundle(shutil.copytree(tiny.path, tmp_path / "bundle"))
    monkeypatch.setenv(KEY_VARIABLE, "33" * 32)
    encrypt_bundle(copied, load_key())
    only = Plan(
        source=str(copied.path),
        min_cosine=0.9,
        samples=40,
        seed=0,
        candidates=(
            Candidate(
                name="openvino-fp32",
                kind="export",
                device="openvino",
                settings={"format": "openvino"},
            ),
            Candidate(
                name="openvino-fp16",
                kind="export",
                device="openvino",
                settings={"format": "openvino", "precision": "fp16"},
            ),
        ),
    )
    result = run(copied, data, min_cosine=0.9, plan=only)
    assert result.bundle == copied.path
    assert result.plan.chosen in ("openvino-fp32", "openvino-fp16")
    bundle = open_bundle(copied.path)
    for variant in bundle.manifest.variants.values():
        for name in (variant.file, *variant.companions):
            assert (bundle.path / name).read_bytes().startswith(MAGIC)
    assert 'class="chart"' in (bundle.path / "optimize.html").read_text()
    assert Plan.load(bundle.path / "plan.json").chosen == result.plan.chosen
    with ArrowEngine(bundle.path) as engine:
        assert engine.device_info()["variant"] == result.plan.chosen


def test_a_plan_is_cut_to_targets() -> None:
    """--targets takes the plan's candidates of these devices; none left is an error."""
    plan = Plan(
        source="m",
        min_cosine=0.98,
        samples=10,
        seed=0,
        candidates=tuple(
            Candidate(name=d, kind="export", device=d) for d in ("cpu", "openvino", "cuda")
        ),
    )
    assert [c.name for c in plan.only(["cuda", "cpu"]).candidates] == ["cpu", "cuda"]
    with pytest.raises(ConfigurationError, match="no candidate for rocm"):
        plan.only(["rocm"])
    with pytest.raises(ConfigurationError, match="samples cannot be 'ten'"):
        replace(plan, samples="ten")


def test_missing_calibration_and_a_bad_gate_are_refused(minilm_copy: Bundle) -> None:
    """Both are found before any work."""
    with pytest.raises(InputError, match="no calibration data"):
        optimize(minilm_copy.path, Path("gone.csv"))
    with pytest.raises(ConfigurationError, match="min_cosine 2"):
        optimize(minilm_copy.path, Path("gone.csv"), min_cosine=2)
    texts = minilm_copy.path / "texts.txt"
    texts.write_text("one")
    with pytest.raises(ConfigurationError, match="agreement would hold nothing"):
        optimize(minilm_copy.path, texts, bounds={"agreement": 0.9})


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(
    minilm: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is kept in the bundle: it was refused when it had been measured."""
    texts = tmp_path / "texts.txt"
    texts.write_text("one")
    monkeypatch.setattr("os.access", lambda path, mode: path != minilm.path)
    with pytest.raises(ConfigurationError, match=r"cannot be written.*memopt optimize COPY"):
        optimize(minilm.path, texts)


def timed(name: str, speed: float, latency: float, cosine: float) -> Outcome:
    return replace(outcome(name, speed, cosine), latency_ms_p50=latency)


def test_batches_and_single_inputs_have_a_choice_each() -> None:
    """Both mark two, latency makes the quickest for one input the choice, throughput marks one."""
    given = [timed("many", 200, 2.0, 0.99), timed("one", 100, 1.0, 0.99)]

    def marks(prefer: str) -> list[tuple[str, bool]]:
        return [(o.status, o.single) for o in choose(given, prefer)]

    assert marks("both") == [("chosen", False), ("kept", True)]
    assert marks("latency") == [("kept", False), ("chosen", True)]
    assert marks("throughput") == [("chosen", False), ("kept", False)]
    # Better answers win among equal latencies, by paired rounds too.
    near = [timed("rough", 100, 1.0, 0.98), timed("right", 100, 1.02, 0.999)]
    assert [o.single for o in choose(near, "both")] == [False, True]
    rounds = [(1.0, 1.0, 1.0), (1.1, 1.1, 1.1)]
    pairs = zip([near[0], replace(near[1], latency_ms_p50=1.1)], rounds, strict=True)
    slower = [replace(o, rounds_latency_ms=times) for o, times in pairs]
    assert [o.single for o in choose(slower, "both")] == [True, False]
    # What is in memory for batches already is enough where another is no better.
    equal = [timed("small", 100, 1.0, 0.99), timed("many", 200, 1.02, 0.99)]
    assert [o.single for o in choose(equal, "both")] == [False, True]
    dropped = [replace(given[1], status="dropped"), given[0]]
    assert [o.single for o in choose(dropped, "both")] == [False, True]


def test_what_a_model_cannot_prefer_is_refused(minilm_copy: Bundle, data: Path) -> None:
    """A language model's speeds are not an encoder's; both are told what they have."""
    with pytest.raises(ConfigurationError, match=r"decode.*known: throughput, latency, both"):
        optimize(minilm_copy.path, data, prefer="decode", samples=40)


def test_open_options_are_measured_judged_and_used(
    minilm_copy: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another precision does to the answers counts; what wins is opened with, here alone."""
    path, name = minilm_copy.path, "openvino-fp32"
    ways = (
        options.OpenOptions(),
        options.OpenOptions(properties={"INFERENCE_PRECISION_HINT": "bf16"}),
        options.OpenOptions(properties={"SNIPPETS_MODE": "DISABLE"}),
        options.OpenOptions(properties={"NO_SUCH_OPTION": "YES"}),
    )
    monkeypatch.setattr(options, "combinations", lambda *_: ways)
    monkeypatch.setattr(options, "fastest", lambda times, *_: list(times)[-1])
    monkeypatch.setattr(options, "ROUND_SECONDS", 0.0)
    plan = Plan(
        source="m",
        min_cosine=0.9,
        samples=10,
        seed=0,
        candidates=(),
        chosen=name,
        chosen_device="openvino",
        single=name,
        single_device="openvino",
        prefer="both",
    )
    texts = data.read_text().splitlines()[:4]

    def tuned(least: float) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
        gate, deadline = Gate(min_cosine=least), time.monotonic()
        return options.remember_options(path, plan, texts, gate, deadline + 600, lambda line: None)

    _, notes = tuned(0.9)
    assert any("NO_SUCH_OPTION" in note for note in notes)
    found, notes = tuned(0.99999)
    if BF16 & cpu_features():  # elsewhere it is float32 by another name
        assert any("bf16: min cosine" in note for note in notes)
    assert found[f"openvino:{name}"] == {"SNIPPETS_MODE": "DISABLE"}
    with ArrowEngine(path, device="openvino", variant=name) as engine:
        assert engine.device_info()["options"]["SNIPPETS_MODE"] == "DISABLE"
    late, notes = options.remember_options(path, plan, texts, Gate(), 0.0, lambda line: None)
    assert late == {}
    assert "not measured" in notes[0]


def test_a_plan_of_another_processor_is_said_to_be_so() -> None:
    """Its choice is no measurement of this machine."""
    plan = Plan(
        source="m",
        min_cosine=0.9,
        samples=10,
        seed=0,
        candidates=(),
        machine={"key": "linux-Other-4c-avx9"},
    )
    now = replace(plan, machine={"key": machine_key()})
    (note,) = _differences(plan, now)
    assert "linux-Other-4c-avx9, not on this processor: measured again" in note
    assert _differences(now, now) == ()


def test_a_choice_that_is_no_longer_in_the_bundle_is_said(minilm: Bundle) -> None:
    """`memopt info` named a variant that cannot answer as the one that does."""
    choice = {
        "variant": "onnx-fp32",
        "device": "cpu",
        "single": {"variant": "gone", "device": "cpu"},
    }
    manifest = replace(minilm.manifest, chosen={machine_key(): choice})
    (line,) = _choices(manifest)
    assert "onnx-fp32 on cpu; 1 for one input: gone on cpu (no longer here" in line
