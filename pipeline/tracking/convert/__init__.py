"""A run's metrics in the files of other trackers, made again from metrics.jsonl; nothing here needs a network."""
