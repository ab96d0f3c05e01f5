"""The joint layer: its dimensions, what a bundle says of them, and its torch form.

One row holds up to three encoder vectors. Absent ones are masked out, never filled in: an absent
vector takes no part in the mean, in the attention or in the pooling, so whatever its slot holds,
NaN included, the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from memopt.bundle import Bundle
from memopt.errors import BundleError, ConfigurationError
from memopt.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

JOINT_TASK = "joint-embedding"
JOINT_MODALITIES = ("vision", "audio", "text")  # the order of the columns of `present`
JOINT_INPUTS = (*JOINT_MODALITIES, "present")
JOINT_OUTPUT = "joint_embedding"
JOINT_MODEL_TYPE = "memopt-joint"
# Added to the score of an absent modality: exp(-10000) is exactly 0 in float32.
_MASK_BIAS = -10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JointConfig:
    """Dimensions of a joint layer.

    Attributes:
        vision, audio, text: lengths of the encoders' vectors.
        joint: length of the joint vector.
        hidden: width of the fusion MLP.
        attention: let the modalities of a row attend to each other before they are fused.
        heads: attention heads; ``joint`` must be a multiple of it.

    >>> JointConfig(vision=64).dims
    {'vision': 64, 'audio': 384, 'text': 384}
    """

    vision: int = 512
    audio: int = 384
    text: int = 384
    joint: int = 768
    hidden: int = 1024
    attention: bool = True
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("vision", "audio", "text", "joint", "hidden", "heads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"{name} is {value!r}", fix="give a whole number above 0")
        if type(self.attention) is not bool:
            raise ConfigurationError(f"attention is {self.attention!r}", fix="give true or false")
        if self.attention and self.joint % self.heads:
            raise ConfigurationError(
                f"joint {self.joint} is not a multiple of heads {self.heads}",
                fix="choose heads that divide joint",
            )

    @property
    def dims(self) -> dict[str, int]:
        """Length of each modality's vector, in the order of JOINT_MODALITIES."""
        return {name: getattr(self, name) for name in JOINT_MODALITIES}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> JointConfig:
        """Read the ``joint`` object of a bundle's ``config.json``.

        Raises:
            ConfigurationError: an unknown key or a value out of range.

        >>> JointConfig.from_dict(JointConfig(joint=32).to_dict()).joint
        32
        """
        unknown = sorted(set(raw) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigurationError(f"the joint layer has no setting {unknown[0]!r}")
        return cls(**raw)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict."""
        return asdict(self)


class Encoder(Protocol):
    """Content of one modality to vectors."""

    @property
    def model_id(self) -> str:
        """What made the vectors."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    def encode(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """Return float32 (n, dim), one L2-normalised row per item."""


def read_config(bundle: Bundle) -> tuple[JointConfig, dict[str, str]]:
    """Return a joint bundle's dimensions and the model ids of the encoders it was trained on.

    Raises:
        BundleError: the bundle is no joint layer.
    """
    raw = bundle.config() if bundle.manifest.task == JOINT_TASK else {}
    if raw.get("model_type") != JOINT_MODEL_TYPE or not isinstance(raw.get("joint"), dict):
        raise BundleError(
            f"{bundle.path} is no joint layer (task {bundle.manifest.task})",
            fix="train one: memopt memory train-joint PAIRS OUT",
        )
    return JointConfig.from_dict(raw["joint"]), dict(raw.get("encoders") or {})


def network(config: JointConfig, *, dropout: float = 0.0) -> Any:
    """Return the torch module ``(vision, audio, text, present) -> joint_embedding``.

    Inputs are float32 (n, dim of the modality) and ``present`` float32 (n, 3) of 0 and 1; the
    output is float32 (n, joint), L2-normalised. A row with nothing present has no meaning, and
    stays finite.

    Raises:
        MissingExtra: torch is not installed.
    """
    return _class()(config, dropout)


@cache
def _class() -> Any:
    torch = require("torch", extra="export", why="train or export a joint layer")
    nn, functional = torch.nn, torch.nn.functional

    class JointNetwork(nn.Module):  # type: ignore[misc, name-defined]
        """Projections, attention, fusion MLP, residual attention pooling, L2 norm."""

        def __init__(self, config: JointConfig, dropout: float) -> None:
            super().__init__()
            width = config.joint
            self.project = nn.ModuleDict(
                {name: nn.Linear(dim, width) for name, dim in config.dims.items()}
            )
            self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in config.dims})
            self.heads = config.heads if config.attention else 0
            if self.heads:
                self.attend_norm = nn.LayerNorm(width)
                self.attend_in = nn.Linear(width, 3 * width)
                self.attend_out = nn.Linear(width, width)
            self.fuse_norm = nn.LayerNorm(width)
            self.fuse_in = nn.Linear(width, config.hidden)
            self.fuse_out = nn.Linear(config.hidden, width)
            self.pool_query = nn.Linear(width, width)
            self.drop = nn.Dropout(dropout)
            self.width = width

        def forward(self, vision: Any, audio: Any, text: Any, present: Any) -> Any:
            given = dict(zip(JOINT_MODALITIES, (vision, audio, text), strict=True))
            keep = present > 0.5
            parts = []
            for column, (name, values) in enumerate(given.items()):
                here = keep[:, column : column + 1]
                # Before anything is computed from it: 0 * NaN would still be NaN.
                values = torch.where(here, values, torch.zeros_like(values))
                # The length of an encoder's vector is not part of its meaning.
                values = functional.normalize(values, dim=-1)
                part = self.norm[name](self.drop(self.project[name](values)))
                parts.append(torch.where(here, part, torch.zeros_like(part)))
            tokens = torch.stack(parts, dim=1)
            kept = keep.to(tokens.dtype)
            bias = (1.0 - kept) * _MASK_BIAS
            if self.heads:
                tokens = tokens + _attend(self, tokens, bias) * kept[:, :, None]
            count = kept.sum(dim=1, keepdim=True).clamp(min=1.0)
            mean = (tokens * kept[:, :, None]).sum(dim=1) / count
            hidden = functional.gelu(self.fuse_in(self.fuse_norm(mean)))
            fused = mean + self.fuse_out(self.drop(hidden))
            # Residual attention pooling: the fused vector asks, the modalities present answer.
            scores = (tokens @ self.pool_query(fused)[:, :, None]).squeeze(2)
            weights = torch.softmax(scores * self.width**-0.5 + bias, dim=1)
            pooled = (weights[:, :, None] * tokens).sum(dim=1)
            return functional.normalize(fused + pooled, dim=-1)

    return JointNetwork


def _attend(network: Any, tokens: Any, bias: Any) -> Any:
    """Self-attention (Vaswani et al. 2017) over the modalities of a row."""
    each = network.width // network.heads
    count = len(JOINT_MODALITIES)
    mixed = network.attend_in(network.attend_norm(tokens))
    split = mixed.reshape(-1, count, 3, network.heads, each).permute(2, 0, 3, 1, 4)
    query, key, value = split[0], split[1], split[2]
    scores = query @ key.transpose(2, 3) * each**-0.5 + bias[:, None, None, :]
    mixed = scores.softmax(dim=-1) @ value
    return network.attend_out(mixed.transpose(1, 2).reshape(-1, count, network.width))
