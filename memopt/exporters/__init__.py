"""Weights and config to a checked graph: ONNX and OpenVINO."""
