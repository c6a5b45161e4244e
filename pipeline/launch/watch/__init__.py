"""Looking at submitted runs: status, logs, cancel. Nothing here changes a job except `cancel`."""
