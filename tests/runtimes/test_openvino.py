"""The OpenVINO backend by itself: graphs of fixed shapes beside the one of any shape."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from memopt import ArrowEngine
from memopt.bundle import Bundle
from memopt.errors import DeviceError
from memopt.graphs.session import open_openvino
from memopt.runtimes import openvino, openvino_core, openvino_shapes
from memopt.runtimes.openvino import OpenvinoBackend

SHORT, LONGER = "A cat sleeps.", "The box by the window " + "runs a small model and " * 8


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed graphs after two texts, for a model of any size."""
    monkeypatch.setattr(openvino, "SINGLES_BEFORE_FIXED", 2)
    monkeypatch.setattr(openvino, "_MOST_FIXED_BYTES", 1 << 40)


def backend_of(engine: ArrowEngine) -> OpenvinoBackend:
    backend = engine._chain.backend
    assert isinstance(backend, OpenvinoBackend)
    return backend


def wait_for_graphs(backend: OpenvinoBackend, count: int) -> None:
    assert backend._fixed is not None
    while len(backend._fixed._ready) < count:
        time.sleep(0.02)
    assert len(backend._fixed._ready) == count


def test_frequent_shapes_get_their_own_graph(minilm: Bundle, eager: None) -> None:
    """The same vectors, by a graph that is really used."""
    with ArrowEngine(minilm, device="openvino", variant="openvino-fp32") as engine:
        before = [engine.encode([text]) for text in (SHORT, LONGER)]
        backend = backend_of(engine)
        for count, text in enumerate((SHORT, LONGER), 1):
            engine.encode([text])
            engine.encode([text])
            wait_for_graphs(backend, count)
        compiled = backend._single
        backend._single = None  # type: ignore[assignment]
        after = [engine.encode([text]) for text in (SHORT, LONGER)]
        backend._single = compiled
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_fixed_graph_that_fails_changes_nothing(
    minilm: Bundle, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of any shape goes on, and it is said once."""

    compiled = OpenvinoBackend._compile

    def broken(self: OpenvinoBackend, streams: int, shape: tuple[int, ...] | None = None) -> Any:
        if shape is not None:
            raise RuntimeError("no memory")
        return compiled(self, streams)

    said: list[str] = []
    log = openvino_shapes._LOG
    monkeypatch.setattr(OpenvinoBackend, "_compile", broken)
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    with ArrowEngine(minilm, device="openvino", variant="openvino-fp32") as engine:
        first = engine.encode([SHORT])
        for _ in range(3):
            np.testing.assert_array_equal(engine.encode([SHORT]), first)
    assert any("no memory" in text for text in said)


def test_engines_of_one_model_share_what_is_compiled(minilm: Bundle) -> None:
    """Weights and buffers are there once; the first engine's end leaves the second working."""
    first = ArrowEngine(minilm, device="openvino", variant="openvino-fp32")
    second = ArrowEngine(minilm, device="openvino", variant="openvino-fp32")
    fewer = ArrowEngine(minilm, device="openvino", variant="openvino-fp32", threads=1)
    assert backend_of(first)._single is backend_of(second)._single
    assert backend_of(fewer)._single is not backend_of(first)._single
    right = first.encode([SHORT, LONGER])
    users = backend_of(second)._single.users
    first.close()
    first.close()
    assert backend_of(second)._single.users == users - 1
    np.testing.assert_array_equal(second.encode([SHORT, LONGER]), right)
    second.close()
    fewer.close()


def test_ctrl_c_after_graphs_closed_in_their_order_is_an_interrupt(minilm: Bundle) -> None:
    """OpenVINO leaves the thread a freed stack for signal handlers: a SIGSEGV at the next one."""
    script = f"""
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
from memopt.graphs.session import open_openvino
from memopt.runtimes.openvino_core import open_core, same_signal_stack
graphs = [open_openvino({str(minilm.file(minilm.variant("openvino-fp32")))!r}, [0], {{}})]
with same_signal_stack():  # as around what nncf opens by itself
    import openvino
    theirs = openvino.Core()
    theirs.get_versions("CPU")
graphs.append(open_core())
graphs.pop(0)
del theirs
graphs.pop(0)
try:
    os.kill(os.getpid(), 2)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.stdout == b"interrupted\n", done


def test_an_option_of_speed_that_this_openvino_lacks_is_left_out_aloud(
    minilm: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bundle made with another release opens; an option that changes answers is not left out."""
    monkeypatch.setattr(openvino_core, "_OF_SPEED", {"GONE_BY_NOW"})
    wanted = {"GONE_BY_NOW": "YES", "ENABLE_HYPER_THREADING": "NO"}
    usual: dict[str, Any] = {"device": "openvino", "variant": "openvino-fp32", "strict": True}
    with ArrowEngine(minilm, **usual) as plain:
        expected = plain.encode([SHORT])
    with ArrowEngine(minilm, **usual, openvino_options=wanted) as engine:
        np.testing.assert_allclose(engine.encode([SHORT]), expected, atol=1e-5)
        compiled = backend_of(engine)._single.compiled
        assert compiled.get_property("ENABLE_HYPER_THREADING") is False
    assert "has no GONE_BY_NOW: opened without it" in caplog.text
    caplog.clear()
    graph = minilm.file(minilm.variant("openvino-fp32"))  # as quantizing opens it
    open_openvino(graph, [0], {"GONE_BY_NOW": "YES"})
    assert "has no GONE_BY_NOW: opened without it" in caplog.text
    with pytest.raises(DeviceError, match="Unsupported property UNHEARD"):
        ArrowEngine(minilm, **usual, openvino_options={"UNHEARD": "YES"}).encode([SHORT])
