"""The self-contained report page of a run and its charts, from the run folder alone."""
