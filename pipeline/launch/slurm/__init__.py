"""Asking Slurm, and what the launcher remembers of its jobs. No decision is made here."""
