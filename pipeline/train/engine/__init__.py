"""DeepSpeed behind a few verbs: the only code that imports it.

`partitions.py` knows where each ZeRO stage keeps what a checkpoint holds. The loop and its decisions live one floor up.
"""
