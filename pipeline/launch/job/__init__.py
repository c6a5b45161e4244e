"""What runs inside a job: the batch script, the host's side of each rank, and what follows when an attempt ends."""
