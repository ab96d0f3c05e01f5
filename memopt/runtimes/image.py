"""Images to ``pixel_values`` as ``preprocessor_config.json`` says, with pillow and numpy.

The steps and their rounding are those of transformers' PIL image processors (CLIP, ViT, SigLIP,
DINOv2/BiT): convert to RGB, resize the 8-bit image, centre crop, rescale, normalise.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle, read_json
from memopt.errors import BundleError
from memopt.extras import require
from memopt.runtimes.base import TOKENS_ON_CPU
from memopt.runtimes.batching import MEDIA_BATCH, Batch, decoded, in_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC, _BILINEAR = 3, 2
# What a processor does where its configuration file is silent (older files leave keys out).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": {
        "size": {"shortest_edge": 224},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": 224,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    },
    "Bit": {
        "size": {"shortest_edge": 224},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": 224,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    },
    "Siglip": {"resample": _BICUBIC, "size": {"height": 224, "width": 224}},
    "": {"resample": _BILINEAR, "size": {"height": 224, "width": 224}},
}


class ImageFrontEnd:
    """Turns paths, encoded bytes, PIL images and arrays into ``pixel_values``."""

    def __init__(self, bundle: Bundle) -> None:
        self._pil = require("PIL.Image", extra="media", why="read images")
        config = processor_config(bundle, "image_processor")
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        known = next(name for name in _DEFAULTS if kind.startswith(name))
        self._config: dict[str, Any] = {
            "do_resize": True,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            **_DEFAULTS[known],
            **{key: value for key, value in config.items() if value is not None},
        }
        if self._config.get("do_pad"):
            raise BundleError(f"{bundle.path}: do_pad in the image processor is not supported")
        self._size = _size(self._config["size"], square=known in ("", "Siglip"))
        self._crop = _size(self._config.get("crop_size") or self._size, square=True)
        self._table = _table(self._config)

    def check(self, item: object) -> str | None:
        """Return why ``item`` cannot be an image, None when it may."""
        if isinstance(item, str | Path | bytes | bytearray | np.ndarray) or hasattr(
            item, "convert"
        ):
            return None
        return f"is {type(item).__name__}, not a path, bytes, PIL image or array"

    def chunks(self, items: Sequence[Any]) -> list[NDArray[np.intp]]:
        """Return positions in chunks of one batch each."""
        return in_order(len(items), MEDIA_BATCH)

    def prepare(
        self,
        items: Sequence[Any],
        batch_size: int | None,
        tokens: int = TOKENS_ON_CPU,
        step: int = 1,
    ) -> list[Batch]:
        """Decode and transform one chunk."""
        pixels = decoded(items, self.transform, "an image")
        return [
            Batch(rows, {"pixel_values": np.stack([pixels[row] for row in rows])})
            for rows in in_order(len(pixels), batch_size or len(pixels))
        ]

    def transform(self, item: Any) -> NDArray[np.float32]:
        """Return ``pixel_values`` (3, height, width) of one image."""
        image = self._open(item).convert("RGB")
        if self._config["do_resize"]:
            width, height = _resized(image.size, self._size)
            if (width, height) != image.size:
                image = image.resize((width, height), self._config["resample"])
        array = np.asarray(image)
        if self._config["do_center_crop"]:
            array = _center_crop(array, self._crop["height"], self._crop["width"])
        # One look-up per channel does rescale and normalise, in the processors' own rounding.
        return np.stack([self._table[channel][array[:, :, channel]] for channel in range(3)])

    def _open(self, item: Any) -> Any:
        if isinstance(item, bytes | bytearray):
            image = self._pil.open(io.BytesIO(item))
        elif isinstance(item, str | Path):
            image = self._pil.open(item)
        elif isinstance(item, np.ndarray):
            return self._pil.fromarray(_as_uint8(item))
        else:
            return item
        from PIL import ImageOps

        # Cameras store sideways and say so in EXIF; transformers' load_image turns them as well.
        return ImageOps.exif_transpose(image)


def processor_config(bundle: Bundle, part: str) -> dict[str, Any]:
    """Return the processor's settings: preprocessor_config.json, or ``part`` of processor_config.

    Raises:
        BundleError: the bundle has neither.
    """
    if (bundle.path / "preprocessor_config.json").is_file():
        return read_json(bundle.path / "preprocessor_config.json")
    if (bundle.path / "processor_config.json").is_file():
        found = read_json(bundle.path / "processor_config.json").get(part)
        if isinstance(found, dict):
            return found
    raise BundleError(
        f"{bundle.path / 'preprocessor_config.json'} is missing", fix="convert the model again"
    )


def _size(value: Any, *, square: bool) -> dict[str, int]:
    if isinstance(value, int):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, Mapping):
        size = {key: int(v) for key, v in value.items() if v is not None}
        if set(size) in ({"height", "width"}, {"shortest_edge"}):
            return size
    raise BundleError(f"image size {value!r} in preprocessor_config.json is not supported")


def _resized(old: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """Return the new (width, height)."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    short = size["shortest_edge"]
    width, height = old
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _center_crop(array: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Cut (height, width) out of the middle; a smaller image gets a black border first."""
    rows, columns = array.shape[:2]
    if rows < height or columns < width:
        top, left = -(-max(height - rows, 0) // 2), -(-max(width - columns, 0) // 2)
        padded = np.zeros((max(rows, height), max(columns, width), 3), array.dtype)
        padded[top : top + rows, left : left + columns] = array
        array, (rows, columns) = padded, padded.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    return array[top : top + height, left : left + width]


def _table(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return float32 (3, 256): what each 8-bit value becomes in each channel."""
    values = np.arange(256, dtype=np.float64)
    if config["do_rescale"]:
        values = values * config["rescale_factor"]
    channels = np.tile(values.astype(np.float32), (3, 1))
    if config["do_normalize"]:
        mean, std = (
            np.asarray(config[k], np.float32)[:, None] for k in ("image_mean", "image_std")
        )
        channels = (channels - mean) / std
    return channels.astype(np.float32)


def _as_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an (h, w[, 3 or 4]) array of 8 bits; floats in [0, 1] are scaled.

    >>> _as_uint8(np.ones((1, 2, 2), np.float32))
    array([[255, 255],
           [255, 255]], dtype=uint8)
    """
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {array.shape} is not an image")
    if not array.size:
        raise ValueError("an image without pixels")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return np.ascontiguousarray(array) * np.uint8(255)
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1:
        scaled: NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
        return scaled
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    raise ValueError(f"{array.dtype} values from {low} to {high} are neither 0..1 nor 0..255")
