"""Real LoRA training over the sync: the tour, and what the codecs do to a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from memopt.federation.delta.arrays import fp32_bytes
from memopt.federation.delta.settings import DeltaSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples and benchmarks as modules."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_the_tour_ends_with_the_same_bits_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes that train, one that only pulls, mutual TLS: bytes per round, one set of bits."""
    from federation_tour import tour

    assert tour(tmp_path, rounds=2, steps=2, base_steps=5)
    shown = capsys.readouterr().out
    assert "bit-identical everywhere" in shown
    assert "(delta)" in shown


def test_training_over_the_sync(tmp_path: Path) -> None:
    """Lossless training is the uncompressed one to the last bit; int8 that skips saves 85 % and
    more, and the loss stays within 1 %."""
    import lora_text
    from sync import SKIPPING, plain_training, training_rounds

    model = lora_text.with_adapter(lora_text.base_model(5))
    start = lora_text.adapter(model)
    plain = plain_training(model, start, 3, 3)
    exact = training_rounds("lossless", DeltaSettings(codec="lossless"), model, start, 3, 3)
    assert exact.losses == plain
    for name, settings in SKIPPING.items():
        line = training_rounds(name, settings, model, start, 3, 3)
        assert line.skipped > 0
        assert 1 - line.sent / (3 * fp32_bytes(start)) >= 0.85
        assert line.losses[-1] == pytest.approx(plain[-1], rel=0.01)
