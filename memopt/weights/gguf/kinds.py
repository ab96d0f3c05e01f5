"""The number types of GGUF tensors: which are read, and how many bytes a block of each takes.

Source: ggml's ``enum ggml_type`` and block structs (ggml.h, ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass

from memopt.errors import WeightsError


@dataclass(frozen=True, slots=True)
class BlockKind:
    """A number type: ``values`` of it are ``size`` bytes.

    Attributes:
        name: llama.cpp's.
        values: in a block, 1 for plain floats.
        size: bytes of a block.
        group: values under one scale; 0 for plain floats.
        bits: of the integers as memopt stores them.
    """

    name: str
    values: int
    size: int
    group: int = 0
    bits: int = 0

    @property
    def quantized(self) -> bool:
        """Whether it holds integers with scales."""
        return self.group > 0


FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
KINDS = {
    0: BlockKind("F32", 1, 4),
    1: BlockKind("F16", 1, 2),
    30: BlockKind("BF16", 1, 2),
    2: BlockKind("Q4_0", 32, 18, 32, 4),
    3: BlockKind("Q4_1", 32, 20, 32, 4),
    6: BlockKind("Q5_0", 32, 22, 32, 8),
    7: BlockKind("Q5_1", 32, 24, 32, 8),
    8: BlockKind("Q8_0", 32, 34, 32, 8),
    10: BlockKind("Q2_K", 256, 84, 16, 2),
    11: BlockKind("Q3_K", 256, 110, 16, 4),
    12: BlockKind("Q4_K", 256, 144, 32, 4),
    13: BlockKind("Q5_K", 256, 176, 32, 8),
    14: BlockKind("Q6_K", 256, 210, 16, 8),
}
# What else ggml knows, to be refused by name.
_OTHERS = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


def block_kind(number: int, tensor: str) -> BlockKind:
    """Return the number type that a file gives a tensor.

    Raises:
        WeightsError: one that memopt does not read, by name.

    >>> block_kind(3, "blk.0.attn_q.weight").name
    'Q4_1'
    """
    if number not in KINDS:
        name = _OTHERS.get(number, f"of type {number}, which ggml does not have")
        raise WeightsError(
            f"tensor {tensor!r} is {name}, which memopt does not read",
            fix=f"give a file of {', '.join(kind.name for kind in KINDS.values())}",
        )
    return KINDS[number]
