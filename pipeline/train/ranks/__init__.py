"""Processes that train together: their group, noticing a dead one, preflight, stopping, their device."""
