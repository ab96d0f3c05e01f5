"""Seeded models of transformers' configurations, ready to be made into graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers as hf

from memopt.bundle import Manifest
from memopt.exporters import interface
from memopt.exporters.base import reference_cases
from memopt.runtimes.torch_model import LoadedModel

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 320,
    "pad_token_id": 1,
}


def built(config: str, model: str, **further: Any) -> Any:
    """A seeded model with transformers' plain attention."""
    torch.manual_seed(0)
    made = getattr(hf, config)(**{**TEXT, **further})
    return getattr(hf, model)._from_config(made, attn_implementation="eager").eval()


def manifest_of(model: Any, pooling: str, **further: Any) -> Manifest:
    """The manifest of an encoder of text."""
    return Manifest(
        name="m",
        task="embedding",
        modality="text",
        architecture="M",
        model_type=model.config.model_type,
        pooling=pooling,
        **further,
    )


def prepared(
    model: Any, pooling: str, *, normalize: bool = True
) -> tuple[LoadedModel, interface.Signature, list[Any]]:
    """A model with its head, the signature of its graph, and what that is checked with."""
    loaded = LoadedModel(model, model.config, {})
    loaded = replace(loaded, head=replace(loaded.head, pooling=pooling, normalize=normalize))
    manifest = manifest_of(model, pooling, normalize=normalize, max_length=128)
    signature = interface.signature(loaded, manifest, "embedding")
    return loaded, signature, reference_cases(loaded, manifest, "embedding", signature)
