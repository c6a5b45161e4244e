"""What is wrong with a file, in words that say what to write instead: values, YAML, keys of other programs.

The words of pydantic and PyYAML are about their own types; no user sees them.
"""
