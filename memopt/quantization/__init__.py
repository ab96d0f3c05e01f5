"""Recipes, calibration, quantizers, and the validation that proves a variant is still right."""
