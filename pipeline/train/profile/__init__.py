"""Profiles of a running training, on request: who asks, on which steps the ranks agree, what each rank records.

No request changes a number of the training or ends it. What the phases are called is in `ranks/activity.py`.
"""
