"""ONNX and OpenVINO graphs being read, edited, observed and run, for exporters and quantization."""
