"""What `pipeline check` verifies before a job is submitted: the config, this node, the request to Slurm.

Each check returns results (`result.py`); nothing here changes a run. `node.py` runs as a process of its own, because it
imports torch and the rest of this folder does not.
"""
