"""What a config needs on many nodes: memory, time per step, time lost to failures. No torch.

Everything here is a model of a run; measuring a real one is `tracking/goodput.py`.
"""
