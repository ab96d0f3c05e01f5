"""optimize on a language model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from memopt import Generator
from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError
from memopt.optimize.plan import Plan
from memopt.optimize.run import optimize
from memopt.runtimes.cpu import machine_key, usable_cpus
from tests.quantization.conftest import sentences


def test_the_fastest_that_passes_is_what_the_generator_takes(
    talker: tuple[Bundle, Any], tmp_path: Path
) -> None:
    """Graphs past the gate are timed by threads; variant and threads are in the manifest."""
    shutil.copytree(talker[0].path, tmp_path / "bundle")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(sentences(30)) + "\n")
    options: dict[str, Any] = {"samples": 8, "rounds": 1, "targets": ["cpu"]}
    result = optimize(tmp_path / "bundle", texts, **options, bounds={"kl_mean": 0.02})
    by_name = {o.candidate.name: o for o in result.outcomes}
    assert by_name["onnx-fp32-fused"].measures["kl_mean"] == 0
    rounded = by_name["onnx-int4-weight-only-k-quant"]
    assert rounded.status == "dropped"
    assert "KL to the float model" in rounded.reason
    assert rounded.items_per_second is None
    best = next(o for o in result.outcomes if o.status == "chosen")
    assert best.items_per_second
    assert 1 <= (best.threads or 0) <= usable_cpus()
    record = open_bundle(tmp_path / "bundle").manifest.chosen[machine_key()]
    assert record["variant"] == result.plan.chosen == best.candidate.name
    assert record["threads"] == {f"cpu:{best.candidate.name}": best.threads}
    with Generator(tmp_path / "bundle") as engine:
        assert engine.device_info()["variant"] == best.candidate.name
        assert engine.device_info()["threads"] == best.threads
        assert engine.generate("A man", max_new_tokens=4)[0].prompt_tokens
    plan = Plan.load(tmp_path / "bundle" / "plan.json")
    assert plan.prefer == "decode"
    again = optimize(tmp_path / "bundle", texts, plan=plan, prefer="prefill", **options)
    assert all(o.reused for o in again.outcomes)
    assert again.plan.prefer == "prefill"
    assert "prefill tok/s" in (tmp_path / "bundle" / "optimize.html").read_text()


def test_a_speed_that_is_none(talker: tuple[Bundle, Any], tmp_path: Path) -> None:
    """What is preferred is decode or prefill, said before anything is built."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(sentences(30)) + "\n")
    with pytest.raises(ConfigurationError, match="did you mean 'decode'"):
        optimize(talker[0].path, texts, prefer="decoding")
