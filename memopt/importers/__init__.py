"""Graphs that somebody else made, ONNX or OpenVINO: a bundle around each, the graph its source."""
