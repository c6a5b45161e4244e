"""From a config and a site to Slurm jobs in a container: everything a login node does, without torch."""
