"""Text to token shards to batches.

Here: what a dataset says about itself, its memory-mapped tokens and the order in which training draws them. Reading
source files is `read/`, tokenizers are `tokenize/`, building a dataset is `build/`.
"""
