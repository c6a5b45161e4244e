"""Models in Hugging Face's format: one table of architectures for both directions, and the files of a model folder.

Nothing imports transformers. `commands/export.py` writes a run's checkpoint under these names; `train/startup.py`
starts a run from such a folder.
"""
