"""A trained joint layer as a bundle: ``config.json``, ``weights.parquet`` (V1), ``memopt.json``.

The graph is added by memopt's own exporter, as for any other bundle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memopt.bundle import MANIFEST, Bundle, Manifest, create_bundle, open_bundle, stamp
from memopt.errors import BundleError, MemoptError
from memopt.exporters.base import export
from memopt.files import atomic_path, sha256_file, staged_directory
from memopt.joint.model import JOINT_MODEL_TYPE, JOINT_TASK, JointConfig
from memopt.joint.pairs import Pairs
from memopt.joint.train import JointRecipe, Progress, TrainedJoint, train_joint
from memopt.weights.writer import write_weights


def make_joint_bundle(
    pairs: Pairs,
    folder: str | Path,
    *,
    config: JointConfig | None = None,
    recipe: JointRecipe | None = None,
    encoders: Mapping[str, str] | None = None,
    source: str | Path | None = None,
    on_epoch: Progress | None = None,
) -> Bundle:
    """Train a joint layer, write it and export it; the folder appears when all of it is right.

    Args:
        pairs, config, recipe, on_epoch: see :func:`memopt.joint.train.train_joint`.
        folder, encoders, source: see :func:`write_joint_bundle`.

    Raises:
        InputError: what :func:`memopt.joint.train.train_joint` refuses.
        BundleError: the folder holds something already.
        ExportError: the graph does not give torch's answers; the folder then has no bundle.
    """
    folder = Path(folder)
    check_free(folder)
    trained = train_joint(pairs, config, recipe, on_epoch)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged_directory(folder.parent) as stage:
        made = stage / "bundle"
        name = folder.resolve().name
        export(write_joint_bundle(trained, made, name=name, encoders=encoders, source=source))
        if folder.exists():
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError as error:
            raise MemoptError(f"cannot write {folder}: {error}") from error
    return open_bundle(folder)


def write_joint_bundle(
    trained: TrainedJoint,
    folder: str | Path,
    *,
    name: str | None = None,
    encoders: Mapping[str, str] | None = None,
    source: str | Path | None = None,
) -> Bundle:
    """Write a trained layer into a new folder.

    Args:
        trained: what :func:`memopt.joint.train.train_joint` returned.
        folder: a new or empty folder.
        name: the bundle's name; by default the folder's.
        encoders: modality -> model id of the encoder whose vectors were trained on; embedding
            with another encoder is refused later.
        source: the file of pairs, whose name and SHA-256 go into the history.

    Returns:
        The bundle, without a graph yet.

    Raises:
        BundleError: the folder holds something already.

    >>> import tempfile
    >>> import numpy as np
    >>> from memopt.joint.pairs import make_pairs
    >>> from memopt.joint.train import JointConfig, JointRecipe, train_joint
    >>> rng = np.random.default_rng(0)
    >>> pairs = make_pairs({"text": rng.normal(size=(32, 4)), "audio": rng.normal(size=(32, 3))})
    >>> config = JointConfig(vision=2, audio=3, text=4, joint=8, hidden=8, heads=2)
    >>> trained = train_joint(pairs, config, JointRecipe(epochs=1))
    >>> write_joint_bundle(trained, tempfile.mkdtemp(), name="tiny").manifest.dimension
    8
    """
    folder = Path(folder)
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": JOINT_MODEL_TYPE,
        "architectures": ["JointEmbeddingLayer"],
        "joint": trained.config.to_dict(),
        "encoders": dict(sorted((encoders or {}).items())),
    }
    event: dict[str, Any] = {"event": "train-joint", **trained.report}
    if source is not None:
        event["pairs"] = {"file": Path(source).name, "sha256": sha256_file(Path(source))}
    manifest = Manifest(
        name=name or folder.resolve().name,
        task=JOINT_TASK,
        modality="joint",
        architecture="JointEmbeddingLayer",
        model_type=JOINT_MODEL_TYPE,
        normalize=True,
        dimension=trained.config.joint,
        source=Path(source).name if source is not None else "",
        history=(stamp(event),),
    )
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_weights(folder / "weights.parquet", dict(sorted(trained.weights.items())))
    # Last: a folder without a manifest is no bundle, so an interruption leaves none.
    return create_bundle(folder, manifest)


def check_free(folder: Path) -> None:
    """Refuse a target that holds something, before hours of training and not after.

    Files of a training that was cut short (no manifest) are overwritten.

    Raises:
        BundleError: the path is a file, a bundle, or a folder with something else in it.
    """
    if folder.is_file():
        raise BundleError(f"{folder} is a file", fix="give a new folder")
    if (folder / MANIFEST).exists():
        raise BundleError(f"{folder} holds a bundle already", fix="give a new folder")
    ours = {"config.json", "weights.parquet"}
    others = sorted(set(os.listdir(folder)) - ours) if folder.is_dir() else []
    if others:
        raise BundleError(
            f"{folder} is not empty (it holds {others[0]!r})", fix="give a new folder"
        )
