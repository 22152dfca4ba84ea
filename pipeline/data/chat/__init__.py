"""Example -> token ids and the loss mask, through the model's own chat template.

In: an Example and a tokenizer. Out: a document (ids, mask), or the reason it is refused.
Open `encoder.py` first.
"""
