"""Tokenisation of examples: token ids and the loss mask, with the model's own chat template.

In: an Example and a tokenizer. Out: its documents (ids, mask), or the reason for its rejection.
Open `encoder.py` first.
"""
