"""The command `pipeline`: one file per group of commands; each command parses, calls one function and prints.

No work is done here. Imports of other rooms stand inside the commands, so that `pipeline --help` answers at once.
"""
