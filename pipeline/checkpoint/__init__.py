"""The project's own checkpoint format: layout, writing, reading at any world size, and retention.

It knows parameters by name and fragments of them; it knows neither DeepSpeed nor the training loop.
"""
