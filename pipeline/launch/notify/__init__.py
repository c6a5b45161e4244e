"""Messages about jobs to the person who submitted them: that person's own settings, and the ways a message can take.

Nothing here knows runs or Slurm; `launch/job/messages.py` decides what is told.
"""
