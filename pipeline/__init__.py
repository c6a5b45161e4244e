"""Containerized HPC batch pipeline: text to token shards to a trained language model."""

__version__ = "0.1.0"
