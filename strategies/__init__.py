"""Fine-tuning on one machine; knows nothing of networks."""
