"""Building a dataset: plan the tasks, encode them into slices, publish each by one rename, assemble the manifest.

A build resumes from the published slices. Reading source files is `../read`.
"""
