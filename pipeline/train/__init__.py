"""The training loop and what it drives: the engine, the ranks, evaluation, stopping."""
