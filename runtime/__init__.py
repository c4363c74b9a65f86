"""What runs on the device: preprocessing, prompt, tokenizer, generation, backends. No torch, transformers or onnx."""
