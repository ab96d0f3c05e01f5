"""Every command with a wrong path in each of its places: one clear line, exit code 1 or 2."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from memopt import cli
from memopt.bundle import Bundle, open_bundle

# Nothing there, a file of nothing, bytes of another kind, a folder of nothing, damaged JSON inside.
WRONG = ("gone", "empty", "noise", "folder", "broken")
NOISE = b"\x89PNG\r\n\x1a\n\x00\xff\xfe" + bytes(range(256))
JSONS = ("adapter_config", "config", "memopt", "memory", "models", "modules", "trust")
NODE = "--adapter x --node n --server localhost:1 --keys KEYS"
# @ is the wrong path, an ending belongs to it; BUNDLE, TEXTS, KEY, KEYS and STORE are good ones.
PLACES = [
    *(f"convert @{end} -o OUT" for end in ("", ".onnx", ".parquet")),
    "convert BUNDLE/weights.parquet --config @ -o OUT",
    "convert @ --to safetensors -o OUT",
    "export @",
    "export BUNDLE --weights @.parquet",
    "quantize @.onnx -c TEXTS",
    *(f"quantize BUNDLE -c @{end}" for end in ("", ".txt", ".parquet")),
    "quantize BUNDLE -c TEXTS --validation @.txt",
    "optimize @ --calibration TEXTS",
    "optimize BUNDLE --calibration @.txt",
    "optimize BUNDLE --calibration TEXTS --plan @.json",
    "embed @ -i TEXTS -o OUT.npy",
    *(f"embed BUNDLE -i @{end} -o OUT.npy" for end in ("", ".docx")),
    "bench @",
    "bench BUNDLE -i @.txt",
    "bench --compare @.json @.json",
    "pack @ -o OUT",
    "encrypt @ --key-file KEY",
    "encrypt BUNDLE --key-file @",
    "info @",
    "sync serve OUT --port 0 --keys @",
    f"sync push @ {NODE}",
    f"sync push @.safetensors {NODE}",
    "sync status --node n --keys @",
    "sync diff @ @",
    "sync diff @.safetensors @.parquet",
    *(
        f"memory {command}"
        for command in (
            "search @ x",
            "show @ id",
            "forget @ id --yes",
            "stats @",
            "consolidate @",
            "worker @ --once",
            "export @ OUT",
            "verify @",
            "reembed @ --model BUNDLE",
            "rekey @ --key TWO",
        )
    ),
    "memory add OUT text --model @",
    *(f"memory add OUT @{end} --model BUNDLE" for end in (".png", ".wav", ".parquet", ".docx")),
    "memory import OUT @",
    "memory search STORE --image @.png",
    "memory search STORE --audio @.wav",
    "memory search STORE x --key @",
    "memory train-joint @.parquet OUT",
    "config check -f @.yaml",
    "--config @.yaml embed BUNDLE -i TEXTS -o OUT.npy",
]
# Settings that say nothing are those of memopt: an empty file is a good one.
GOOD = {("config check -f @.yaml", "empty"), (PLACES[-1], "empty")}
# One file of a kind that is read, with something else in it.
ALSO = [
    ("memory verify STORE --expect @", "noise"),
    ("sync serve OUT --port 0 --keys KEYS --dictionary @", "empty"),
]
CASES = [(p, w) for p in PLACES for w in WRONG if (p, w) not in GOOD] + ALSO


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run ``memopt ...`` as its entry point does; return the exit code and standard error.

    In this process: most commands import for seconds, and there are some hundreds of cases.
    """
    monkeypatch.setattr(sys, "argv", ["memopt", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def good(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the other places of a command hold; no case gets far enough to change it."""
    from memopt.exporters.base import export
    from memopt.federation.trust.authority import init_ca, issue
    from memopt.federation.trust.signing import SigningKey
    from memopt.memory.memory_store import MemoryStore

    home = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny.path, home / "bundle")
    for format_ in ("onnx", "openvino"):
        export(open_bundle(home / "bundle"), format=format_)
    (home / "texts.txt").write_text("".join(f"line {n} of words\n" for n in range(40)))
    (home / "key").write_text("ab" * 32)
    (home / "key").chmod(0o600)
    (home / "two").write_text("cd" * 32 + "\n" + "ab" * 32)
    (home / "two").chmod(0o600)
    init_ca(home / "keys")
    issue(home / "keys", "n", ca=home / "keys")
    SigningKey.generate().save(home / "keys" / "n.sign.key")
    MemoryStore(home / "store", dim=4).close()
    return {
        "BUNDLE": str(home / "bundle"),
        "TEXTS": str(home / "texts.txt"),
        "KEY": str(home / "key"),
        "TWO": str(home / "two"),
        "KEYS": str(home / "keys"),
        "STORE": str(home / "store"),
    }


def wrong(kind: str, folder: Path, ending: str) -> Path:
    """Make the wrong path of that kind."""
    path = folder / f"{kind}{ending}"
    if kind == "empty":
        path.touch(0o600)
    elif kind == "noise":
        path.write_bytes(NOISE)
        path.chmod(0o600)
    elif kind != "gone":
        path.mkdir(0o700, exist_ok=True)
        for name in JSONS if kind == "broken" else ():
            (path / f"{name}.json").write_text('{"a": [1, \n')
    return path


@pytest.mark.parametrize(("place", "kind"), CASES, ids=[f"{p}-{k}" for p, k in CASES])
def test_a_wrong_path_is_one_line(
    place: str,
    kind: str,
    good: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is left behind either."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    # What the commands set for their own process.
    for name in ("MEMOPT_CONFIG", "MEMOPT_DEBUG"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    arguments, names = [], []
    for word in place.split():
        if word.startswith("@"):
            names.append(wrong(kind, tmp_path, word[1:]).name)
            word = str(tmp_path / names[-1])
        for name, path in good.items():
            word = word.replace(name, path) if word.split("/")[0] == name else word
        arguments.append(word.replace("OUT", str(work / "out")))
    code, told = run(arguments, monkeypatch, capsys)
    assert code in (1, 2), told
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert any(name in line for name in names), line
    assert not list(work.iterdir()), line
