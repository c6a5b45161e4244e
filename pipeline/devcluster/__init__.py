"""A real multi-node Slurm on one Debian machine, each host in its own namespaces. Needs root.

For trying out jobs and for the cluster tests; nothing else in the project depends on it.
"""
