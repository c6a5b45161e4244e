"""Processes that train together: their group, watching each other, preflight, stopping, their device.

What they train is none of their business: no model, no checkpoint, no step lives here.
"""
