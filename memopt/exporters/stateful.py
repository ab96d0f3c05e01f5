"""OpenVINO keeps keys and values inside the model: past inputs and present outputs to states."""

from __future__ import annotations

from typing import Any

import numpy as np

from memopt.extras import require
from memopt.runtimes.keys_values import BEAM, PAST, PRESENT


def make_stateful(model: Any) -> bool:
    """Turn each past input and its present output into a state, in place; False without any.

    ``beam_idx`` (batch) says which row of the state each row goes on from, as ``openvino-genai``
    gives it. A state begins empty, with as many rows as ``input_ids`` has. The form is the one that
    the CPU plugin fuses into its attention with a cache.
    """
    ov = require("openvino", extra="openvino", why="write OpenVINO files")
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    kept = {name for port in model.outputs for name in port.get_names()}
    # What an encoder gave stays an input: nothing comes out for the next step.
    names = [
        name
        for port in model.inputs
        for name in port.get_names()
        if name.startswith(PAST) and name.replace(PAST, PRESENT) in kept
    ]
    if not names:
        return False
    pairs = {name: name.replace(PAST, PRESENT) for name in names}
    shapes = {name: model.input(name).get_partial_shape() for name in names}
    batch = model.input("input_ids").get_partial_shape()[0]
    beam = ops.parameter(ov.PartialShape([batch]), np.int32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    model.add_parameters([beam])
    for name in names:
        port = model.input(name)
        readers = port.get_target_inputs()
        chosen = ops.gather(port, beam, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    _begin_empty(model, ops, {f"{past}{present}": shapes[past] for past, present in pairs.items()})
    return True


def _begin_empty(model: Any, ops: Any, shapes: dict[str, Any]) -> None:
    rows = ops.gather(
        ops.shape_of(model.input("input_ids"), "i64"),
        ops.constant(np.array([0], np.int64)),
        ops.constant(np.int64(0)),
    )
    # Not a literal 0: the plugin would take the length of the state as fixed.
    none = ops.subtract(rows, rows)
    for node in model.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        shape = shapes[node.get_variable_id()]
        heads, size = (np.array([shape[axis].get_length()], np.int64) for axis in (1, 3))
        whole = ops.concat([rows, ops.constant(heads), none, ops.constant(size)], axis=0)
        zero = ops.constant(np.float32(0))
        node.set_arguments([ops.broadcast(zero, whole)])
    model.validate_nodes_and_infer_types()
