from __future__ import annotations

from typing import Any

import pytest

from memopt.bundle import Bundle
from memopt.exporters.base import export
from memopt.weights.convert import convert
from tests.runtimes.generate.kit import write


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    """A language model's bundle with its graphs, and transformers' model; do not change it."""
    from memopt.bundle import open_bundle

    home = tmp_path_factory.mktemp("talker")
    model = write(home / "source")
    bundle = convert(home / "source", home / "bundle")
    export(bundle)
    export(open_bundle(bundle.path), format="openvino")
    return open_bundle(bundle.path), model
