"""Tokenisation of examples: token ids and the loss mask, with the model's own chat template.

Input: an Example and a tokenizer. Output: a document (ids, mask), or the reason for its rejection.
Open `encoder.py` first.
"""
