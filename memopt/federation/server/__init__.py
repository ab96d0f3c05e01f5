"""The end that keeps the versions."""
