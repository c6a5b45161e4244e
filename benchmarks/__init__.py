"""One script per claim; `results/` holds what each measured, with date, commit and machine."""
