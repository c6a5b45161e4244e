"""Commands that need several rooms: a whole run on this machine, sampling, verifying.

What belongs to one room lives in that room.
"""
