"""Hugging Face's names for this model: one table per supported architecture, and the JSON files of a model folder.

Nothing here reads or writes files, and nothing imports transformers. `commands/export.py` brings a run, its checkpoint
and these names together.
"""
