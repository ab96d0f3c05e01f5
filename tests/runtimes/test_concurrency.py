"""Threads, coroutines and streams change the speed, never the answer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError
from memopt.runtimes import limits
from memopt.runtimes.base import Placement
from memopt.runtimes.cpu import machine_key
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.testing import FakeBackend, fake_engine
from memopt.runtimes.tune import tune_streams

TEXTS = [f"sentence number {i} " + "of many " * (i % 9) for i in range(90)]


def test_concurrent_callers_share_batches() -> None:
    """Twenty coroutines at once need far fewer runs than twenty, and each gets its own vectors."""
    backend = FakeBackend(8)
    engine = fake_engine(8, open_backend=lambda candidate: backend)
    right = engine.encode(TEXTS[:40])
    before = backend.runs

    async def ask() -> list[np.ndarray]:
        pairs = [TEXTS[i : i + 2] for i in range(0, 40, 2)]
        return await asyncio.gather(*(engine.aencode(pair) for pair in pairs))

    answers = asyncio.run(ask())
    np.testing.assert_array_equal(np.concatenate(answers), right)
    assert backend.runs - before <= 5
    engine.close()


def test_a_lonely_request_is_answered() -> None:
    """It does not wait for others that never come; nothing to encode needs no wait at all."""
    engine = fake_engine(8)
    vectors = asyncio.run(engine.aencode("alone", normalize=False))
    np.testing.assert_array_equal(vectors, engine.encode("alone", normalize=False))
    assert asyncio.run(engine.aencode([])).shape == (0, 8)


def test_a_bad_input_fails_its_own_caller_only() -> None:
    """The position in the message is that in the caller's list."""
    engine = fake_engine(8)

    async def ask() -> list[Any]:
        requests = (engine.aencode(["a", "b"]), engine.aencode(["c", 3]), engine.aencode(["d"]))
        return await asyncio.gather(*requests, return_exceptions=True)

    good, bad, also_good = asyncio.run(ask())
    assert isinstance(bad, InputError)
    assert "input 1 is int" in str(bad)
    np.testing.assert_array_equal(good, engine.encode(["a", "b"]))
    np.testing.assert_array_equal(also_good, engine.encode(["d"]))


def test_a_cancelled_caller_disturbs_nobody() -> None:
    """The others of its batch get their answers."""
    engine = fake_engine(8)

    async def ask() -> np.ndarray:
        lost = asyncio.ensure_future(engine.aencode(["x"]))
        kept = asyncio.ensure_future(engine.aencode(["y"]))
        await asyncio.sleep(0)
        lost.cancel()
        return await kept

    np.testing.assert_array_equal(asyncio.run(ask()), engine.encode(["y"]))


def test_closing_answers_what_waits_and_refuses_the_rest() -> None:
    """After close(), aencode raises DeviceError."""
    engine = fake_engine(8)
    asyncio.run(engine.aencode(["a"]))
    engine.close()
    with pytest.raises(DeviceError, match="closed"):
        asyncio.run(engine.aencode(["a"]))


@pytest.mark.parametrize("variant", ["onnx-fp32-fused", "openvino-fp32"])
def test_threads_and_coroutines_together(minilm: Bundle, variant: str) -> None:
    """8 threads and 64 coroutines on one engine, for a few rounds: all equal to serial."""
    with ArrowEngine(minilm, variant=variant, max_delay_ms=5) as engine:
        right = dict(zip(TEXTS, engine.encode(TEXTS), strict=True))
        wrong: list[str] = []

        def check(texts: list[str], vectors: np.ndarray) -> None:
            for text, vector in zip(texts, vectors, strict=True):
                if np.abs(vector - right[text]).max() > 1e-5:
                    wrong.append(text)

        def work(number: int) -> None:
            for turn in range(3):
                texts = TEXTS[number + turn :: 8]
                check(texts, engine.encode(texts))

        async def ask(number: int) -> None:
            for turn in range(2):
                texts = [TEXTS[(number + 7 * turn) % len(TEXTS)]]
                check(texts, await engine.aencode(texts))

        async def all_of_them() -> None:
            await asyncio.gather(*(ask(number) for number in range(64)))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        asyncio.run(all_of_them())
        for thread in threads:
            thread.join()
        assert not wrong
        assert engine.events == ()


@pytest.mark.parametrize("variant", ["onnx-fp32-fused", "openvino-fp32"])
def test_streams_change_nothing_but_are_used(minilm: Bundle, variant: str) -> None:
    """Two streams give the vectors of one, to 1e-5."""
    with ArrowEngine(minilm, variant=variant, streams=1, threads=2) as one:
        right = one.encode(TEXTS)
    with ArrowEngine(minilm, variant=variant, streams=2, threads=2) as two:
        assert two.device_info()["streams"] == 2
        np.testing.assert_allclose(two.encode(TEXTS), right, atol=1e-5)
        np.testing.assert_allclose(two.encode(TEXTS[:1]), right[:1], atol=1e-5)


def test_the_tuned_number_of_streams_is_remembered(minilm_copy: Bundle) -> None:
    """It is measured, written for this machine, kept beside optimize's choice, and used."""
    choice = {"variant": "onnx-fp32", "device": "cpu", "why": "test"}
    from dataclasses import replace

    bundle = minilm_copy.update(lambda m: replace(m, chosen={machine_key(): choice}))
    tuning = tune_streams(bundle, TEXTS[:30], device="cpu", variant="onnx-fp32-fused", threads=2)
    assert set(tuning.items_per_second) == {1, 2}
    assert all(rate > 0 for rate in tuning.items_per_second.values())
    best = max(tuning.items_per_second, key=lambda count: tuning.items_per_second[count])
    assert tuning.streams in (1, best)
    with ArrowEngine(bundle.path, device="cpu", variant="onnx-fp32-fused") as engine:
        assert engine.device_info()["streams"] == tuning.streams
        record = engine.bundle.manifest.chosen[machine_key()]
    assert record["variant"] == "onnx-fp32"
    with pytest.raises(InputError, match="no inputs"):
        tune_streams(bundle, [])


def test_a_process_that_shares_its_cores_keeps_the_usual_streams(minilm_copy: Bundle) -> None:
    """One stream was as fast with nothing beside it; more than the usual are taken as measured."""
    from dataclasses import replace

    name = "cpu:onnx-fp32-fused"
    for measured, shared in ((1, 2), (4, 4)):
        record = {"streams": {name: measured}}
        bundle = minilm_copy.update(lambda m, r=record: replace(m, chosen={machine_key(): r}))
        for shares, expected in ((False, measured), (True, shared)):
            with ArrowEngine(
                bundle, device="cpu", variant="onnx-fp32-fused", threads=2, shares_cores=shares
            ) as engine:
                assert engine.device_info()["streams"] == expected


def test_a_memory_limit_moves_on_to_what_fits(minilm: Bundle) -> None:
    """A limit below every need is told with numbers; a generous one changes nothing."""
    with pytest.raises(DeviceError, match=r"memory_limit_mb=50"):
        ArrowEngine(minilm, device="cpu", memory_limit_mb=50)
    roomy = limits.resident_mb() + 4000
    with ArrowEngine(minilm, device="cpu", memory_limit_mb=roomy) as engine:
        assert engine.events == ()
    for bad in ({"threads": 0}, {"memory_limit_mb": -1}, {"vram_threshold": 1.5}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            ArrowEngine(minilm, **bad)  # type: ignore[arg-type]


def test_a_variant_over_the_limit_hands_on_to_a_smaller_one(
    minilm_copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event says memory, and which variant fits."""
    small = minilm_copy.manifest.variants["onnx-fp32"]
    big = minilm_copy.file(minilm_copy.variant("onnx-fp32-fused"))
    with big.open("ab") as file:
        file.truncate(big.stat().st_size + (500 << 20))  # a sparse tail: 500 MB more
    monkeypatch.setattr(limits, "resident_mb", lambda: 100.0)
    limited = ArrowEngine(minilm_copy, device="cpu", memory_limit_mb=400, verify="never")
    with limited as engine:
        assert engine.device_info()["variant"] == small.name
        (event,) = engine.events
        assert (event.from_variant, event.kind) == ("onnx-fp32-fused", "memory")


def test_a_full_gpu_is_left_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi's numbers decide: over the threshold the GPU is not opened."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 7500, 8000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert limits.vram() == limits.Vram(7500, 8000)
    with pytest.raises(limits.OverLimit, match=r"7500 of 8000 MB.*vram_threshold=0\.9"):
        limits.check_vram(0.9, 100)
    tool.write_text("#!/bin/sh\necho 1000, 8000\n")
    assert limits.check_vram(0.9, 100) == pytest.approx(6200)
    tool.write_text("#!/bin/sh\necho no devices were found\n")
    assert limits.check_vram(0.9, 100) is None
    assert limits.process_vram_mb(1) is None
    tool.write_text("#!/bin/sh\necho 7, 100\necho 8, 50\necho 7, 20\n")
    assert limits.process_vram_mb(7) == pytest.approx(120)
    assert limits.process_vram_mb(9) == 0


def test_an_engine_needs_an_encoder(minilm: Bundle) -> None:
    """A language model's bundle is refused with the reason."""
    from dataclasses import replace

    manifest = replace(minilm.manifest, task="text-generation")
    with pytest.raises(BundleError, match="text-generation"):
        ArrowEngine(Bundle(minilm.path, manifest))


def test_the_fake_follows_the_real_contract() -> None:
    """A fake backend that fails twice is passed over like a real one."""
    opened: list[str] = []

    def open_backend(candidate: Placement) -> FakeBackend:
        opened.append(candidate.variant.name)
        if len(opened) == 1:
            raise RuntimeError("first one is broken")
        return FakeBackend(8)

    engine = fake_engine(8, open_backend=open_backend)
    assert [event.kind for event in engine.events] == ["open"]
    assert engine.encode(["a"]).shape == (1, 8)
