"""Measure variants side by side and show the result."""
