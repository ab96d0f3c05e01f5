"""Images to ``pixel_values`` as ``preprocessor_config.json`` says, with pillow and numpy.

The steps and their rounding are those of transformers' PIL image processors: put on white, resize
the 8-bit image, centre crop, rescale, normalise.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle, read_json
from memopt.errors import BundleError
from memopt.extras import require
from memopt.runtimes.batching import MEDIA_BATCH, USUAL, Batch, Budget, decoded, in_order
from memopt.runtimes.picture_size import resized, stated_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

_log = logging.getLogger("memopt.runtimes")
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_BILINEAR, _BICUBIC = 2, 3
_ORIENTATION, _FIRST_SIDEWAYS = 0x0112, 5  # EXIF: 5 to 8 are turned by a quarter
_SHORT = {"default_to_square": False}  # a size of one number is that of the shorter edge
_CROP = {"do_center_crop": True, "crop_size": 224}
_CLIP = {"size": {"shortest_edge": 224}, "resample": _BICUBIC, **_SHORT, **_CROP, **_OPENAI}
_DETR = {
    "size": {"shortest_edge": 800, "longest_edge": 1333}, "max_size": 1333, **_SHORT, **_IMAGENET
}  # fmt: skip
# Detectors see each picture in its own shape. Padding only makes a batch of several shapes, and
# here a batch has one: the answer is what transformers gives for the picture alone.
DETECTORS = frozenset({"ConditionalDetr", "DeformableDetr", "Detr", "RTDetr", "Yolos"})
# What transformers' processor of each class does where its configuration file is silent (older
# files leave keys out). These classes are followed to the last bit; any other is refused.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Beit": {"resample": _BICUBIC, "crop_size": 224},
    "Bit": _CLIP,
    "Blip": {"resample": _BICUBIC, "size": {"height": 384, "width": 384}, **_OPENAI},
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "ConvNext": {
        "resample": _BICUBIC, "size": {"shortest_edge": 384}, **_SHORT, "crop_pct": 224 / 256
    },
    "ConditionalDetr": _DETR,
    "DeformableDetr": _DETR,
    "DeiT": {"resample": _BICUBIC, "size": {"height": 256, "width": 256}, **_CROP},
    "Detr": _DETR,
    "EfficientNet": {
        "resample": _BICUBIC,
        "size": {"height": 346, "width": 346},
        "crop_size": 289,
        "rescale_offset": False,
        "include_top": True,
    },
    "Levit": {
        "resample": _BICUBIC, "size": {"shortest_edge": 224}, **_SHORT, **_CROP, **_IMAGENET
    },
    "MobileNetV1": {"size": {"shortest_edge": 256}, **_SHORT, **_CROP},
    "MobileNetV2": {"size": {"shortest_edge": 256}, **_SHORT, **_CROP},
    "MobileViT": {
        "resample": _BICUBIC,
        "size": {"shortest_edge": 224},
        **_SHORT,
        "do_center_crop": True,
        "crop_size": 256,
        "do_flip_channel_order": True,
    },
    "OwlViT": {
        "resample": _BICUBIC, "size": {"height": 768, "width": 768}, "crop_size": 768, **_OPENAI
    },
    "PoolFormer": {
        "resample": _BICUBIC,
        "size": {"shortest_edge": 224},
        **_SHORT,
        **_CROP,
        **_IMAGENET,
        "crop_pct": 0.9,
    },
    "Pvt": {"resample": _BICUBIC, **_IMAGENET},
    "RTDetr": {
        "size": {"height": 640, "width": 640}, "do_normalize": False, **_SHORT, **_IMAGENET
    },
    "Siglip": {"resample": _BICUBIC, **_SHORT},
    "ViT": {},
    "Yolos": _DETR,
}  # fmt: skip
_ALL: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": _BILINEAR,
    "do_resize": True,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
# Files that name no class are of models that had only one.
_OF_MODELS = {
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "siglip": "Siglip",
    "siglip_vision_model": "Siglip",
    "dinov2": "Bit",
    "deit": "DeiT",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "resnet": "ConvNext",
    "efficientnet": "EfficientNet",
}
# They say how images come in and arrays go out, what is done to labels, or what the class is.
_OTHER_KEYS = frozenset(
    {
        *("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb"),
        *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
        *("do_reduce_labels", "reduce_labels", "model_input_names", "image_seq_length", "auto_map"),
        *("_valid_processor_keys", "pad_size", "do_pad", "backend", "format"),
        *("do_convert_annotations", "pad_and_return_pixel_mask"),
    }
)


class ImageFrontEnd:
    """Turns paths, encoded bytes, PIL images and arrays into ``pixel_values``."""

    def __init__(self, bundle: Bundle) -> None:
        self._pil = require("PIL.Image", extra="media", why="read images")
        self._class, self._config = _settings(bundle)
        self._size = _edges(self._config)
        self._crop = stated_size(self._config["crop_size"] or self._size, square=True)
        self._table = _table(self._class, self._config)

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

    def prepare(self, items: Sequence[Any], budget: Budget = USUAL) -> list[Batch]:
        """Decode and transform one chunk."""
        pixels = decoded(items, self.transform, "an image")
        shapes: dict[tuple[int, ...], list[int]] = {}
        for row, values in enumerate(pixels):
            shapes.setdefault(values.shape, []).append(row)
        return [
            Batch(
                np.array(alike)[part], {"pixel_values": np.stack([pixels[alike[i]] for i in part])}
            )
            for alike in shapes.values()
            for part in in_order(len(alike), budget.batch_size or len(alike))
        ]

    def transform(self, item: Any) -> NDArray[np.float32]:
        """Return ``pixel_values`` (3, height, width) of one image."""
        image = _on_white(self._open(item))
        if self._config["do_resize"]:
            (width, height), crop = resized(self._class, image.size, self._size, self._config)
            if (width, height) != image.size:
                image = image.resize((width, height), self._config["resample"])
            if crop:
                image = self._pil.fromarray(_center_crop(np.asarray(image), crop, crop))
        array = np.asarray(image)
        if self._config["do_center_crop"]:
            array = _center_crop(array, self._crop["height"], self._crop["width"])
        # One look-up per channel does rescale and normalise, in the processors' own rounding.
        pixels = np.stack([self._table[channel][array[:, :, channel]] for channel in range(3)])
        return pixels[::-1].copy() if self._config.get("do_flip_channel_order") else pixels

    def _open(self, item: Any) -> Any:
        if isinstance(item, bytes | bytearray):
            image = self._pil.open(io.BytesIO(item))
        elif isinstance(item, str | Path):
            image = self._pil.open(item)
        elif isinstance(item, np.ndarray):
            pixels = _as_uint8(item)
            if pixels.ndim == 3 and pixels.shape[2] == 4:
                alpha = pixels[:, :, 3:] / 255
                pixels = np.round(alpha * pixels[:, :, :3] + (1 - alpha) * 255).astype(np.uint8)
            return self._pil.fromarray(pixels)
        else:
            return item
        from PIL import ImageOps

        # Cameras store sideways and say so in EXIF; transformers' load_image turns them as well.
        return ImageOps.exif_transpose(image)


def _batch(rows: NDArray[np.intp], pixels: Sequence[NDArray[np.float32]]) -> Batch:
    return Batch(rows, {"pixel_values": np.stack([pixels[row] for row in rows])})


def processor_kind(bundle: Bundle) -> str:
    """Return the class of the bundle's image processor, without its suffix.

    Raises:
        BundleError: it is missing, or a class or a setting that is not supported.
    """
    return _settings(bundle)[0]


def picture_size(item: Any) -> tuple[int, int]:
    """Return (width, height) of a picture as it is looked at, without decoding a file's pixels.

    >>> picture_size(np.zeros((4, 8, 3), np.uint8))
    (8, 4)
    """
    if isinstance(item, np.ndarray):
        height, width = _as_uint8(item).shape[:2]
        return width, height
    if hasattr(item, "convert"):
        return int(item.width), int(item.height)
    image_module = require("PIL.Image", extra="media", why="read images")
    source = io.BytesIO(item) if isinstance(item, bytes | bytearray) else item
    with image_module.open(source) as image:
        sideways = image.getexif().get(_ORIENTATION, 1) >= _FIRST_SIDEWAYS
        width, height = image.size
    return (height, width) if sideways else (width, height)


def image_shape(bundle: Bundle) -> tuple[int, int, int] | None:
    """Return the (channels, height, width) that every image is given; None where they differ.

    Raises:
        BundleError: a processor or a setting that is not supported.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((bundle.path / name).is_file() for name in names):
        return None
    kind, config = _settings(bundle)
    size = _edges(config)
    if config["do_center_crop"]:
        crop = stated_size(config["crop_size"] or size, square=True)
        return 3, crop["height"], crop["width"]
    if config["do_resize"] and kind == "ConvNext":
        return 3, size["shortest_edge"], size["shortest_edge"]
    if config["do_resize"] and "height" in size:
        return 3, size["height"], size["width"]
    return None


def _settings(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    """Return the processor's class, without its suffix, and all it does.

    Raises:
        BundleError: another class than those followed, or a setting of them that is not.
    """
    stated = processor_config(bundle, "image_processor")
    name = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "")
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    kind = kind or _OF_MODELS.get(bundle.manifest.model_type, "ViT")
    if kind not in _PROCESSORS:
        raise BundleError(
            f"{bundle.path}: the image processor {name!r} is not supported",
            fix=f"supported are those of {', '.join(_PROCESSORS)}",
        )
    config = {**_ALL, **_PROCESSORS[kind]}
    for key, value in stated.items():
        if key in config and value is not None:
            config[key] = value
        elif key not in config and key not in _OTHER_KEYS and value:
            # transformers keeps it as an attribute that nothing reads.
            _log.warning("%s: %sImageProcessor has no setting %r", bundle.path, kind, key)
    if stated.get("do_pad") and (kind not in DETECTORS or stated.get("pad_size")):
        raise BundleError(f"{bundle.path}: do_pad in the image processor is not supported")
    if kind == "ConvNext" and "shortest_edge" not in stated_size(config["size"], square=False):
        raise BundleError(
            f"{bundle.path}: size {config['size']!r} of ConvNextImageProcessor is not supported",
            fix="it has a shortest_edge",
        )
    if kind in DETECTORS:
        config["do_center_crop"] = False  # these classes have no such step, whatever is stated
    if kind == "MobileViT":
        config["do_normalize"] = False
    return kind, config


def _edges(config: Mapping[str, Any]) -> dict[str, int]:
    square, longest = config["default_to_square"], config.get("max_size")
    return stated_size(config["size"], square=square, longest=longest)


def _on_white(image: Any) -> Any:
    """Return the picture as RGB, what is transparent on white, as transformers has it."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    from PIL import Image

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


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


def _table(kind: str, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return float32 (3, 256): what each 8-bit value becomes in each channel."""
    values = np.arange(256, dtype=np.float64)
    if config["do_rescale"]:
        values = values * config["rescale_factor"]
    channels = np.tile(values.astype(np.float32), (3, 1))
    if config["do_rescale"] and config.get("rescale_offset"):
        channels = channels - np.float32(1)
    mean, std = (np.asarray(config[k], np.float32) for k in ("image_mean", "image_std"))
    mean, std = (np.broadcast_to(x, (3,))[:, None] for x in (mean, std))
    if config["do_normalize"]:
        channels = (channels - mean) / std
    if kind == "EfficientNet" and config["include_top"]:
        channels = channels / std
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
