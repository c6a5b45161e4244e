"""The acceptance kit for a GPU: `python -m benchmarks.gpu` shows that the engine keeps its promises, and how fast.

It needs the checkout and one GPU, no data and no Slurm. With `--device cpu --tiny` it runs anywhere, in a minute.
"""
