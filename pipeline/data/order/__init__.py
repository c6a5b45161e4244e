"""Which tokens make up each batch, as pure functions of the seed and the batch's index.

`permutation.py`, `mixture.py` and `best_fit.py` know only numbers; `draws.py` maps the samples of a run to windows;
`packing.py` is the index of packed windows; `batches.py` and `validation.py` read the tokens.
"""
