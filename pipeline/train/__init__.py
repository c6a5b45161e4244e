"""The training loop and what it holds: session, start-up, evaluation, guards, clock.

`engine/` is the only code that imports deepspeed; `ranks/` is how processes find, watch and stop each other.
"""
