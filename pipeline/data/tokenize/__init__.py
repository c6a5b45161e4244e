"""The tokenizer: training, loading, encoding, and the cross-check of the two encoders.

The only code that imports `gigatoken` and `tokenizers`.
"""
