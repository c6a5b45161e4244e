"""A real multi-node Slurm on one Debian machine: every host in namespaces of its own. Needs root."""
