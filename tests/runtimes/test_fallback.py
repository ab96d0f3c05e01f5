"""A provider that fails hands the request on, says so, and the caller gets the right answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memopt import metrics
from memopt.bundle import Bundle, Manifest, Variant
from memopt.errors import BundleError, DeviceError, InputError
from memopt.metrics import FALLBACK_EVENTS
from memopt.runtimes import providers
from memopt.runtimes.base import Backend, Opener, Placement, Settings
from memopt.runtimes.cpu import machine_key
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.selection import candidates
from memopt.runtimes.testing import FakeBackend

if TYPE_CHECKING:
    from memopt.runtimes.base import Feed, Rows

FEED = {"digest": np.arange(64, dtype=np.uint8).reshape(2, 32)}


def chain(
    *plans: Callable[[int], None] | Exception, strict: bool = False
) -> tuple[BackendChain, list[FallbackEvent], list[Backend]]:
    """A chain of fake providers a, b, c ...; an exception fails at open, a function at run n."""
    events: list[FallbackEvent] = []
    opened: list[Backend] = []
    variant = Variant(name="v", format="onnx", precision="fp32", file="f")
    table = {chr(97 + i): plan for i, plan in enumerate(plans)}

    def open_backend(candidate: Placement) -> Backend:
        plan = table[candidate.provider]
        if isinstance(plan, Exception):
            raise plan
        backend = FakeBackend(8, fail=plan)
        opened.append(backend)
        return backend

    rungs = [Placement(name, variant) for name in table]
    return BackendChain(rungs, open_backend, strict=strict, events=events), events, opened


def fine(run: int) -> None:
    """Never fail."""


def from_run(first: int, error: Exception) -> Callable[[int], None]:
    """Fail from run number ``first`` on, for good."""

    def fail(run: int) -> None:
        if run >= first:
            raise error

    return fail


def test_a_provider_that_fails_at_open_is_passed_over() -> None:
    """The next provider answers, and the event carries what the first one said."""
    used, events, _ = chain(RuntimeError("driver too old"), fine)
    assert used.run(FEED).shape == (2, 8)
    assert [(e.from_, e.to, e.kind) for e in events] == [("a", "b", "open")]
    assert "driver too old" in events[0].reason


def test_out_of_memory_on_the_third_batch_hands_the_same_request_on() -> None:
    """The answer to every request is that of a provider that never failed."""
    error = RuntimeError("CUDA failure 2: out of memory")
    used, events, _ = chain(from_run(3, error), fine)
    right = FakeBackend(8).run(FEED)
    for _ in range(5):
        np.testing.assert_array_equal(used.run(FEED), right)
    assert [(e.from_, e.to, e.kind) for e in events] == [("a", "b", "memory")]


def test_a_batch_that_finds_no_memory_is_halved_until_it_fits() -> None:
    """Memory is freed, the answer is right, the provider stays, and later batches are smaller."""
    events: list[FallbackEvent] = []
    variant = Variant(name="v", format="onnx", precision="fp32", file="f")
    small, large = FakeBackend(8, room=3), FakeBackend(8)
    backends: dict[str, Backend] = {"cuda": small, "cpu": large}
    rungs = [Placement(name, variant) for name in backends]
    used = BackendChain(rungs, lambda c: backends[c.provider], strict=True, events=events)
    feed = {"digest": np.arange(13 * 32, dtype=np.uint8).reshape(13, 32)}
    tokens = small.tokens
    np.testing.assert_array_equal(used.run(feed), FakeBackend(8).run(feed))
    backend, future = used.submit(feed)
    np.testing.assert_array_equal(used.result(backend, future, feed), FakeBackend(8).run(feed))
    assert used.candidate.provider == "cuda"
    assert large.runs == 0
    assert small.freed > 0
    assert small.tokens == tokens // 4
    assert [(e.from_, e.to, e.kind) for e in events] == [("cuda", "cuda", "memory")] * 2
    assert "batch halved" in events[0].reason


def test_where_not_even_one_row_fits_the_next_provider_answers() -> None:
    """Halving ends at one row."""
    events: list[FallbackEvent] = []
    variant = Variant(name="v", format="onnx", precision="fp32", file="f")
    backends: dict[str, Backend] = {"cuda": FakeBackend(8, room=0), "cpu": FakeBackend(8)}
    rungs = [Placement(name, variant) for name in backends]
    used = BackendChain(rungs, lambda c: backends[c.provider], strict=False, events=events)
    np.testing.assert_array_equal(used.run(FEED), FakeBackend(8).run(FEED))
    assert [(e.from_, e.to, e.kind) for e in events] == [("cuda", "cpu", "memory")]


def test_a_provider_that_dies_for_good_is_never_asked_again() -> None:
    """After the hand-over every request goes to the next provider, submitted ones too."""
    used, events, opened = chain(from_run(2, RuntimeError("device lost")), fine)
    pending = [used.submit(FEED) for _ in range(4)]
    rows = [used.result(backend, future, FEED) for backend, future in pending]
    for row in rows:
        np.testing.assert_array_equal(row, rows[0])
    dead = opened[0]
    assert isinstance(dead, FakeBackend)
    asked = dead.runs
    used.run(FEED)
    assert dead.runs == asked
    assert [(e.from_, e.to, e.kind) for e in events] == [("a", "b", "run")]


def test_fallbacks_chain_through_several_failures() -> None:
    """Each hand-over is an event of its own, in order."""
    used, events, _ = chain(from_run(1, RuntimeError("x")), MemoryError(), fine)
    used.run(FEED)
    assert [(e.from_, e.to, e.kind) for e in events] == [("a", "b", "run"), ("b", "c", "memory")]


def test_when_nothing_is_left_the_error_names_the_last_reason() -> None:
    """The caller gets a DeviceError, at open and while running."""
    with pytest.raises(DeviceError, match=r"no provider can run this bundle.*one.*two"):
        chain(RuntimeError("one"), RuntimeError("two"))
    used, _, _ = chain(from_run(1, RuntimeError("gone")))
    with pytest.raises(DeviceError, match=r"nothing is left to take over.*gone"):
        used.run(FEED)


def test_strict_raises_instead_of_falling_back() -> None:
    """Neither a failure at open nor one while running is papered over."""
    with pytest.raises(DeviceError, match="driver too old"):
        chain(RuntimeError("driver too old"), fine, strict=True)
    used, events, _ = chain(from_run(1, RuntimeError("device lost")), fine, strict=True)
    with pytest.raises(DeviceError, match="device lost"):
        used.run(FEED)
    assert events == []


def test_a_fallback_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The metric memopt_fallback_events_total goes up and a warning names both sides."""
    labels = {"from": "a", "to": "b", "reason": "open"}
    before = metrics.value(FALLBACK_EVENTS, **labels)
    with caplog.at_level(logging.WARNING, "memopt.runtimes"):
        chain(RuntimeError("no"), fine)
    assert metrics.value(FALLBACK_EVENTS, **labels) == before + 1
    assert "a:v -> b:v" in caplog.text


def test_asking_for_cuda_without_one_runs_on_the_cpu_and_says_why(minilm: Bundle) -> None:
    """A real engine: the reason is that this onnxruntime has no CUDA."""
    with ArrowEngine(minilm, device="cuda", variant="onnx-fp32") as engine:
        if engine.device_info()["device"] == "cuda":
            pytest.skip("this machine has CUDA")
        assert engine.encode(["a cat"]).shape == (1, 384)
        (event,) = engine.events
        assert (event.from_, event.to) == ("cuda", "cpu")
        assert event.reason
    with pytest.raises(DeviceError, match="cuda"):
        ArrowEngine(minilm, device="cuda", strict=True)


class Failing:
    """A real CPU session that plays a GPU: from run number ``first`` on it raises ``error``."""

    def __init__(self, real: Backend, first: int, error: Exception) -> None:
        self.real, self.first, self.error, self.runs = real, first, error, 0
        self.inputs, self.dimension = real.inputs, real.dimension
        self.streams, self.tokens = real.streams, real.tokens
        self.step, self.row = real.step, real.row
        self.pool = ThreadPoolExecutor(1, "failing")

    def run(self, feed: Feed) -> Rows:
        self.runs += 1
        if self.runs >= self.first:
            raise self.error
        return self.real.run(feed)

    def submit(self, feed: Feed) -> Future[Rows]:
        return self.pool.submit(self.run, feed)

    def free(self) -> None:
        self.real.free()

    def info(self) -> dict[str, object]:
        return self.real.info()

    def close(self) -> None:
        self.pool.shutdown(wait=False)
        self.real.close()


@pytest.mark.parametrize(
    ("message", "kind"), [("CUDA error: out of memory", "memory"), ("device lost", "run")]
)
def test_encode_survives_a_gpu_that_fails_on_its_third_batch(
    minilm: Bundle, monkeypatch: pytest.MonkeyPatch, message: str, kind: str
) -> None:
    """All vectors are right and in order, one event tells, and the GPU is not asked again."""
    failing: list[Failing] = []
    real = providers.opener

    def opener(name: str) -> Opener:
        if name != "cuda":
            return real(name)

        def open_gpu(bundle: Bundle, candidate: Placement, settings: Settings) -> Backend:
            on_cpu = real("cpu")(bundle, replace(candidate, provider="cpu"), settings)
            failing.append(Failing(on_cpu, 3, RuntimeError(message)))
            return failing[0]

        return open_gpu

    monkeypatch.setattr("memopt.runtimes.task_engine.opener", opener)
    texts = [f"sentence {i} " + "with words " * (i % 5) for i in range(60)]
    with ArrowEngine(minilm, device="cpu", variant="onnx-fp32") as plain:
        expected = plain.encode(texts)
    with ArrowEngine(minilm, device="cuda", variant="onnx-fp32") as engine:
        assert engine.events == ()
        vectors = engine.encode(texts, batch_size=8)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        (event,) = engine.events
        assert (event.from_, event.to, event.kind) == ("cuda", "cpu", kind)
        assert message in event.reason
        asked = failing[0].runs
        engine.encode(texts)
        assert failing[0].runs == asked


def test_a_request_that_is_wrong_everywhere_costs_no_provider(
    minilm: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token id beyond the vocabulary is the input's fault: InputError, and no fallback."""
    with ArrowEngine(minilm, device="cpu", variant="onnx-fp32") as engine:
        ids = np.full((1, 4), 10**6)
        feed = dict.fromkeys(engine._chain.backend.inputs, np.ones_like(ids))
        with pytest.raises(InputError, match="the graph refused the input"):
            engine._chain.run({**feed, "input_ids": ids})
        assert engine.events == ()
        assert engine.encode(["still there"]).shape == (1, 384)


def add_variant(bundle: Bundle, name: str, data: bytes, *, passed: bool = True) -> Bundle:
    (bundle.path / "onnx" / f"{name}.onnx").write_bytes(data)
    return bundle.add_variants(
        Variant(
            name=name,
            format="onnx",
            precision="int8",
            file=f"onnx/{name}.onnx",
            target="cpu",
            passed=passed,
        ),
        event={"event": "test"},
    )


def test_a_corrupt_quantized_variant_falls_back_to_the_float_one(minilm_copy: Bundle) -> None:
    """The vectors are the float variant's, and the event names both variants."""
    bundle = add_variant(minilm_copy, "onnx-int8-static", b"not a model")
    with ArrowEngine(bundle, device="cpu", variant="onnx-int8-static") as engine:
        (event,) = engine.events
        assert (event.from_, event.to, event.kind) == ("cpu", "cpu", "open")
        assert event.from_variant == "onnx-int8-static"
        assert event.to_variant == engine.device_info()["variant"] == "onnx-fp32-fused"
        with ArrowEngine(bundle, device="cpu") as plain:
            np.testing.assert_allclose(engine.encode(["a cat"]), plain.encode(["a cat"]), atol=1e-5)
    with pytest.raises(DeviceError, match="onnx-int8-static"):
        ArrowEngine(bundle, device="cpu", variant="onnx-int8-static", strict=True)


def table(*variants: Variant, chosen: dict[str, object] | None = None) -> Bundle:
    manifest = Manifest(
        name="m",
        task="embedding",
        modality="text",
        architecture="A",
        model_type="a",
        variants={v.name: v for v in variants},
        chosen=chosen or {},
    )
    return Bundle(Path("nowhere"), manifest)


FLOAT = Variant(name="onnx-fp32", format="onnx", precision="fp32", file="a.onnx")
FUSED = Variant(name="onnx-fp32-fused", format="onnx", precision="fp32", file="b", fused=True)
HALF = Variant(name="onnx-fp16", format="onnx", precision="fp16", file="h.onnx")
INT8 = Variant(name="onnx-int8-static", format="onnx", precision="int8", file="c", target="cpu")
IR = Variant(name="openvino-fp32", format="openvino", precision="fp32", file="d.xml")


def names(found: list[Placement]) -> list[str]:
    return [str(candidate) for candidate in found]


def test_auto_prefers_the_fused_float_graph_on_onnxruntime() -> None:
    """Without a measured choice, float comes before int8 and fused before portable."""
    found = names(candidates(table(FLOAT, INT8, FUSED), "cpu", "auto"))
    assert found[:3] == ["cpu:onnx-fp32-fused", "cpu:onnx-fp32", "cpu:onnx-int8-static"]
    # OpenVINO's reader of ONNX is the last resort, and not for graphs with foreign operators.
    assert found[3:] == ["openvino:onnx-fp32", "openvino:onnx-int8-static"]


def test_half_precision_on_a_gpu_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 comes first on a GPU unless it is not wanted; on a CPU it never does."""
    monkeypatch.setattr("memopt.runtimes.selection.installed", lambda name: True)
    bundle = table(FLOAT, HALF)
    assert names(candidates(bundle, "cuda", "auto"))[0] == "cuda:onnx-fp16"
    found = names(candidates(bundle, "cuda", "auto", half=False))
    assert found[:2] == ["cuda:onnx-fp32", "cuda:onnx-fp16"]
    assert names(candidates(bundle, "cpu", "auto"))[0] == "cpu:onnx-fp32"


def test_the_cpu_may_be_forbidden_to_take_over_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only GPUs are tried, unless a CPU was asked for or there is no GPU at all."""
    monkeypatch.setattr("memopt.runtimes.selection.installed", lambda name: True)
    for device in ("auto", "cuda"):
        found = candidates(table(FLOAT, IR), device, "auto", cpu_fallback=False)
        assert {c.provider for c in found} == {"cuda", "rocm", "coreml"}
    found = candidates(table(FLOAT, IR), "cpu", "auto", cpu_fallback=False)
    assert found[0].provider == "cpu"
    found = candidates(table(IR), "auto", "auto", cpu_fallback=False)
    assert names(found) == ["openvino:openvino-fp32"]


def test_the_tuned_choice_of_this_machine_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto opens what optimize chose here; another machine's choice is ignored."""
    monkeypatch.setattr("memopt.runtimes.selection.machine_key", lambda: "here")
    choice = {"variant": "onnx-int8-static", "device": "cpu"}
    bundle = table(FLOAT, FUSED, INT8, IR, chosen={"here": choice})
    assert names(candidates(bundle, "auto", "auto"))[0] == "cpu:onnx-int8-static"
    elsewhere = table(FLOAT, FUSED, INT8, chosen={"there": choice})
    assert names(candidates(elsewhere, "cpu", "auto"))[0] == "cpu:onnx-fp32-fused"


def measured(variant: Variant, speed: float, device: str, machine: str | None = None) -> Variant:
    """The variant with what optimize measured of it, on this machine if none is said."""
    machine = machine or machine_key()
    record = {"items_per_second": speed, "device": device, "machine": machine}
    return replace(variant, benchmark=record)


def test_what_optimize_measured_takes_over_the_fastest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle tuned with OpenVINO, on a box without it: the fastest of the rest, not float."""
    best = Variant(name="openvino-int8", format="openvino", precision="int8", file="e.xml")
    bundle = table(
        measured(FLOAT, 500, "cpu"),
        measured(FUSED, 750, "cpu"),
        replace(measured(INT8, 9000, "cpu"), name="onnx-int8-bad", passed=False),
        measured(INT8, 2000, "cpu"),
        measured(IR, 1000, "openvino"),
        measured(best, 3000, "openvino"),
        chosen={machine_key(): {"variant": best.name, "device": "openvino"}},
    )
    found = names(candidates(bundle, "auto", "auto"))
    assert found[:3] == ["openvino:openvino-int8", "cpu:onnx-int8-static", "openvino:openvino-fp32"]
    monkeypatch.setattr("memopt.runtimes.selection.installed", lambda name: name == "cpu")
    found = names(candidates(bundle, "auto", "auto"))
    assert found[1:] == ["cpu:onnx-int8-static", "cpu:onnx-fp32-fused", "cpu:onnx-fp32"]
    assert names(candidates(bundle, "cpu", "auto"))[0] == "cpu:onnx-int8-static"
    assert not any("bad" in name for name in found)


def test_a_measurement_counts_where_the_same_kernels_run() -> None:
    """More cores or another name are the same; other instruction sets, or no record, are not."""
    system, features = machine_key().partition("-")[0], machine_key().rpartition("-")[2]
    same = measured(INT8, 2000, "cpu", f"{system}-Other-Processor-64c-{features}")
    assert names(candidates(table(FLOAT, same), "cpu", "auto"))[0] == "cpu:onnx-int8-static"
    for machine in (f"{system}-Other-64c-{features}+avx9", "", "x"):
        other = measured(INT8, 2000, "cpu", machine or "?")
        assert names(candidates(table(FLOAT, other), "cpu", "auto"))[0] == "cpu:onnx-fp32"


def test_a_variant_that_failed_its_gate_is_never_picked_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by auto and not even when it was tuned; only by name."""
    monkeypatch.setattr("memopt.runtimes.selection.machine_key", lambda: "here")
    bad = replace(INT8, passed=False)
    bundle = table(FLOAT, bad, chosen={"here": {"variant": bad.name, "device": "cpu"}})
    assert not any("int8" in name for name in names(candidates(bundle, "auto", "auto")))
    assert names(candidates(bundle, "auto", bad.name))[0] == "cpu:onnx-int8-static"


def test_the_graph_of_a_second_tower_is_never_opened_for_the_first() -> None:
    """CLIP's text graph in a bundle of pictures: not by auto, and by name it is an error."""
    seen = replace(FLOAT, inputs=("pixel_values",))
    read = replace(FUSED, name="onnx-fp32-text-fused", inputs=("input_ids", "attention_mask"))
    both = table(seen, read)
    bundle = Bundle(both.path, replace(both.manifest, modality="image", task="image-embedding"))
    assert names(candidates(bundle, "cpu", "auto")) == ["cpu:onnx-fp32", "openvino:onnx-fp32"]
    with pytest.raises(BundleError, match=r"takes input_ids.*"):
        candidates(bundle, "cpu", read.name)


def test_names_that_do_not_exist_are_answered_with_the_nearest() -> None:
    """Device and variant typos are one line with a suggestion."""
    with pytest.raises(DeviceError, match=r"unknown device 'opnvino'.*openvino"):
        candidates(table(FLOAT), "opnvino", "auto")
    with pytest.raises(BundleError, match=r"onnx-fp23.*onnx-fp32"):
        candidates(table(FLOAT), "auto", "onnx-fp23")
    with pytest.raises(DeviceError, match=r"openvino-fp32.*cannot run on cuda"):
        candidates(table(IR), "cuda", "openvino-fp32")
    with pytest.raises(BundleError, match="memopt export"):
        candidates(table(), "auto", "auto")
