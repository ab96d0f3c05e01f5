"""The second tower of a bundle: CLIP's text side beside its pictures."""

from __future__ import annotations

from dataclasses import replace

from memopt.bundle import Bundle
from memopt.errors import BundleError
from memopt.positions import position_limit
from memopt.tasks.table import task_of
from memopt.weights.kinds import DUAL


def other_task(bundle: Bundle) -> str | None:
    """Return the task of a bundle's second tower, None where there is none or it has no tokenizer.

    >>> from pathlib import Path
    >>> from memopt.bundle import Manifest
    >>> bert = Manifest(
    ...     name="m", task="embedding", modality="text", architecture="BertModel", model_type="bert"
    ... )
    >>> other_task(Bundle(Path("m"), bert)) is None
    True
    """
    manifest = bundle.manifest
    if manifest.model_type not in DUAL or manifest.task != "image-embedding":
        return None
    if "Vision" in manifest.architecture or not (bundle.path / "tokenizer.json").is_file():
        return None
    return "embedding"


def tower(bundle: Bundle, task: str) -> Bundle:
    """Return the bundle as one of its towers: with that one's task, modality and variants.

    Args:
        bundle: of a model of two towers, such as CLIP.
        task: ``auto`` or the bundle's own is the bundle itself.

    Raises:
        BundleError: it has no such tower.
    """
    if task in ("auto", bundle.manifest.task):
        return bundle
    if task != other_task(bundle):
        raise BundleError(
            f"{bundle.path} has task {bundle.manifest.task} and no tower for {task}",
            fix="leave the task out",
        )
    manifest = replace(
        bundle.manifest,
        task=task,
        modality=task_of(task).modality,
        pooling="model",
        dimension=None,
        max_length=position_limit(bundle.config()),
        variants={n: v for n, v in bundle.manifest.variants.items() if v.task == task},
        chosen={},
    )
    return Bundle(bundle.path, manifest)
