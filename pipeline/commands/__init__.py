"""Commands that need several rooms: a whole run on this machine, preparing in a job, new configs, sampling, verifying.

A command that needs one room calls a function of that room; parsing and printing is `cli/`.
"""
