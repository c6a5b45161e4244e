"""The project's own checkpoint format: layout, writing, reading at any world size, retention, and whole weights.

It knows parameters by name and fragments of them. It knows neither DeepSpeed nor the training loop, nor the files of a
run outside `checkpoints/`; `commands/export.py` writes weights for other programs.
"""
