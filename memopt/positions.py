"""How many tokens a model's position table takes, read off its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Model types that count positions from pad_token_id + 1: so many rows of their table take no token.
OFFSET_POSITIONS = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod"),
        *("mpnet", "longformer", "luke", "mluke", "ibert", "esm", "data2vec-text", "lilt"),
        *("layoutlmv3", "markuplm", "altclip_text_model", "clap_text_model"),
        "bridgetower_text_model",
    }
)
# Positions are relative in these: ``n_positions`` is what they were trained with, no limit.
RELATIVE_POSITIONS = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the position table of a model's ``config.json`` takes, if it says.

    >>> position_limit({"model_type": "bert", "max_position_embeddings": 512})
    512
    >>> position_limit({"model_type": "luke", "max_position_embeddings": 514})
    512
    """
    text = {**config, **(config.get("text_config") or {})}
    rows = text.get("max_position_embeddings")
    if not rows and text.get("model_type") not in RELATIVE_POSITIONS:
        rows = text.get("n_positions")
    if not isinstance(rows, int) or rows < 1:
        return None
    if text.get("model_type") not in OFFSET_POSITIONS:
        return rows
    padding = text.get("pad_token_id", 1)  # save_pretrained leaves out what is the default
    return max(1, rows - (padding if isinstance(padding, int) else 0) - 1)


def counts_distances_alone(config: Mapping[str, Any]) -> bool:
    """Return whether a text past :func:`position_limit` is one to the model like any other.

    DeBERTa has a table of positions only where they are added to the tokens; the distances that
    it attends by have no end.

    >>> counts_distances_alone({"model_type": "deberta-v2", "position_biased_input": False})
    True
    """
    # save_pretrained leaves out what is the default: they are added.
    added = config.get("position_biased_input", True)
    return config.get("model_type") in ("deberta", "deberta-v2") and added is False
