"""The joint layer to a graph: the functions of :mod:`memopt.exporters.interface`, for three inputs.

The reference is torch with the absent slots at zero, the graph gets them full of garbage: a graph
in which an absent modality leaks into the answer fails the check like any other wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.bundle import Bundle, Manifest
from memopt.errors import ExportError
from memopt.exporters.encoder import compare, finish, portable
from memopt.exporters.examples import Shape
from memopt.exporters.fuse import FusionReport
from memopt.exporters.interface import Signature
from memopt.joint.model import (
    JOINT_INPUTS,
    JOINT_MODALITIES,
    JOINT_MODEL_TYPE,
    JOINT_OUTPUT,
    JointConfig,
    network,
    read_config,
)
from memopt.runtimes.torch_model import LoadedModel
from memopt.weights.reader import WeightLoader

__all__ = [
    "check_shapes",
    "compare",
    "example",
    "faster",
    "finish",
    "load_model",
    "portable",
    "reference",
    "signature",
    "trace_shape",
    "wrap",
]
# What an absent slot holds while the graph is checked.
_GARBAGE = 1e3
_MASKS = 2 ** len(JOINT_MODALITIES)  # a Shape's length is a mask in binary; 0: another per row


@dataclass(frozen=True, slots=True)
class _Config:
    joint: JointConfig
    model_type: str = JOINT_MODEL_TYPE

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type, "joint": self.joint.to_dict()}


def load_model(bundle: Bundle, task: str) -> LoadedModel:
    """Return the joint layer of a bundle with its own weights, in eval mode.

    Raises:
        ExportError: the weights do not fit the dimensions in config.json.
        BundleError: config.json holds no joint layer.
    """
    import torch

    config, _ = read_config(bundle)
    module = network(config).eval()
    with WeightLoader(bundle.weights) as loader:
        found = {name: torch.from_numpy(np.array(loader.load(name), np.float32)) for name in loader}
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    wrong = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise ExportError(
            f"the weights do not fit the joint layer: {name} is {given.get(name)}, "
            f"not {wanted.get(name)}, and {len(wrong) - 1} more",
            fix="check that config.json and weights.parquet are of one training",
        )
    module.load_state_dict(found)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return LoadedModel(module, _Config(config), {name: name for name in wanted})


def signature(loaded: LoadedModel, manifest: Manifest, task: str) -> Signature:
    """Return inputs vision, audio, text, present and output joint_embedding; the batch is free."""
    return Signature(JOINT_INPUTS, (JOINT_OUTPUT,), {name: {0: "batch"} for name in JOINT_INPUTS})


def wrap(loaded: LoadedModel, manifest: Manifest, task: str) -> Any:
    """Return the module under the attribute ``model``, where the exporter looks for names."""
    import torch

    class Joint(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        # *values: what the exporter is given is one tuple of dynamic shapes.
        def forward(self, *values: Any) -> Any:
            return (self.model(*values),)

    return Joint(loaded.module).eval()


def example(loaded: LoadedModel, names: tuple[str, ...], shape: Shape, seed: int) -> dict[str, Any]:
    """Return seeded vectors; absent slots hold garbage."""
    generator = np.random.default_rng(seed)
    rows = np.arange(shape.batch)
    codes = np.full(shape.batch, shape.length) if shape.length else rows % (_MASKS - 1) + 1
    present = np.stack([(codes >> bit) & 1 for bit in range(len(JOINT_MODALITIES))], axis=1)
    feeds = {}
    for column, (name, width) in enumerate(loaded.config.joint.dims.items()):
        values = generator.normal(0, 1, (shape.batch, width))
        values[present[:, column] == 0] *= _GARBAGE
        feeds[name] = values.astype(np.float32)
    feeds["present"] = present.astype(np.float32)
    return {name: feeds[name] for name in names}


def reference(loaded: LoadedModel, manifest: Manifest, task: str, feeds: dict[str, Any]) -> Any:
    """Return torch's answer, row by row, with zeros where a modality is absent."""
    import torch

    given = {
        name: np.where(feeds["present"][:, column, None] > 0, feeds[name], 0).astype(np.float32)
        for column, name in enumerate(JOINT_MODALITIES)
    }
    tensors = [torch.from_numpy(given[name]) for name in JOINT_MODALITIES]
    tensors.append(torch.from_numpy(feeds["present"].copy()))
    with torch.no_grad():
        rows = [
            loaded.module(*(tensor[row : row + 1] for tensor in tensors))
            for row in range(len(feeds["present"]))
        ]
    return {JOINT_OUTPUT: torch.cat(rows).numpy()}


def faster(graph: Any, config: Any) -> tuple[Any, FusionReport]:
    """Return the graph as it is: none of its operators has a fused one."""
    return graph, FusionReport()


def check_shapes(loaded: LoadedModel, task: str, max_length: int | None) -> tuple[Shape, ...]:
    """Return every mask on its own, at growing batch sizes, then all of them in one batch."""
    alone = tuple(Shape(1 + mask % 4, mask) for mask in range(1, _MASKS))
    return (*alone, Shape(_MASKS - 1, 0), Shape(33, 0))


def trace_shape(task: str) -> Shape:
    """Return the shape to trace with: a batch that is neither 0 nor 1."""
    return Shape(_MASKS - 1, 0)
