"""What a config needs on many nodes: memory, time per step, time lost to failures. No torch.

Everything here is a model of a run. `tracking/goodput.py` measures a real one; `check/` decides whether a config fits.
"""
