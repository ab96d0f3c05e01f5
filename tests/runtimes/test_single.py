"""One input has a variant of its own where optimize found one, and what goes wrong is told once."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt import ArrowEngine, Bundle, open_bundle
from memopt.errors import DeviceError
from memopt.runtimes import limits
from memopt.runtimes.base import Backend, Placement, Settings
from memopt.runtimes.batching import FrontEnd
from memopt.runtimes.cpu import machine_key
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.pack import pack
from memopt.runtimes.selection import tuned_single
from memopt.runtimes.single import SinglePath
from memopt.runtimes.testing import FakeBackend, FakeFrontEnd, fake_engine

TEXTS = ["a cat sleeps", "rain over the coast tonight", "how long do trains wait?"]
BATCHES = {"variant": "openvino-fp32", "device": "openvino"}
SINGLE = {"variant": "onnx-fp32-fused", "device": "cpu"}


def choose(bundle: Bundle, key: str | None = None, **more: Any) -> Bundle:
    """Write a choice of optimize for this machine, or another."""
    record = {**BATCHES, "single": SINGLE, **more}
    return bundle.update(lambda m: replace(m, chosen={key or machine_key(): record}))


@pytest.fixture
def both(minilm_copy: Bundle) -> Bundle:
    """MiniLM whose choice for one input is another graph than that for batches."""
    return choose(minilm_copy)


def alone(bundle: Bundle, chosen: dict[str, str], texts: Sequence[str]) -> Any:
    with ArrowEngine(bundle.path, device=chosen["device"], variant=chosen["variant"]) as engine:
        return engine.encode(texts)


def test_one_input_goes_to_its_own_variant_and_a_batch_does_not(both: Bundle) -> None:
    """The vectors are bit for bit those of the variant named; it opens when the first one comes."""
    with ArrowEngine(both.path) as engine:
        np.testing.assert_array_equal(engine.encode(TEXTS), alone(both, BATCHES, TEXTS))
        info = engine.device_info()
        assert (info["variant"], info["single"]["variant"]) == ("openvino-fp32", "onnx-fp32-fused")
        assert not info["single"]["open"]
        np.testing.assert_array_equal(engine.encode(TEXTS[:1]), alone(both, SINGLE, TEXTS[:1]))
        assert engine.device_info()["single"]["runtime"].startswith("onnxruntime")
        assert engine.events == ()
        part = engine.encode_each(TEXTS[:1], part=True).vectors
        np.testing.assert_array_equal(part, alone(both, BATCHES, TEXTS[:1]))
        named = engine.encode(TEXTS[:1], prompt="query: ")
        np.testing.assert_array_equal(named, alone(both, SINGLE, ["query: " + TEXTS[0]]))
        again = pickle.loads(pickle.dumps(engine))
    with again:
        np.testing.assert_array_equal(again.encode(TEXTS[:1]), alone(both, SINGLE, TEXTS[:1]))
    with pytest.raises(DeviceError, match="closed"):
        engine.encode(TEXTS[:1])
    with ArrowEngine(both.path, one_variant=True) as engine:
        assert engine.device_info()["single"] is None
        np.testing.assert_array_equal(engine.encode(TEXTS[:1]), alone(both, BATCHES, TEXTS[:1]))


def test_a_child_of_fork_opens_its_own(both: Bundle) -> None:
    """A single input of the child is answered by the same variant, and the child ends."""
    with ArrowEngine(both.path) as engine:
        right = engine.encode(TEXTS[:1])
        child = os.fork()
        if child == 0:
            same = bool(np.array_equal(engine.encode(TEXTS[:1]), right))
            os._exit(0 if same and engine.device_info()["single"]["open"] else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_what_does_not_fit_the_memory_limit_is_told_once(
    both: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend of batches answers single inputs; strict raises instead."""
    real = limits.check

    def check(bundle: Bundle, candidate: Placement, settings: Settings) -> Settings:
        if candidate.variant.name == SINGLE["variant"]:
            raise limits.OverLimit("out of memory_limit_mb=1")
        return real(bundle, candidate, settings)

    monkeypatch.setattr(limits, "check", check)
    with ArrowEngine(both.path) as engine:
        for _ in range(2):
            np.testing.assert_allclose(
                engine.encode(TEXTS[:1]), alone(both, BATCHES, TEXTS[:1]), atol=1e-6
            )
        (event,) = engine.events
        assert (event.kind, event.from_variant, event.to_variant) == (
            "memory",
            "onnx-fp32-fused",
            "openvino-fp32",
        )
        assert engine.device_info()["single"] is None
    with (
        ArrowEngine(both.path, strict=True) as engine,
        pytest.raises(DeviceError, match="memory_limit_mb=1"),
    ):
        engine.encode(TEXTS[:1])


def test_options_of_their_own_are_a_second_compilation(minilm_copy: Bundle) -> None:
    """The same graph opened with other options is another backend; equal ones are not."""
    own = {**BATCHES, "options": {"SNIPPETS_MODE": "DISABLE"}}
    bundle = choose(minilm_copy, single=own)
    with ArrowEngine(bundle.path) as engine:
        assert engine.device_info()["single"]["variant"] == "openvino-fp32"
        np.testing.assert_allclose(
            engine.encode(TEXTS[:1]), alone(bundle, BATCHES, TEXTS[:1]), atol=1e-5
        )
    options = {"openvino:openvino-fp32": {"SNIPPETS_MODE": "DISABLE"}}
    bundle = choose(bundle, single=own, options=options)
    with ArrowEngine(bundle.path) as engine:
        assert engine.device_info()["single"] is None
        assert engine.device_info()["options"]["SNIPPETS_MODE"] == "DISABLE"
    with ArrowEngine(bundle.path, openvino_options={}) as engine:
        assert "SNIPPETS_MODE" not in engine.device_info()["options"]


def test_native_code_compiled_elsewhere_is_no_choice_for_one_input(
    minilm_copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest may name it; without being asked for it is run no more than for batches."""
    graph = minilm_copy.variant("onnx-fp32")
    package = replace(graph, name="torch-aoti-fp32", format="torch-aoti", options={"device": "cpu"})
    variants = {**minilm_copy.manifest.variants, package.name: package}
    bundle = minilm_copy.update(lambda m: replace(m, variants=variants))
    bundle = choose(bundle, single={"variant": package.name, "device": "aoti"})
    assert tuned_single(bundle) is None
    monkeypatch.setattr("memopt.runtimes.selection.trusted", lambda digest: True)
    assert tuned_single(bundle) == Placement("aoti", package)


def test_a_choice_of_another_processor_is_not_taken_and_said_to_be_so(minilm_copy: Bundle) -> None:
    """Neither its variants nor its options are used here; device_info names the machine."""
    bundle = choose(minilm_copy, "linux-Other-4c-avx9")
    with ArrowEngine(bundle.path) as engine:
        info = engine.device_info()
        assert info["measured_on"] == "linux-Other-4c-avx9, not on this processor"
        assert info["single"] is None
    with ArrowEngine(choose(bundle).path) as engine:
        assert engine.device_info()["measured_on"] is None


def test_a_pack_without_the_variant_of_single_inputs_forgets_it(
    both: Bundle, tmp_path: Path
) -> None:
    """It would be a fallback, told about at every opening."""
    packed = pack(both, tmp_path / "one", target="openvino").path
    (record,) = open_bundle(packed).manifest.chosen.values()
    assert record["variant"] == "openvino-fp32"
    assert "single" not in record
    names = (BATCHES["variant"], SINGLE["variant"])
    packed = pack(both, tmp_path / "two", target="auto", variants=names).path
    (record,) = open_bundle(packed).manifest.chosen.values()
    assert record["single"] == SINGLE


def path_of(single: FakeBackend, main: FakeBackend) -> tuple[SinglePath, list[FallbackEvent]]:
    events: list[FallbackEvent] = []
    variants = fake_engine().bundle.manifest.variants

    def open_main(_: Placement) -> Backend:
        return main

    batches = Placement("cpu", variants["fake"])
    chain = BackendChain([batches], open_main, strict=False, events=events)
    return SinglePath(Placement("cpu", variants["fake-spare"]), chain, lambda _: single), events


def ask(path: SinglePath, fronts: list[tuple[str, ...]]) -> Any:
    """Send one text along the path; return its vector, None where it was not answered."""
    found: list[Any] = []

    def make(inputs: Sequence[str]) -> FrontEnd:
        fronts.append(tuple(inputs))
        return FakeFrontEnd("text")

    rest: Any = (["a cat"], lambda places, feed, rows: found.append(rows[0]), {}, None, False, True)
    answered = path.run(FakeFrontEnd("text"), make, None, rest)
    assert (answered is None) == (not found)
    return found[0] if found else None


def test_a_graph_with_other_inputs_has_a_front_end_of_its_own() -> None:
    """It is made once; where the inputs are the same the engine's own serves both."""
    fronts: list[tuple[str, ...]] = []
    single = FakeBackend(8)
    path, _ = path_of(single, FakeBackend(8))
    assert ask(path, fronts) is not None
    assert fronts == []
    single = FakeBackend(8)
    single.inputs = ("digest", "types")
    path, events = path_of(single, FakeBackend(8))
    assert ask(path, fronts) is not None
    assert ask(path, fronts) is not None
    assert fronts == [("digest", "types")]
    assert events == []


def test_a_backend_that_fails_later_is_told_once_and_left_alone() -> None:
    """So is one whose vectors are of another length."""

    def fail(run: int) -> None:
        if run > 1:
            raise RuntimeError("the driver died")

    path, events = path_of(FakeBackend(8, fail=fail), FakeBackend(8))
    assert ask(path, []) is not None
    assert ask(path, []) is None
    assert ask(path, []) is None
    assert [(e.kind, e.from_variant, e.to_variant) for e in events] == [
        ("run", "fake-spare", "fake")
    ]
    path, events = path_of(FakeBackend(4), FakeBackend(8))
    assert ask(path, []) is None
    assert "vectors of 4" in events[0].reason
