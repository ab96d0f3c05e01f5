"""The peers memopt is measured against, each in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError
from memopt.files import atomic_path
from memopt.registry import check_names

# sentence-transformers[onnx,openvino] resolves to an older release than the newest, because its
# newest needs transformers 5 and optimum-onnx does not run with that.
REQUIREMENTS = ("sentence-transformers[onnx,openvino]", "torch==2.13.0", "fastembed")
PEERS = ("sentence-transformers", "fastembed", "optimum")
PEER_PYTHON = Path(".peers/bin/python")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One thing to measure: a label, how the worker opens it, and the Python that runs it."""

    label: str
    spec: dict[str, Any]
    python: str = sys.executable


def peer_python() -> str:
    """Return the Python of the peers' environment, making it on first use (minutes).

    Raises:
        ConfigurationError: pip could not install the peers.
    """
    home = PEER_PYTHON.parents[1]
    done = home / "installed.txt"
    wanted = "\n".join(REQUIREMENTS)
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        venv.create(home, with_pip=True, clear=True)
        command = [str(PEER_PYTHON), "-m", "pip", "install", "-q", *REQUIREMENTS]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigurationError(
                f"the peers' environment {home} could not be installed: {last}",
                fix="check the network, or leave --peers out",
            )
        with atomic_path(done) as path:
            path.write_text(wanted, encoding="utf-8")
    return str(PEER_PYTHON.absolute())


def peer_contenders(names: list[str], bundle: Bundle, source: Path, python: str) -> list[Contender]:
    """Return the contenders for these peers, opened on ``source`` (a model folder).

    Args:
        names: any of PEERS.
        bundle: the bundle measured, for pooling and dimension.
        source: a folder sentence-transformers can open: the bundle with its safetensors.
        python: interpreter of the peers' environment.

    Raises:
        ConfigurationError: an unknown peer.
    """
    check_names("peer", names, PEERS)
    manifest = bundle.manifest
    path = str(source.absolute())
    common = {
        "path": path,
        "dimension": manifest.dimension,
        "max_length": manifest.max_length,
        "pooling": manifest.pooling,
        "normalize": manifest.normalize,
    }
    contenders = []
    for name in names:
        kinds: list[tuple[str, dict[str, Any]]] = [(name, {})]
        if name == "sentence-transformers":
            backends = ("torch", "onnx", "openvino")
            kinds = [(f"{name} {backend}", {"backend": backend}) for backend in backends]
            file = "onnx/model_qint8_avx512_vnni.onnx"
            if (source / file).is_file():
                kinds.append((f"{name} onnx int8", {"backend": "onnx", "file_name": file}))
        contenders += [
            Contender(label=label, spec={"kind": name, **common, **extra}, python=python)
            for label, extra in kinds
        ]
    return contenders
