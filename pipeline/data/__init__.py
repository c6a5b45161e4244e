"""Text to token shards to batches.

Here: the files of a dataset folder, its manifest, its memory-mapped tokens and the order in which training draws them.
Reading source files is `read/`, tokenizers are `tokenize/`, building a dataset is `build/`.
"""
