"""One script a claim; results, with date, commit and machine, stand in `results/`."""
