"""The ways to quantize: one file a method, with its own settings."""
