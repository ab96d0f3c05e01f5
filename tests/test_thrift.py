"""The compact protocol of Parquet's headers, read from damaged bytes."""

from __future__ import annotations

import pytest

from memopt.thrift import read_struct

LIST_FIELD, LIST_OF_ONE_LIST = b"\x19", b"\x19"
STRUCT_FIELD = b"\x1c"


@pytest.mark.parametrize(
    "data",
    [LIST_FIELD + LIST_OF_ONE_LIST * 5000 + b"\x05", STRUCT_FIELD * 5000],
    ids=["list", "struct"],
)
def test_what_is_nested_too_deep_is_refused(data: bytes) -> None:
    """Lists within lists as well as structs: before Python's own depth is used up."""
    with pytest.raises(ValueError, match="nested too deep"):
        read_struct(memoryview(data), 0)
