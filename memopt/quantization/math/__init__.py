"""Rounding, GPTQ, smoothing and the statistics they need: arrays in, arrays out."""
