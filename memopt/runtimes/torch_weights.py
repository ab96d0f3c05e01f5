"""Put the weights of a file into a torch module: every parameter gets its own, or is refused.

A parameter is never left at a random value, and no weight of the file without a place in the model.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.runtimes.conversions import Converted

# Constants that older releases of transformers saved with the weights; the model computes them.
COMPUTED = re.compile(
    r"(position_ids|token_type_ids|inv_freq|masked_bias|\.attn\.bias|num_batches_tracked)$"
)


def match_names(module: Any, current: dict[str, str]) -> dict[str, str]:
    """Map each parameter to a weight: same name, or the same with one prefix added or removed.

    Raises:
        ExportError: weights below one of the module's own parts that it has no parameter for.
    """
    wanted = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    # Only heads a checkpoint can be wrapped in: all leading parts that weights in the file have.
    prefixes = {""}
    for name in current:
        parts = name.split(".")
        prefixes |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts)))}
    removals = {"", *(name.split(".")[0] + "." for name in wanted)}

    def mapped(name: str, add: str, remove: str) -> str:
        return add + (name.removeprefix(remove) if remove else name)

    ranks = []
    for remove in removals:
        for add in prefixes:
            hits = sum(mapped(name, add, remove) in current for name in wanted)
            ranks.append((-hits, len(add) + len(remove), add, remove))
    _, _, add, remove = min(ranks)
    names = {}
    for name in wanted:
        options = (mapped(name, add, remove), name, add + name)
        hit = next((option for option in options if option in current), None)
        if hit is not None:
            names[name] = current[hit]
    _refuse_unexpected(module, current, names, add, remove)
    return names


def _buffers(module: Any, names: dict[str, str], current: dict[str, str]) -> dict[str, str]:
    """Map each buffer that a checkpoint has (batch norm's statistics) to its weight.

    Its name has the prefix that the parameters beside it have in the file.

    Raises:
        ExportError: the statistics of a layer whose weights are there are missing.
    """
    stored = {weight: name for name, weight in current.items()}
    prefixes: dict[str, str] = {}
    for name, weight in names.items():
        folder = name.rpartition(".")[0]
        prefixes.setdefault(folder, stored.get(weight, weight).rpartition(".")[0])
    found, missing = {}, []
    for name, buffer in module.named_buffers():
        folder, _, last = name.rpartition(".")
        options = (name, f"{prefixes[folder]}.{last}" if folder in prefixes else name)
        hit = next((option for option in options if option in current), None)
        if hit is not None and buffer.is_floating_point():
            found[name] = current[hit]
        elif last in ("running_mean", "running_var"):
            missing.append(name)
    if missing:
        raise ExportError(
            f"the weights do not fit the architecture: missing {_some(missing)}",
            fix="check that config.json and the weights are of the same model",
        )
    return found


def _refuse_unexpected(
    module: Any, current: dict[str, str], names: dict[str, str], add: str, remove: str
) -> None:
    used = set(names.values())
    own = {name for name, _ in module.named_children()}
    known = {name for name, _ in module.named_buffers()}
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = []
    for name, stored in current.items():
        inside = remove + name.removeprefix(add)
        if stored in used or not name.startswith(add) or inside.split(".")[0] not in own:
            continue
        if inside in known or COMPUTED.search(name) or any(re.search(p, name) for p in ignored):
            continue
        left.append(stored)
    if left:
        raise ExportError(
            f"the architecture has no place for the weights {_some(left)}",
            fix="check that config.json (number of layers, say) and the weights are of one model",
        )


def assign(
    module: Any, names: dict[str, str], stored: Converted, optional: tuple[str, ...]
) -> None:
    """Give every parameter and buffer its weight; parts named in ``optional`` may lack theirs.

    Raises:
        ExportError: another one lacks its weight, or has one of another shape.
    """
    import torch

    parameters = dict(module.named_parameters(remove_duplicate=False))
    shared: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        shared.setdefault(id(parameter), []).append(name)
    tied = set(getattr(module, "all_tied_weights_keys", None) or ())
    missing, wrong = [], []
    computed: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name not in names:
            owner = module.get_submodule(name.rpartition(".")[0])
            if hasattr(owner, "create_weight"):
                # Sines of positions, which many checkpoints (Marian's) leave out.
                computed[name] = owner.create_weight().to("cpu", torch.float32)
                continue
            twins = [twin for twin in shared[id(parameter)] if twin in names]
            if not twins and name not in tied and not any(part in name for part in optional):
                missing.append(name)
            continue
        shape = stored.shape(names[name])
        if shape != tuple(parameter.shape):
            wrong.append(f"{names[name]} is {shape}, not {tuple(parameter.shape)}")
    if missing or wrong:
        problems = [*(f"missing {name}" for name in missing), *wrong]
        raise ExportError(
            f"the weights do not fit the architecture: {_some(problems)}",
            fix="check that config.json and the weights are of the same model",
        )
    buffers = _buffers(module, names, stored.names)
    made: dict[str, Any] = {}
    for name, weight in names.items():
        if weight not in made:
            values = np.asarray(stored.load(weight)).astype(np.float32)
            made[weight] = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
        _set(module, name, made[weight])
    for name, values in computed.items():
        _set(module, name, torch.nn.Parameter(values, requires_grad=False))
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            # An unused part: zeros keep the module whole, and the exporter drops what is not used.
            zeros = torch.zeros(parameter.shape, dtype=torch.float32)
            _set(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    for name, weight in buffers.items():
        values = torch.from_numpy(np.asarray(stored.load(weight)).astype(np.float32))
        module.get_buffer(name).copy_(values)


def _set(module: Any, name: str, parameter: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    module._parameters[last] = parameter


def _some(items: list[str]) -> str:
    """Return the first five, and how many there are besides."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{', '.join(items[:5])}{more}"
