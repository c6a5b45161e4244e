"""Reading source files: one reader per format, decompression, and what is done about bad records.

Readers yield documents as text; they know nothing of tokens or slices.
"""
