"""``python -m memopt.tools.quantize --input A.parquet --output B.parquet``: V1 weights into V2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memopt.compat.weights import ArrowQuantizer, QuantizationConfig
from memopt.errors import MemoptError
from memopt.visible import visible


def main(arguments: list[str] | None = None) -> int:
    """Quantize one weight file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m memopt.tools.quantize", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="float weights (V1)")
    parser.add_argument("--output", type=Path, required=True, help="file to write (V2)")
    parser.add_argument("--quant-type", choices=("int8", "int2", "fp16"), default="int8")
    parser.add_argument("--calibration", choices=("ptq", "gptq"), default="ptq")
    parser.add_argument("--texts", type=Path, help="one text a line, for gptq")
    given = parser.parse_args(arguments)
    try:
        texts = given.texts.read_text(encoding="utf-8").splitlines() if given.texts else None
        config = QuantizationConfig(given.quant_type, given.calibration)
        report = ArrowQuantizer(config).quantize_model(given.input, given.output, texts)
    except (MemoptError, OSError, UnicodeDecodeError) as error:
        sys.stderr.write(visible(f"error: {error}\n"))
        return getattr(error, "exit_code", 1)
    size = given.output.stat().st_size
    sys.stdout.write(f"{given.output}: {len(report.quantized)} weights, {size / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
