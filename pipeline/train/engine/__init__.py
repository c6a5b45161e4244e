"""DeepSpeed behind a few verbs. The only code that imports it."""
