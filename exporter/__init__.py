"""Checkpoint to artefact: families split a model into components, which become canonical ONNX graphs."""
