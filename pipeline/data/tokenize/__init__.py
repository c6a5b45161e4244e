"""The tokenizer: training, loading, encoding, and the check of the fast encoder against Hugging Face's.

The only code that imports `gigatoken` and `tokenizers`. Which tokenizer a dataset gets is decided in `build/`.
"""
