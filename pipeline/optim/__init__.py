"""AdamW, the learning-rate schedule and gradient clipping: pure PyTorch."""
