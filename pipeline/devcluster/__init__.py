"""A real multi-node Slurm on one Debian machine, each host in its own namespaces. Needs root.

For trying out jobs and for the cluster tests. Nothing else in the package depends on it; what jobs need of a real
cluster is `launch/`.
"""
