"""Graphs that train adapters on a device: traced from PyTorch, differentiated there, run by stock onnxruntime."""
