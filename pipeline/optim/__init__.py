"""AdamW, the learning-rate schedule and gradient clipping in pure PyTorch.

It does not know the model.
"""
