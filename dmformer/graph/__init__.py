"""The network as an ONNX file: traced, simplified, read, written and cut."""
