"""Adopting token files that others made: they stay where they are, are checked and hashed, and get a manifest.

One file per format says where tokens and documents are; `scan.py` reads every token. Nothing here reads text.
"""
