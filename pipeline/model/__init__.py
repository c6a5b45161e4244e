"""The transformer in pure PyTorch: layers, loss, sampling, FLOP counts.

It knows nothing of engines, files or clusters.
"""
