"""Transcriber: transformers' own tokens and segments of sounds short and long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from memopt import Transcriber, open_task
from memopt.bundle import Bundle, open_bundle
from memopt.cli import app
from memopt.errors import ConfigurationError, InputError
from memopt.exporters.base import export
from memopt.runtimes.engines.transcriber import Transcription
from memopt.weights.convert import convert
from tests.runtimes.generate.speech_kit import END, MARKS, RATE, heard, sound, write

Hearing = tuple[Bundle, Any]
VARIANTS = [("cpu", "onnx-fp32"), ("openvino", "openvino-fp32")]


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Hearing:
    """A Whisper's bundle with its graphs, and transformers' model."""
    home = tmp_path_factory.mktemp("hearing")
    model = write(home / "source")
    bundle = convert(home / "source", home / "bundle")
    export(bundle)
    export(open_bundle(bundle.path), format="openvino")
    return open_bundle(bundle.path), model


def same(found: Transcription, wanted: tuple[list[Any], list[Any]], seconds: float) -> None:
    own, segments = wanted
    written = [token for part in found.segments for token in part.tokens]
    assert [token for token in written if token != END] == own
    assert [list(part.tokens) for part in found.segments] == [s[2] for s in segments]
    times = [min(t, seconds) for s in segments for t in s[:2]]
    own_times = [at for part in found.segments for at in (part.start, part.end)]
    assert own_times == pytest.approx(times, abs=0.0201)  # one mark: see test_speech.py


@pytest.mark.parametrize(("device", "variant"), VARIANTS)
def test_tokens_and_segments_are_transformers_own(
    hearing: Hearing, device: str, variant: str
) -> None:
    """With and without marks of time, a language heard or given, in one window and in several."""
    bundle, model = hearing
    assert bundle.manifest.task == "automatic-speech-recognition"
    record = bundle.variant(variant).check
    assert record is not None
    assert record["greedy_tokens"] > 30
    cases: list[tuple[float, dict[str, Any]]] = [
        (1.3, {}),
        (2.0, {"language": "de"}),
        (1.0, {"timestamps": True}),
        (1.7, {"timestamps": True, "language": "en", "task": "translate"}),
        (5.3, {"timestamps": True, "language": "de"}),
    ]
    with Transcriber(bundle, device, variant, strict=True) as engine:
        for seconds, options in cases:
            wave = sound(seconds)
            told = {
                ("return_timestamps" if k == "timestamps" else k): v for k, v in options.items()
            }
            wanted = heard(model, bundle.path, wave, **told)
            (found,) = engine.transcribe(wave, **options)
            same(found, wanted, seconds)
            assert found.language == options.get("language", found.language)
            assert found.seconds == pytest.approx(seconds)


def test_a_batch_gives_each_sound_its_own(hearing: Hearing) -> None:
    """Sounds of any lengths together are what each is alone; a stream has the same segments."""
    waves = [sound(s, seed) for seed, s in enumerate((0.4, 5.1, 2.0, 3.2))]
    done: list[tuple[float, float]] = []
    with open_task(hearing[0]) as engine:
        assert isinstance(engine, Transcriber)
        together = engine.transcribe(waves, progress=lambda *both: done.append(both))
        assert [engine.transcribe(wave)[0] for wave in waves] == together
        assert tuple(engine.stream(waves[1])) == together[1].segments
    assert len(together[1].segments) > 1
    assert done[-1] == (pytest.approx(10.7), pytest.approx(10.7))
    assert [a for a, _ in done] == sorted(a for a, _ in done)


def test_the_next_provider_goes_on_in_the_window(hearing: Hearing) -> None:
    """A backend that dies in the middle of a window loses nothing, and it is told."""
    bundle = hearing[0]
    wave = sound(3.0)
    with Transcriber(bundle, "cpu", "onnx-fp32") as engine:
        wanted = engine.transcribe(wave)
        decoder: Any = engine._chain.backend
        forward, calls = decoder.forward, [0]

        def dying(tokens: Any) -> Any:
            calls[0] += 1
            if calls[0] == 12:
                raise RuntimeError("the device is gone")
            return forward(tokens)

        decoder.forward = dying
        assert engine.transcribe(wave) == wanted
        assert "the device is gone" in engine.events[0].reason


def test_other_rates_and_channels_are_heard_alike(hearing: Hearing, tmp_path: Path) -> None:
    """A file, its bytes, two channels and (samples, rate) give one text."""
    import soundfile

    wave = sound(1.5)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], 1), RATE, subtype="FLOAT")
    with Transcriber(hearing[0]) as engine:
        wanted = engine.transcribe(wave)[0].segments
        given = [tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes(), (wave, RATE)]
        assert [found.segments for found in engine.transcribe(given)] == [wanted] * 3
        half = engine.transcribe((wave[::2], RATE // 2))[0]
        assert half.seconds == pytest.approx(1.5)


BAD: list[tuple[Callable[[Path], Any], dict[str, Any], str]] = [
    (lambda _: np.zeros(0, np.float32), {}, "sound 0 is empty"),
    (lambda _: (np.zeros(0, np.float32), 16_000), {}, "sound 0 is empty"),
    (lambda _: (np.zeros(9, np.float32), 0), {}, "sound 0 is tuple"),
    (lambda _: (np.zeros(9, np.float32), "fast"), {}, "sound 0 is tuple"),
    (lambda _: 7, {}, "sound 0 is int"),
    (lambda _: np.full(99, np.nan, np.float32), {}, "NaN or infinity"),
    (lambda folder: folder / "none.wav", {}, "sound 0 cannot be read"),
    (lambda _: np.zeros(99, np.float32), {"language": "xx"}, "language 'xx'"),
    (lambda _: np.zeros(99, np.float32), {"task": "sing"}, "task 'sing'"),
    (lambda _: np.zeros(99, np.float32), {"max_new_tokens": 0}, "max_new_tokens is 0"),
]


def test_bad_input_is_one_line(hearing: Hearing, tmp_path: Path) -> None:
    """Empty and broken sounds, wrong rates, unknown languages and tasks are named."""
    with Transcriber(hearing[0]) as engine:
        for make, options, words in BAD:
            with pytest.raises((InputError, ConfigurationError), match=words):
                engine.transcribe(make(tmp_path), **options)


def test_the_command_prints_text_segments_or_json(hearing: Hearing, tmp_path: Path) -> None:
    """``memopt transcribe`` says what the engine does."""
    import soundfile

    file = tmp_path / "a.wav"
    soundfile.write(file, sound(3.0), RATE, subtype="FLOAT")
    path = str(hearing[0].path)
    with Transcriber(path) as engine:
        (wanted,) = engine.transcribe(file)
    result = CliRunner().invoke(app, ["transcribe", path, str(file), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["text"], found["language"]) == (wanted.text, wanted.language)
    assert [part["end"] for part in found["segments"]] == [part.end for part in wanted.segments]
    assert all(token < MARKS for token in wanted.text.encode())
    result = CliRunner().invoke(app, ["transcribe", path, str(file), "--timestamps"])
    assert result.stdout.count(" s to ") == len(wanted.segments)
