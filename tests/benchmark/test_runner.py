"""The benchmark runner measures real processes and pairs their rounds."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from memopt.benchmark import report
from memopt.benchmark.bench import below_gate, bench, compare
from memopt.benchmark.peers import Contender, peer_contenders
from memopt.benchmark.race import Worker
from memopt.benchmark.record import BenchmarkMetrics, ratio
from memopt.benchmark.runner import run
from memopt.benchmark.workload import read_inputs
from memopt.bundle import MANIFEST, Bundle
from memopt.errors import BundleError, ConfigurationError, InputError, MemoptError
from memopt.runtimes.cpu import BF16, cpu_features, machine_key

TEXTS = [f"sentence number {i} about weather" for i in range(24)]


def contender(bundle: Bundle, variant: str, label: str) -> Contender:
    spec = {"kind": "memopt", "path": str(bundle.path), "variant": variant}
    return Contender(label=label, spec=spec)


@pytest.fixture(scope="module")
def records(minilm: Bundle) -> list[BenchmarkMetrics]:
    pair = [
        contender(minilm, "onnx-fp32", "portable"),
        contender(minilm, "onnx-fp32-fused", "fused"),
    ]
    return run(pair, TEXTS, rounds=3, singles=5)


def test_records_hold_what_was_measured(records: list[BenchmarkMetrics]) -> None:
    """Every figure is there, positive and consistent with the rounds."""
    for record in records:
        assert len(record.rounds_seconds) == 3
        assert record.items == len(TEXTS)
        median = sorted(record.rounds_seconds)[1]
        assert record.items_per_second == pytest.approx(len(TEXTS) / median)
        assert 0 < record.latency_ms_p50 <= record.latency_ms_p95 <= record.latency_ms_p99
        assert record.rss_mb > record.rss_increase_mb > 0
        assert record.first_vector_seconds > record.load_seconds > 0
    assert records[1].cosine_min == pytest.approx(1.0, abs=1e-5)
    assert records[0].versions["onnxruntime"]
    assert records[0].kernels["kernels"][0]["nodes"] > 0
    assert records[0].hardware["instruction_sets"] == ", ".join(sorted(cpu_features()))


def test_few_inputs_are_repeated(minilm: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round long enough to measure goes over the inputs as often for every contender."""
    asked: list[int] = []
    ask = Worker.ask

    def recorded(worker: Worker, **command: Any) -> dict[str, Any]:
        if command["do"] == "encode" and "out" not in command:
            asked.append(command["repeats"])
        return ask(worker, **command)

    monkeypatch.setattr(Worker, "ask", recorded)
    names = ("onnx-fp32", "onnx-fp32-fused")
    records = run(
        [contender(minilm, name, name) for name in names],
        TEXTS,
        rounds=2,
        singles=4,
        round_seconds=2.0,
    )
    first, *timed = asked
    assert first == 1
    assert len(timed) == 4
    assert len(set(timed)) == 1
    assert timed[0] > 1
    assert [record.items for record in records] == [len(TEXTS)] * 2


def test_cosines_are_against_the_reference(minilm: Bundle) -> None:
    """One contender alone is not its own reference: float vectors are."""
    (record,) = run(
        [contender(minilm, "openvino-bf16", "bf16")],
        TEXTS,
        rounds=1,
        singles=1,
        reference=contender(minilm, "onnx-fp32", "float"),
    )
    assert record.reference == "float"
    # Without its own bf16 kernels a processor computes that variant in float32.
    exact = not cpu_features() & BF16
    assert 0.999 < record.cosine_min < (1.0000001 if exact else 0.9999999)


def test_gpu_memory_is_a_column_where_a_gpu_was_used(records: list[BenchmarkMetrics]) -> None:
    """Without a GPU the table has no empty column for one."""
    assert "VRAM MB" not in report.header(records)
    on_gpu = [replace(record, vram_mb=512.0) for record in records]
    assert report.header(on_gpu)[-1] == "VRAM MB"
    assert [row[-1] for row in report.rows(on_gpu)] == ["512", "512"]


def test_a_record_reads_back_and_a_foreign_file_is_refused(
    records: list[BenchmarkMetrics], tmp_path: Path
) -> None:
    """JSON and back is the identity; anything else is one InputError that names the file."""
    path = records[0].save(tmp_path)
    assert BenchmarkMetrics.load(path) == records[0]
    wrong = [{**asdict(records[0]), **bad} for bad in ({"spec": 3}, {"items": "x"})]
    for content in ("", "[]", json.dumps({"label": "x"}), *map(json.dumps, wrong)):
        path.write_text(content)
        with pytest.raises(InputError, match=path.name):
            BenchmarkMetrics.load(path)


def test_the_ratio_of_a_contender_with_itself_is_one(records: list[BenchmarkMetrics]) -> None:
    """Paired quotients of equal rounds are exactly one, and the interval is a point."""
    same = ratio(records[0], records[0])
    assert (same.median, same.low, same.high) == (1.0, 1.0, 1.0)
    both = ratio(records[0], records[1]).median * ratio(records[1], records[0]).median
    assert both == pytest.approx(1.0)


def test_rounds_of_different_runs_are_not_paired(records: list[BenchmarkMetrics]) -> None:
    """A ratio of two runs is refused."""
    other = BenchmarkMetrics(
        **{name: getattr(records[0], name) for name in records[0].__slots__} | {"run_id": "other"}
    )
    with pytest.raises(InputError, match="not paired"):
        ratio(records[0], other)


def test_a_contender_that_fails_is_named(minilm: Bundle) -> None:
    """The error of the child process comes back with the contender's label."""
    with pytest.raises(MemoptError, match=r"broken: .*no variant 'nope'"):
        run([contender(minilm, "nope", "broken")], TEXTS, rounds=1)


def test_no_inputs_and_unknown_peers_are_refused(minilm: Bundle) -> None:
    """Both are one line that says what is wrong."""
    with pytest.raises(InputError, match="empty"):
        run([contender(minilm, "auto", "x")], [])
    with pytest.raises(ConfigurationError, match="did you mean 'fastembed'"):
        peer_contenders(["fastembd"], minilm, minilm.path, "python")


def test_bench_of_a_missing_variant_says_which_there_are(minilm: Bundle) -> None:
    """The mistake is found before any process is started."""
    with pytest.raises(BundleError, match="did you mean"):
        bench(minilm.path, variants=["onnx-fp23"])


def test_answers_below_the_gate_a_variant_passed_are_said(
    minilm: Bundle, tmp_path: Path, records: list[BenchmarkMetrics]
) -> None:
    """On inputs unlike its validation set: the line has both numbers."""
    proof = {"cosine_min": 0.99, "gate": {"min_cosine": 0.98}}
    variant = replace(minilm.variant("onnx-fp32"), validation=proof)
    manifest = replace(minilm.manifest, variants={variant.name: variant})
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    spec = {"kind": "memopt", "path": str(tmp_path), "variant": variant.name}
    low = replace(records[0], spec=spec, cosine_min=0.962)
    auto = replace(low, spec={**spec, "variant": "auto"}, variants={"batches": "onnx-fp32 on cpu"})
    assert below_gate([auto]) == below_gate([low])
    (line,) = below_gate([low, replace(low, cosine_min=0.985)])
    assert line.startswith("onnx-fp32 passed 0.98 on its validation set and has 0.9620 here")


def test_what_answered_is_said_and_another_variant_is_not_measured(minilm_copy: Bundle) -> None:
    """Auto answers batches and single inputs by two variants; one that goes missing is an error."""
    choice = {
        "variant": "openvino-fp32",
        "device": "openvino",
        "single": {"variant": "onnx-fp32", "device": "cpu"},
    }
    bundle = minilm_copy.update(lambda m: replace(m, chosen={machine_key(): choice}))
    (record,) = bench(bundle.path, variants=["auto"], count=2, rounds=1, singles=1)
    answered = {"batches": "openvino-fp32 on openvino", "single inputs": "onnx-fp32 on cpu"}
    assert record.variants == answered
    (line,) = report.answering([record])
    assert line.endswith("; compared are openvino-fp32's")
    assert replace(record, items=1).compared == "onnx-fp32"
    assert line.startswith(
        "memopt auto: batches by openvino-fp32 on openvino, single inputs by onn"
    )
    bundle.file(bundle.variant("onnx-fp32")).unlink()
    with pytest.raises(MemoptError, match=r"memopt auto: .*fell back: cpu:onnx-fp32 "):
        bench(bundle.path, variants=["auto"], count=2, rounds=1, singles=1)


def test_a_box_without_openvino_measures_what_it_can_run(
    minilm: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The OpenVINO variant is left out with a line, not an error at its process."""
    monkeypatch.setattr("memopt.benchmark.bench.installed", lambda name: name == "cpu")
    said: list[str] = []
    measured = bench(minilm.path, count=2, rounds=1, singles=1, on_step=said.append)
    assert [m.label for m in measured] == ["memopt onnx-fp32", "memopt onnx-fp32-fused"]
    assert said[0].startswith("left out, nothing installed here runs them: openvino-fp32")
    monkeypatch.setattr("memopt.benchmark.bench.installed", lambda name: False)
    with pytest.raises(BundleError, match=r"no variant of .* can run.*memopt doctor"):
        bench(minilm.path, count=2)


def test_a_contender_that_fails_can_be_left_out(minilm: Bundle) -> None:
    """The rest is measured; past the deadline there is no second round."""
    failures: dict[str, str] = {}
    pair = [contender(minilm, "onnx-fp32", "good"), contender(minilm, "nope", "broken")]
    records = run(pair, TEXTS, rounds=4, singles=2, failures=failures, deadline=0.0)
    assert [record.label for record in records] == ["good"]
    assert "no variant 'nope'" in failures["broken"]
    assert not failures["broken"].startswith("broken")
    assert len(records[0].rounds_seconds) == 1


def test_compare_measures_two_records_again_on_their_own_inputs(
    minilm: Bundle, tmp_path: Path
) -> None:
    """Rounds are paired anew and the file is read again; records of other inputs are refused."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    names = ["onnx-fp32-fused", "openvino-fp32"]
    saved = [
        record.save(tmp_path)
        for record in bench(minilm.path, variants=names, inputs=file, rounds=1, singles=1)
    ]
    first, second = compare(*saved, rounds=2, singles=1)
    assert [first.spec["variant"], second.spec["variant"]] == names
    assert first.inputs == str(file)
    assert ratio(second, first).rounds == 2
    assert second.cosine_min == pytest.approx(1.0, abs=1e-4)
    other = replace(first, inputs="", label="seeded").save(tmp_path)
    with pytest.raises(InputError, match=r"different inputs.*seeded"):
        compare(saved[0], other)
    peers = [replace(first, spec={"kind": "optimum"}).save(tmp_path)] * 2
    with pytest.raises(InputError, match="both of peers"):
        compare(*peers)


def test_compare_runs_no_interpreter_that_only_a_record_names(
    minilm: Bundle, tmp_path: Path
) -> None:
    """A record may be somebody else's: its Python is run where the command names it too."""
    (record,) = bench(minilm.path, variants=["onnx-fp32"], count=2, rounds=1, singles=1)
    mine = record.save(tmp_path)
    link = tmp_path / "python"
    ran = tmp_path / "ran"
    link.write_text(f'#!/bin/sh\ntouch {ran}\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)
    other = replace(record, python=str(link), label="other").save(tmp_path)
    with pytest.raises(InputError, match=r"neither this Python.*--python"):
        compare(mine, other)
    assert not ran.exists()
    first, second = compare(mine, other, rounds=1, singles=1, pythons=[str(link)])
    assert ran.exists()
    assert second.cosine_min == pytest.approx(first.cosine_min, abs=1e-4)


def test_inputs_are_read_like_calibration_data(tmp_path: Path) -> None:
    """A header is no text, a folder gives paths, and what is not there or empty is named."""
    table = tmp_path / "pairs.csv"
    table.write_text("sentence1,sentence2,score\na cat,a dog,3.5\nrain,sun,0.1\n")
    assert read_inputs(table, "text", 3) == ["a cat", "a dog", "rain"]
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "a.png").write_bytes(b"")
    assert read_inputs(tmp_path, "image") == [tmp_path / "a.png", tmp_path / "b.png"]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for path, why in ((tmp_path / "gone.txt", "no inputs at"), (empty, "is empty")):
        with pytest.raises(InputError, match=why):
            read_inputs(path, "text")


def test_the_report_names_every_version(records: list[BenchmarkMetrics]) -> None:
    """Peers live in environments of their own: a package of two versions shows both."""
    other = replace(records[1], versions={"onnxruntime": "9.9"}, spec={"kind": "fastembed"})
    told = dict(report.circumstances([records[0], other]))
    assert told["onnxruntime"] == f"{records[0].versions['onnxruntime']}, 9.9"
    assert told["processor"] == records[0].hardware["processor"]
