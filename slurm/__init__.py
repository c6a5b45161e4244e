"""What a cluster's user edits (sites/) and the project's own Slurm on one machine (devcluster/)."""
