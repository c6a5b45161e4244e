"""Running on a cluster: the site file, submitting, the job itself, watching it. No torch.

Training and launching know nothing of each other; they meet in the run folder.
"""
