"""Reading source files: finding them, decompressing, reading documents, and the policy for bad records.

One class per input format is in `formats/`. Nothing here knows of tokens, slices or the dataset folder.
"""
