"""memopt memory mcp: the SDK's own client against the real command, over stdio and HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from memopt.bundle import Bundle
from memopt.serve.memories import MOST_CHARACTERS, SHOWN_CHARACTERS
from tests.memory.kit import files_with
from tests.memory.test_commands import memopt, process

COMMAND = ["-m", "memopt", "memory", "mcp"]
FACTS = ("The spare key is under the blue pot.", "Rain is expected tonight.", "A cat sleeps.")


def agent(use: Callable[[Client], Awaitable[None]], *arguments: object) -> None:
    """Start the command as an agent's settings do, and use it."""
    server = StdioServerParameters(
        command=sys.executable, args=[*COMMAND, *map(str, arguments)], env=dict(os.environ)
    )

    async def run() -> None:
        async with Client(stdio_client(server)) as client:
            await use(client)

    asyncio.run(run())


async def call(client: Client, tool: str, **given: Any) -> Any:
    """The structured result of a tool; the text says the same."""
    result = await client.call_tool(tool, given)
    assert not result.is_error, result.content
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content


async def refusal(client: Client, tool: str, **given: Any) -> str:
    """What a tool that refuses says: one line."""
    result = await client.call_tool(tool, given)
    assert result.is_error
    assert result.structured_content is None
    assert "\n" not in result.content[0].text
    return str(result.content[0].text)


@pytest.fixture
def store(minilm: Bundle, tmp_path: Path) -> Path:
    """A store of three facts."""
    made = memopt("add", tmp_path / "s", *FACTS, "--category", "home", "--model", minilm.path)
    assert made.returncode == 0, made.stderr
    return tmp_path / "s"


def test_an_agent_remembers_recalls_and_forgets(minilm: Bundle, tmp_path: Path) -> None:
    """In a store it makes itself: redacted, once, found by meaning, and gone from the disk."""
    folder = tmp_path / "s"

    async def use(client: Client) -> None:
        keys = [
            (await call(client, "remember", text=text, category="home"))["memory_id"]
            for text in FACTS
        ]
        mail = await call(client, "remember", text="write to bob@example.org about zq7vxk2jwp")
        again = await call(client, "remember", text=FACTS[0], category="home")
        assert again == {"memory_id": keys[0], "added": False}
        found = (await call(client, "recall", query="where is my key?", top_k=2))["memories"]
        assert found[0]["memory_id"] == keys[0]
        assert len(found) == 2
        home = await call(client, "recall", query="an e-mail to bob", category="home")
        assert mail["memory_id"] not in {row["memory_id"] for row in home["memories"]}
        early = await call(client, "recall", query="key", until="2020-01-01T00:00:00Z")
        assert early == {"memories": []}
        shown = await call(client, "show", memory_id=mail["memory_id"])
        assert shown["text"] == "write to [EMAIL] about zq7vxk2jwp"
        assert files_with(folder, b"bob@example.org") == []
        assert files_with(folder, b"zq7vxk2jwp") != []
        assert (await call(client, "stats"))["memories"] == 4
        assert (await call(client, "forget", memory_id=mail["memory_id"]))["forgotten"] == 1
        assert files_with(folder, b"zq7vxk2jwp") == []
        assert "no memory" in await refusal(client, "show", memory_id=mail["memory_id"])
        assert (await call(client, "consolidate", dry_run=True))["scanned"] == 3
        assert (await call(client, "consolidate"))["dry_run"] is False

    agent(use, folder, "--model", minilm.path)


def test_tools_say_what_they_take_and_do(store: Path) -> None:
    """Schemas with limits that hold, hints of what reads and what destroys, one line an error."""

    async def use(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        reads = {name for name, tool in tools.items() if tool.annotations.read_only_hint}
        destroys = {name for name, tool in tools.items() if tool.annotations.destructive_hint}
        assert reads == {"recall", "show", "stats"}
        assert destroys == {"forget", "consolidate"}
        assert set(tools) == reads | destroys | {"remember"}
        assert all(tool.input_schema["type"] == "object" for tool in tools.values())
        text = tools["remember"].input_schema["properties"]["text"]
        assert text["maxLength"] == MOST_CHARACTERS
        long = await refusal(client, "remember", text="a" * (MOST_CHARACTERS + 1))
        assert "$.text" in long
        assert "$.top_k" in await refusal(client, "recall", query="x", top_k=51)
        assert "`nope`" in await refusal(client, "recall", query="x", nope=1)
        assert "$.since" in await refusal(client, "recall", query="x", since="yesterday")
        assert "`memory_id`" in await refusal(client, "forget")
        assert "no memory 'nob'" in await refusal(client, "forget", memory_id="nob")
        assert "text is empty" in await refusal(client, "remember", text="  ")
        with pytest.raises(MCPError, match="no tool 'drop'; there are: remember"):
            await client.call_tool("drop", {})
        assert (await call(client, "stats"))["memories"] == 3

    agent(use, store)


def test_a_store_is_used_by_others_meanwhile(store: Path) -> None:
    """What a command writes the agent finds at once, and the other way; none waits or is lost."""

    async def use(client: Client) -> None:
        await call(client, "recall", query="key")
        added = memopt("add", store, "Ann moved to Oslo.", "--json")
        assert json.loads(added.stdout)["added"] == 1
        found = await call(client, "recall", query="who moved?", top_k=1)
        assert found["memories"][0]["text"] == "Ann moved to Oslo."
        command = [sys.executable, "-m", "memopt", "memory", "add", str(store), "-"]
        other = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
        lines = "".join(f"Note {i} of the command.\n" for i in range(20))
        texts = [f"Note {i} of the agent." for i in range(20)]
        await asyncio.gather(
            other.communicate(lines.encode()), *(call(client, "remember", text=t) for t in texts)
        )
        assert other.returncode == 0
        assert (await call(client, "stats"))["memories"] == 44
        gone = found["memories"][0]["memory_id"]
        assert memopt("forget", store, gone, "--yes").returncode == 0
        assert "no memory" in await refusal(client, "show", memory_id=gone)
        assert (await call(client, "recall", query="who moved?", top_k=50))["memories"]

    agent(use, store)
    found = json.loads(memopt("search", store, "a note of the agent", "--json").stdout)
    assert any(row["text"].endswith("of the agent.") for row in found)
    assert memopt("verify", store).returncode == 0


def test_an_encrypted_store(minilm: Bundle, tmp_path: Path) -> None:
    """Its key as of the command line; without it the server does not start."""
    key = tmp_path / "key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)

    async def use(client: Client) -> None:
        added = await call(client, "remember", text="The word is zq7vxk2jwp.")
        shown = await call(client, "show", memory_id=added["memory_id"])
        assert shown["text"] == "The word is zq7vxk2jwp."

    agent(use, tmp_path / "s", "--model", minilm.path, "--key", key)
    assert files_with(tmp_path / "s", b"zq7vxk2jwp") == []
    refused = memopt("mcp", tmp_path / "s")
    assert refused.returncode == 1
    assert "key" in refused.stderr


def test_a_long_text_is_cut_in_a_list(store: Path, tmp_path: Path) -> None:
    """A book that came another way does not fill the agent's window; show gives it whole."""
    book = "The lighthouse keeper writes. " * 1000
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": book}) + "\n")
    assert memopt("add", store, tmp_path / "book.jsonl").returncode == 0

    async def use(client: Client) -> None:
        found = await call(client, "recall", query="lighthouse keeper", top_k=1)
        hit = found["memories"][0]
        assert hit["text"] == book[:SHOWN_CHARACTERS]
        assert hit["text_characters"] == len(book)
        assert (await call(client, "show", memory_id=hit["memory_id"]))["text"] == book

    agent(use, store)


def test_only_the_protocol_is_on_standard_output(store: Path) -> None:
    """Every line is JSON-RPC; a line that is none, an end of the input, a signal: all end well."""
    opening = {"protocolVersion": "2025-06-18", "capabilities": {}}
    opening["clientInfo"] = {"name": "test", "version": "1"}
    lines: list[Any] = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": opening},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
    ]
    asked = {"name": "recall", "arguments": {"query": "key"}}
    lines.append({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": asked})
    running = subprocess.Popen(
        [sys.executable, *COMMAND, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert running.stdin
    assert running.stdout
    running.stdin.write("no JSON\n" + "".join(json.dumps(line) + "\n" for line in lines))
    running.stdin.flush()
    answers: list[Any] = []
    while not any(answer.get("id") == 2 for answer in answers):
        answers.append(json.loads(running.stdout.readline()))
    assert all(answer["jsonrpc"] == "2.0" for answer in answers)
    running.send_signal(signal.SIGTERM)  # the input is still open
    assert running.wait(30) == 143
    assert running.stdout.read() == ""
    ended = process("mcp", store, input="")
    assert (ended.returncode, ended.stdout) == (0, "")


@contextmanager
def over_http(store: Path, keys: Path) -> Iterator[str]:
    """The command over HTTP on a free port; yields the address it tells."""
    command = [sys.executable, *COMMAND, str(store), "--http", "0", "--api-key-file", str(keys)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr
    try:
        line = running.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/mcp", line)
        assert address, line
        yield address[0]
    finally:
        running.terminate()
        assert running.wait(30) == 143


def test_http_wants_a_key_and_its_own_name(store: Path, tmp_path: Path) -> None:
    """The same tools for who has a key; no key, another host's name or page is refused."""
    key = secrets.token_hex(24)
    (tmp_path / "keys").write_text(f"agent:{key}\n")
    (tmp_path / "keys").chmod(0o600)
    right = {"authorization": f"Bearer {key}"}

    async def use(url: str) -> None:
        async with httpx2.AsyncClient(headers=right, timeout=60) as http:
            async with Client(streamable_http_client(url, http_client=http)) as client:
                found = await call(client, "recall", query="where is my key?", top_k=1)
                assert found["memories"][0]["text"] == FACTS[0]
                assert "$.top_k" in await refusal(client, "recall", query="x", top_k=0)
            kind = {"accept": "application/json, text/event-stream"}
            ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
            for headers, status in (
                ({"authorization": ""}, 401),
                ({"authorization": "Bearer wrong"}, 401),
                ({"host": "evil.example"}, 421),
                ({"origin": "http://evil.example"}, 403),
            ):
                answer = await http.post(url, json=ping, headers=kind | headers)
                assert answer.status_code == status, headers
            large = await http.post(url, json=ping | {"params": "a" * (2 << 20)})
            assert large.status_code == 413

    with over_http(store, tmp_path / "keys") as url:
        asyncio.run(use(url))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--http", "0"), "--http and --api-key-file go together"),
        (("--llm", "nobody"), "nobody"),
        (("--redaction", "nothing"), "nothing"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    store: Path, arguments: tuple[str, ...], words: str
) -> None:
    """Before anything is served."""
    refused = memopt("mcp", store, *arguments)
    assert refused.returncode == 2
    assert words in refused.stderr


def test_no_store_and_a_store_without_a_bundle(store: Path, tmp_path: Path) -> None:
    """The first is not made by looking at it; the second cannot embed what is asked."""
    missing = memopt("mcp", tmp_path / "none")
    assert missing.returncode == 1
    assert not (tmp_path / "none").exists()
    (store / "models.json").unlink()
    assert "names no bundle" in memopt("mcp", store).stderr
