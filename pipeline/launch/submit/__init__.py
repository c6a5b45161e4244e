"""From a config and a site to queued jobs: the chain of stages, sweeps, admission, and undoing a failed submission."""
