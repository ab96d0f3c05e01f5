"""How a delta is made: codec, threshold, targets; a plan that refuses values out of range."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.errors import ConfigurationError
from memopt.federation.delta.codecs import DEFAULT_LEVELS, INT8_LEVELS
from memopt.registry import check_names

LOSSY = ("fp16", "int8", "int4", "topk")
CODEC_NAMES = ("lossless", *LOSSY, "auto")
# What codec auto tries, codec and int8 levels, from small to large until the error target holds.
_BY_SIZE = (
    ("topk", INT8_LEVELS),
    ("int4", INT8_LEVELS),
    *(("int8", levels) for levels in (15, 31, 63, INT8_LEVELS)),
    ("fp16", INT8_LEVELS),
    ("lossless", INT8_LEVELS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSettings:
    """How a delta is made.

    ``delta_threshold`` is the relative mean change, mean|new - base| / mean|base|, over which a
    tensor is sent. ``max_error`` is the relative L2 error of the update, |new - received| /
    |new - base| for each tensor sent; ``max_bytes`` bounds the whole payload. Either one chooses
    codecs by itself with ``codec="auto"``. ``full_ratio`` is the share of the full size (raw
    bytes) over which everything is sent anew.
    """

    codec: str = "int8"
    delta_threshold: float = 0.01
    full_ratio: float = 0.5
    level: int = 3  # zstd's, -7 to 22
    compress: bool = True  # False sends what the codec makes as it is
    block: int = 0  # values that share a scale; 0 is the codec's own
    levels: int = DEFAULT_LEVELS  # int8's steps on each side of zero: fewer compress better
    topk: float = 0.05  # share of a tensor's values that topk sends
    max_error: float | None = None
    max_bytes: int | None = None
    dictionary: bytes = b""

    def __post_init__(self) -> None:
        check_names("codec", [self.codec], CODEC_NAMES)
        for name, value, good in (
            ("delta_threshold", self.delta_threshold, self.delta_threshold >= 0),
            ("full_ratio", self.full_ratio, self.full_ratio > 0),
            ("level", self.level, -7 <= self.level <= 22),
            ("block", self.block, self.block == 0 or 8 <= self.block <= 1 << 20),
            ("levels", self.levels, 1 <= self.levels <= INT8_LEVELS),
            ("topk", self.topk, 0 < self.topk <= 1),
            ("max_error", self.max_error, self.max_error is None or self.max_error >= 0),
            ("max_bytes", self.max_bytes, self.max_bytes is None or self.max_bytes > 0),
        ):
            if not good:
                raise ConfigurationError(f"{name}={value} is out of range")
        if self.codec == "auto" and self.max_error is None and self.max_bytes is None:
            raise ConfigurationError(
                "codec auto has no target", fix="give --max-error or --max-bytes"
            )


def candidates(settings: DeltaSettings) -> tuple[tuple[str, int], ...]:
    """Return the codecs and int8 levels to try, from small to large."""
    if settings.codec == "auto":
        return _BY_SIZE
    if settings.codec == "int8" and settings.max_error is not None:
        # An error that so few levels do not reach is no reason to leave int8.
        return tuple((c, n) for c, n in _BY_SIZE if c == "int8" and n >= settings.levels)
    return ((settings.codec, settings.levels),)
