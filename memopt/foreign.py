"""Model files of other tools: who takes them, for whoever gives one to memopt."""

from __future__ import annotations

from pathlib import Path

_PICKLED = "a pickled checkpoint can run any code: save it as safetensors where you trust it"
_TAKERS = {
    ".gguf": "memopt convert takes it: a file says all of a model",
    ".onnx": "memopt import makes a bundle around a finished ONNX graph",
    ".xml": "memopt import makes a bundle around a finished OpenVINO graph",
    ".safetensors": "give the folder that holds it and config.json",
    ".parquet": "memopt convert takes it, with --config DIR where no config.json lies beside it",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), _PICKLED),
}


def taken_by(
    file: Path, otherwise: str = "give the folder that holds config.json and model.safetensors"
) -> str:
    """Return who takes a model file that memopt has no bundle or checkpoint in.

    ``otherwise`` is what to do with a file that is no model's.

    >>> taken_by(Path("model.gguf"))
    'memopt convert takes it: a file says all of a model'
    """
    return _TAKERS.get(file.suffix.lower(), otherwise)


def is_model_file(path: Path) -> bool:
    """Say whether a name is that of a model file, of ours or of others.

    >>> is_model_file(Path("a/model.gguf")), is_model_file(Path("a/model"))
    (True, False)
    """
    return path.suffix.lower() in _TAKERS
