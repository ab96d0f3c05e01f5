"""Static embeddings in torch: a row of a table for each token, whatever stands beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from memopt.weights.kinds import STATIC


@dataclass(frozen=True, slots=True)
class StaticConfig:
    """What ``config.json`` says of such a model; transformers has no config for it."""

    vocab_size: int
    hidden_size: int
    model_type: str = STATIC

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as a transformers config does."""
        return asdict(self)


def static_model(config: StaticConfig) -> Any:
    """Return the module; its one parameter is ``embedding.weight`` (vocab_size, hidden_size)."""
    import torch

    class StaticModel(torch.nn.Module):  # type: ignore[misc]
        """Gives the rows of the tokens as hidden states, for the head to take the mean of."""

        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)

        def get_input_embeddings(self) -> Any:
            return self.embedding

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    return StaticModel()
