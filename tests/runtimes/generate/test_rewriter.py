"""Rewriter: transformers' own text of T5, BART and Marian, in any batch and on any provider."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from memopt import Rewriter, open_task
from memopt.bundle import Bundle, open_bundle
from memopt.cli import app
from memopt.errors import BundleError, ConfigurationError, DeviceError, ExportError, InputError
from memopt.exporters import halves
from memopt.exporters.base import export
from memopt.runtimes.generate.rules import Rules
from memopt.weights.convert import convert
from tests.parameters import mostly_slow
from tests.runtimes.generate.pair_kit import END, MODELS, greedy, write

SOURCES = ["a", "translate this: the quick brown fox", "Zwölf Boxkämpfer", "hello there"]
Rewriting = tuple[Bundle, Any]


@pytest.fixture(scope="module")
def homes() -> dict[str, Rewriting]:
    return {}


@pytest.fixture
def rewriting(
    request: pytest.FixtureRequest,
    homes: dict[str, Rewriting],
    tmp_path_factory: pytest.TempPathFactory,
) -> Rewriting:
    """A bundle with its graphs, and transformers' model; T5 unless a test says which."""
    kind = getattr(request, "param", "t5")
    if kind not in homes:
        home = tmp_path_factory.mktemp(kind)
        model = write(home / "source", kind)
        bundle = convert(home / "source", home / "bundle")
        export(bundle)
        export(open_bundle(bundle.path), format="openvino")
        homes[kind] = open_bundle(bundle.path), model
    return homes[kind]


def ids(engine: Rewriter, texts: list[str]) -> list[list[int]]:
    return [list(engine._tokenizer.encode(text).ids) for text in texts]


@pytest.mark.parametrize("rewriting", mostly_slow(MODELS, "t5"), indirect=True)
def test_every_kind_writes_what_transformers_writes(rewriting: Rewriting) -> None:
    """Each row of a batch of several lengths is transformers' own, and what it is alone."""
    bundle, model = rewriting
    assert bundle.manifest.task == "text2text-generation"
    for device, variant in (("cpu", "onnx-fp32"), ("openvino", "openvino-fp32")):
        record = bundle.variant(variant).check
        assert record is not None
        assert record["min_cosine"] >= 0.99999
        assert record["greedy_tokens"] > 30
        with Rewriter(bundle, device, variant, strict=True) as engine:
            found = engine.generate(SOURCES, max_new_tokens=32)
            wanted = greedy(model, ids(engine, SOURCES), 32)
            assert [list(g.tokens) for g in found] == wanted
            assert len({len(row) for row in wanted}) > 1 or len(wanted[0]) >= 31
            for text, beside in zip(SOURCES, found, strict=True):
                alone = engine.generate(text, max_new_tokens=32)[0]
                assert (alone.tokens, alone.finish) == (beside.tokens, beside.finish)
                assert alone.prompt_tokens == len(ids(engine, [text])[0])


def test_a_stream_stop_strings_and_seeds_are_the_generators_own(rewriting: Rewriting) -> None:
    """The loop is shared: pieces make the text, a stop string ends it, a seed repeats."""
    with open_task(rewriting[0]) as engine:
        assert isinstance(engine, Rewriter)
        whole = engine.generate("hello there", max_new_tokens=30)[0].text
        assert "".join(engine.stream("hello there", max_new_tokens=30)) == whole
        stopped = engine.generate("hello there", max_new_tokens=30, stop=whole[5:8])[0]
        assert (stopped.text, stopped.finish) == (whole[: whole.index(whole[5:8])], "stop")
        drawn = [engine.generate("a", temperature=1.2, seed=4, max_new_tokens=9) for _ in "ab"]
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("at", [1, 9])
def test_the_next_provider_goes_on_at_the_same_token(rewriting: Rewriting, at: int) -> None:
    """A backend that dies in the middle of two texts loses and doubles nothing, and is told."""
    bundle, model = rewriting
    with Rewriter(bundle, "cpu", "onnx-fp32") as engine:
        wanted = greedy(model, ids(engine, SOURCES[:2]), 20)
        decoder: Any = engine._chain.backend
        forward, calls = decoder.forward, [0]

        def dying(tokens: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise RuntimeError("the device is gone")
            return forward(tokens)

        decoder.forward = dying
        found = engine.generate(SOURCES[:2], max_new_tokens=20)
        assert [list(g.tokens) for g in found] == wanted
        assert "the device is gone" in engine.events[0].reason


@pytest.mark.parametrize(
    "rewriting", [pytest.param("marian", marks=pytest.mark.slow)], indirect=True
)
def test_beams_of_a_checkpoint_are_told(
    rewriting: Rewriting, caplog: pytest.LogCaptureFixture
) -> None:
    """What generation_config.json asks for and is not there is one line of the log."""
    with caplog.at_level(logging.WARNING), Rewriter(rewriting[0]):
        assert "num_beams 6" in caplog.text


def test_bad_input_is_one_line(rewriting: Rewriting, tmp_path: Path) -> None:
    """Empty texts, beams, speculation and forms that cannot be are named."""
    with Rewriter(rewriting[0]) as engine:
        engine._stated = 12
        with pytest.raises(InputError, match="prompt 1 has 21 tokens, and the encoder reads 12"):
            engine.generate(["a", "x" * 20])
        with pytest.raises(ConfigurationError, match="num_beams is of beam search"):
            engine.generate("a", num_beams=4)
        with pytest.raises(ConfigurationError, match="speculate"):
            engine.generate("a", speculate=4)
        with pytest.raises(InputError, match="prompt 0 is int"):
            engine.generate([3])  # type: ignore[list-item]
        decoder: Any = engine._chain.backend
        decoder.forward = lambda tokens: np.full((1, 259), np.nan, np.float32)
        engine._chain.strict = True
        with pytest.raises(DeviceError, match="not numbers"):
            engine.generate("a")


def test_the_command_writes_what_the_engine_does(rewriting: Rewriting) -> None:
    """``memopt generate`` opens the engine of the bundle's task."""
    path = str(rewriting[0].path)
    with Rewriter(path) as engine:
        wanted = engine.generate("hello there", max_new_tokens=9)[0]
    result = CliRunner().invoke(
        app, ["generate", path, "hello there", "--max-tokens", "9", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == list(wanted.tokens)


def test_what_is_made_of_one_graph_is_refused_by_name(rewriting: Rewriting, tmp_path: Path) -> None:
    """Fewer bits and measures of a text that two graphs write are not there, and it is said so."""
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    path, texts = str(rewriting[0].path), ["--calibration", str(tmp_path / "texts.txt")]
    for command in (["bench", path], ["optimize", path, *texts], ["quantize", path, *texts]):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, ConfigurationError), result.output
        assert "task text2text-generation" in str(result.exception)


def test_a_graph_that_forgets_its_source_is_refused(
    rewriting: Rewriting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong encoder is found by the check, and no file is written."""
    write(tmp_path / "source", "t5")
    bundle = convert(tmp_path / "source", tmp_path / "bundle")
    kept = halves.kept
    monkeypatch.setattr(halves, "kept", lambda cache: tuple(v * 1.01 for v in kept(cache)))
    with pytest.raises(ExportError, match="does not give the answers of torch"):
        export(bundle)
    assert not (bundle.path / "onnx").exists()


def test_an_embedding_of_its_encoder_is_another_bundle(rewriting: Rewriting) -> None:
    """A task that the bundle was not converted for is refused with the way there."""
    with pytest.raises(BundleError, match=r"open it with .*Rewriter, or run: memopt generate"):
        open_engine(rewriting[0])


def open_engine(bundle: Bundle) -> Any:
    from memopt import ArrowEngine

    return ArrowEngine(bundle)


@pytest.mark.parametrize(
    ("rules", "seen", "allowed"),
    [
        (Rules(no_repeat=2), [3, 4, 3], {0, 1, 2, 3, 5}),
        (Rules(bad=((2,), (4, 5))), [4], {0, 1, 3, 4}),
        (Rules(ends=frozenset({END}), min_length=3), [0, 3], {0, 2, 3, 4, 5}),
        (Rules(ends=frozenset({END}), min_new=2, begin=2), [0, 3, 3], {0, 2, 3, 4, 5}),
        (Rules(forced_last=END, last=3), [0, 3], {END}),
        (Rules(begin_suppressed=(3,), suppressed=(5,)), [0], {0, 1, 2, 4}),
        (Rules(begin_suppressed=(3,), forced_first=3), [0], {3}),
    ],
)
def test_a_rule_forbids_its_tokens(rules: Rules, seen: list[int], allowed: set[int]) -> None:
    """Each setting of generation_config.json leaves the tokens that transformers leaves."""
    scores = rules(np.arange(6.0), seen)
    assert set(np.flatnonzero(np.isfinite(scores))) == allowed
