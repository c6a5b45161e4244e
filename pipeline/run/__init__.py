"""The run folder: its file names, its append-only journals, the world of processes and the provenance of a start.

Training, launching and tracking meet here and nowhere else. No torch.
"""
