"""Engines in children of fork(), in spawned workers, and after the working folder changed."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle, Variant, open_bundle
from memopt.errors import DeviceError
from memopt.runtimes.base import Placement
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.testing import FakeBackend, fake_engine

PATIENCE = 120  # seconds; only a child that hangs needs them
RUNTIMES = (
    ("cpu", "onnx-fp32"),
    ("openvino", "openvino-fp32"),
    pytest.param("torch", "auto", marks=pytest.mark.slow),
)


def run(script: str, *arguments: object) -> str:
    """Run a script in a process of its own and return what it printed; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("device", "variant"), RUNTIMES)
def test_a_child_of_fork_answers_as_its_parent_and_ends(
    minilm: Bundle, device: str, variant: str
) -> None:
    """Streams were running before the fork; the child opens its own and leaves by sys.exit."""
    script = """
        import os, sys
        import numpy as np
        from memopt import ArrowEngine
        path, device, variant = sys.argv[1:]
        texts = [f"a kettle boils {n}" for n in range(200)]
        engine = ArrowEngine(path, device=device, variant=variant, threads=2)
        unused = ArrowEngine(path, device=device, variant=variant, threads=2)
        right = engine.encode(texts)
        unused.encode(texts)
        if (child := os.fork()) == 0:
            assert engine.device_info()["device"] == device and engine.events == ()
            np.testing.assert_allclose(engine.encode(texts), right, atol=1e-6)
            engine.close()
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        np.testing.assert_allclose(engine.encode(texts[:3]), right[:3], atol=1e-6)
    """
    assert run(script, minilm.path, device, variant).split() == ["0"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_way_of_multiprocessing_hands_an_engine_to_workers(
    minilm: Bundle, method: str, tmp_path: Path
) -> None:
    """A pool of two workers gives the parent's vectors, the engine being an argument."""
    script = tmp_path / "pool.py"  # spawn imports it again
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import numpy as np
        from memopt import ArrowEngine

        def work(engine, queue):
            queue.put(engine.encode(["a cat", "a dog"]))

        if __name__ == "__main__":
            path, method = sys.argv[1:]
            engine = ArrowEngine(path, device="cpu", variant="onnx-fp32", threads=1)
            right = engine.encode(["a cat", "a dog"])
            context = multiprocessing.get_context(method)
            queue = context.Queue()
            workers = [context.Process(target=work, args=(engine, queue)) for _ in range(2)]
            for worker in workers: worker.start()
            for _ in workers: np.testing.assert_allclose(queue.get(timeout=100), right, atol=1e-6)
            for worker in workers: worker.join()
            assert [worker.exitcode for worker in workers] == [0, 0]
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(minilm.path), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert done.returncode == 0, done.stderr


def test_gunicorn_with_preload_serves_and_stops(minilm: Bundle, tmp_path: Path) -> None:
    """The engine is opened and used in the master; its workers answer and end when told to."""
    (tmp_path / "app.py").write_text(
        textwrap.dedent(f"""
        import json
        from memopt import ArrowEngine
        engine = ArrowEngine({str(minilm.path)!r}, device="cpu", variant="onnx-fp32")
        engine.encode(["warm"] * 200)

        def app(environ, start):
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(engine.encode(["a cat"])[0].tolist()).encode()]
        """)
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        os.set_inheritable(server.fileno(), True)
        master = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--preload", "-w", "2", "-t", "90"),
                *("--graceful-timeout", "90", "-b", f"fd://{server.fileno()}", "app:app"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            pass_fds=(server.fileno(),),
            stderr=(tmp_path / "log").open("w"),
        )
        try:
            # The socket listens already: the request waits until a worker takes it.
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            client.request("GET", "/")
            answer = client.getresponse()
            assert answer.status == 200
            vector = np.array(json.loads(answer.read()), np.float32)
            client.close()
            master.terminate()
            assert master.wait(PATIENCE) == 0
        finally:
            master.kill()
    with ArrowEngine(minilm, device="cpu", variant="onnx-fp32") as engine:
        np.testing.assert_allclose(vector, engine.encode(["a cat"])[0], atol=1e-6)
    assert "WORKER TIMEOUT" not in (tmp_path / "log").read_text()


def test_importing_starts_no_thread_that_reports_usage() -> None:
    """onnxruntime's telemetry is off: a process that imported it forks and exits."""
    script = """
        import os, sys
        import memopt, onnxruntime
        if (child := os.fork()) == 0:
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(os.environ["ORT_DISABLE_TELEMETRY"])
    """
    assert run(script).split() == ["0", "1"]


def _chain(provider: str, *, strict: bool = False) -> tuple[BackendChain, list[FallbackEvent]]:
    variant = Variant(name="v", format="onnx", precision="fp32", file="f")
    events: list[FallbackEvent] = []
    rungs = [Placement(name, variant) for name in (provider, "cpu")]
    made = BackendChain(rungs, lambda c: FakeBackend(8), strict=strict, events=events)
    return made, events


def test_a_gpu_is_not_tried_again_in_a_child() -> None:
    """CUDA cannot start twice over a fork: the CPU takes over and says so; strict raises."""
    chain, events = _chain("cuda")
    chain.after_fork()
    assert chain.candidate.provider == "cpu"
    assert [(e.from_, e.to, e.kind) for e in events] == [("cuda", "cpu", "open")]
    assert "fork" in events[0].reason
    strict, _ = _chain("cuda", strict=True)
    strict.after_fork()
    with pytest.raises(DeviceError, match=r"fork.*spawn"):
        strict.run({})


def test_closing_in_a_child_leaves_the_parents_session_alone() -> None:
    """Neither close() nor a request after it touches what the parent opened."""
    chain, _ = _chain("cpu")
    parents = chain.backend
    chain.after_fork()
    chain.close()
    with pytest.raises(DeviceError, match="closed"):
        chain.run({})
    digest = np.zeros((1, 32), np.uint8)
    assert parents.submit({"digest": digest}).result().shape == (1, 8)


def test_a_child_gives_up_what_waits_in_the_parents_queue() -> None:
    """aencode() in a child uses a queue of its own."""
    import asyncio

    engine = fake_engine(dimension=8)
    before = asyncio.run(engine.aencode(["a cat"]))
    engine.after_fork()
    np.testing.assert_array_equal(asyncio.run(engine.aencode(["a cat"])), before)


def test_an_engine_works_on_after_the_working_folder_changed(
    minilm: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by a relative path, its tokenizer and streams are opened from elsewhere."""
    monkeypatch.chdir(minilm.path.parent)
    engine = ArrowEngine(minilm.path.name, device="cpu", variant="onnx-fp32", threads=2)
    relative = open_bundle(minilm.path.name)
    other = ArrowEngine(relative, device="openvino", variant="openvino-fp32", threads=2)
    monkeypatch.chdir(tmp_path)
    texts = [f"text {n}" * (n % 7 + 1) for n in range(300)]
    np.testing.assert_allclose(engine.encode(texts), other.encode(texts), atol=1e-4)
    again = pickle.loads(pickle.dumps(engine))
    np.testing.assert_array_equal(again.encode(texts[:2]), engine.encode(texts[:2]))
