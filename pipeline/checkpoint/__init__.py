"""Own checkpoint format: fragments of float32 weights and moments, read at any world size and ZeRO stage."""
