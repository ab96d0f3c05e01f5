"""memopt memory worker: by schedule, by size, until it is told to stop; and who is told what."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from tests.memory.test_commands import memopt

TEXTS = ("The surgery is on Monday at the clinic.", "On Monday the surgery is at the clinic.")


def hot_store(folder: Path, made: datetime | None = None) -> Path:
    """A store of two hot memories that say the same."""
    clock = (lambda: made) if made else None
    with MemoryStore(folder, dim=4, **({"clock": clock} if clock else {})) as store:  # type: ignore[arg-type]
        rows = [
            NewMemory(content=Content(text=text), embedding=np.array([1, 0.01 * at, 0, 0]))
            for at, text in enumerate(TEXTS)
        ]
        store.touch(list(store.add(rows).ids) * 10)
    return folder


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMOPT_CONFIG", raising=False)


def test_a_store_that_is_too_large_is_consolidated_while_the_worker_watches(tmp_path: Path) -> None:
    """The pressure of the settings starts a run, a line tells of it, SIGTERM ends the watch."""
    store = hot_store(tmp_path / "s")
    settings = {
        "MEMOPT_CONSOLIDATION__TIME_BASED_ENABLED": "false",
        "MEMOPT_CONSOLIDATION__PRESSURE_THRESHOLD_MB": "0.000001",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "memopt", "memory", "worker", str(store), "--json"],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "more than 1e-06 MB" in process.stderr.readline()
        line = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "stopped\n"
    assert process.returncode == 0
    assert (line["why"], line["scanned"], line["condensed"]) == ("pressure", 2, 2)
    assert line["bytes_after"] > 0


def test_a_schedule_that_was_missed_is_caught_up_once(tmp_path: Path) -> None:
    """--once runs for a store whose schedule had its moment, and then has nothing to do."""
    store = hot_store(tmp_path / "s", made=datetime(2020, 1, 1, tzinfo=UTC))
    Path("memopt.yaml").write_text("consolidation: {pressure_based_enabled: false}\n")
    first = memopt("worker", store, "--once", "--json")
    assert json.loads(first.stdout)["why"] == "schedule", first.stderr
    second = memopt("worker", store, "--once", "--json")
    assert (second.returncode, second.stdout) == (0, "")
    assert "nothing to do" in second.stderr


def test_with_both_triggers_off_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    """A worker that could never run is refused and names the settings."""
    Path("memopt.yaml").write_text(
        "consolidation: {pressure_based_enabled: false, time_based_enabled: false}\n"
    )
    done = memopt("worker", hot_store(tmp_path / "s"))
    assert done.returncode == 2
    assert "pressure_based_enabled" in done.stderr


@pytest.mark.parametrize("command", [("consolidate",), ("worker", "--once")])
def test_a_file_of_the_folder_cannot_send_texts_away_unannounced(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the texts go, and which file says so, is told before they go; --llm is not told."""
    asked: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    Path("memopt.yaml").write_text(
        f"consolidation: {{llm_provider: openai, llm_model: m, llm_endpoint: '{url}'}}\n"
    )
    store = hot_store(tmp_path / "s", made=datetime(2020, 1, 1, tzinfo=UTC))
    quiet = memopt(command[0], store, *command[1:], "--llm", "extractive")
    assert (quiet.returncode, asked) == (0, [])
    assert "memopt.yaml" not in quiet.stderr
    store = hot_store(tmp_path / "t", made=datetime(2020, 1, 1, tzinfo=UTC))
    told = memopt(command[0], store, *command[1:])
    server.shutdown()
    assert asked
    assert f"texts of memories go to openai:m@{url}, as memopt.yaml says" in told.stderr
