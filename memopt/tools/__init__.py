"""Commands under the founding design's names: ``python -m memopt.tools.quantize``."""
