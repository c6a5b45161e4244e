"""The transformer in pure PyTorch: layers, loss, sampling, FLOP counts.

It knows nothing of engines, files or clusters; the optimizer is `optim/`, other programs' names `huggingface/`.
"""
