"""The settings file gives memopt quantize its defaults; a flag wins over it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from memopt.bundle import Bundle, open_bundle


def quantize(
    bundle: Bundle, texts: Path, settings: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Run the command on few inputs with a settings file."""
    command = [sys.executable, "-m", "memopt", "quantize", str(bundle.path), "-c", str(texts)]
    command += ["--method", "dynamic", "--samples", "16", "--validation-samples", "16", *flags]
    environment = os.environ | {"MEMOPT_CONFIG": str(settings)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_gate_and_the_kept_layers_come_from_the_settings(
    minilm_copy: Bundle, texts: Path, tmp_path: Path
) -> None:
    """A threshold no int8 variant reaches refuses it; a flag lets it pass."""
    settings = tmp_path / "memopt.yaml"
    settings.write_text(
        "quantization:\n  cosine_threshold: 0.999\n  mixed_precision_layers: ['*intermediate*']\n"
    )
    refused = quantize(minilm_copy, texts, settings)
    assert refused.returncode == 1, refused.stdout
    assert "0.999" in refused.stderr
    assert quantize(minilm_copy, texts, settings, "--min-cosine", "0.5").returncode == 0
    recipe = open_bundle(minilm_copy.path).variant("onnx-int8-dynamic").recipe
    assert recipe is not None
    assert list(recipe["keep_float"]) == ["*intermediate*"]


def test_quantization_can_be_switched_off(tiny_copy: Bundle, texts: Path, tmp_path: Path) -> None:
    """enabled: false is an error of configuration that names the key."""
    settings = tmp_path / "memopt.yaml"
    settings.write_text("quantization:\n  enabled: false\n")
    result = quantize(tiny_copy, texts, settings)
    assert result.returncode == 2
    assert "quantization.enabled" in result.stderr
