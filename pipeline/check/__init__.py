"""What `pipeline check` looks at before a job is submitted: the config, this node, a cluster's Slurm.

Each check returns results (`result.py`); nothing here changes a run. `node.py` is a process of its own, because it
needs torch and the rest of this folder does not.
"""
