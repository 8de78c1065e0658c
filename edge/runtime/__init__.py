"""Device side: opens a signed bundle and runs it with numpy, onnxruntime and tokenizers alone."""
