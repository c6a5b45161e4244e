"""What a new run starts from, other than weights drawn from the seed: a model folder, or another run's checkpoint.

`origin.py` picks one of the two. `parent.py` imports no torch, so that `pipeline check` can ask it.
"""
