"""The transformer: pure PyTorch, knowing nothing of engines, files or clusters."""
