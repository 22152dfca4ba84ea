"""The prepared data set on disk: written once, opened in constant time, memory-mapped.

In: documents. Out: splits of packed sequences with their statistics. Open `reader.py` first.
"""
