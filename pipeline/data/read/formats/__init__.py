"""One class per input format, each in its own file, and the table that names them.

`split` divides a large file into tasks, `read` yields the documents of a task. A new format is a file here, a line of
the table in `table.py` and a word of `format` in the config; decompression, limits and digests are given.
"""
