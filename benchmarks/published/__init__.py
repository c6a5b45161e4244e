"""Step times that others published, beside those of `pipeline plan`."""
