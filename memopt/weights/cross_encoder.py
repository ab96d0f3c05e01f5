"""What a sentence-transformers CrossEncoder says of its scores."""

from __future__ import annotations

from pathlib import Path

from memopt.bundle import read_json
from memopt.weights.modules import SETTINGS


def activation(folder: Path) -> str:
    """Return the class that turns a CrossEncoder's logits into scores, by its last name.

    As sentence-transformers looks for it: its own settings file, two keys of ``config.json`` that
    older versions wrote, else a sigmoid.

    >>> activation(Path("/nowhere"))
    'Sigmoid'
    """
    settings, config = (
        read_json(path) if path.is_file() else {}
        for path in (folder / SETTINGS, folder / "config.json")
    )
    older = config.get("sentence_transformers")
    stated = (
        settings.get("activation_fn"),
        older.get("activation_fn") if isinstance(older, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    )
    # Others are code that came with the model, which sentence-transformers passes over as well.
    trusted = (value for value in stated if isinstance(value, str) and value.startswith("torch."))
    return next(trusted, "Sigmoid").rpartition(".")[2]
