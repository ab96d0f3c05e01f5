"""A record says which kernels ran, of which instructions, and where the time went."""

from __future__ import annotations

import pytest

from memopt.benchmark.kernels import BATCH, clock_under, instruction_sets, kernels_of
from memopt.bundle import Bundle
from memopt.runtimes import cpu

TEXTS = [f"sentence number {i} about weather" for i in range(BATCH)]


@pytest.mark.parametrize(
    ("variant", "product", "layers"),
    [("openvino-fp32", "FullyConnected", 36), ("onnx-fp32", "MatMul", 48)],
)
def test_the_products_of_every_layer_are_there(
    minilm: Bundle, variant: str, product: str, layers: int
) -> None:
    """MiniLM has 36 weighted products; ONNX Runtime calls attention's 12 by the same name."""
    told = kernels_of(minilm.path, variant, "auto", TEXTS)
    shares = [row["share"] for row in told["kernels"]]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert shares == sorted(shares, reverse=True)
    named = [row for row in told["kernels"] if product in row["name"]]
    assert sum(row["nodes"] for row in named) == layers
    if variant.startswith("onnx"):
        assert told["instruction_sets"] is None  # it does not tell
    else:
        names = [row["name"] for row in told["kernels"]]
        assert told["instruction_sets"] == instruction_sets(names)


def test_a_clock_nobody_tells_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is made up where /proc and /sys say nothing, and the work is done all the same."""
    monkeypatch.setattr(cpu, "_words", lambda path: [])
    ran: list[int] = []
    assert clock_under(lambda: ran.append(1)) is None
    assert ran == [1]
