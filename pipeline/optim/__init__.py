"""AdamW, the learning-rate schedule and gradient clipping in pure PyTorch.

It does not know the model. The engine that calls it, and the collectives around it, are `train/engine/`.
"""
