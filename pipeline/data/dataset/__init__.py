"""The prepared data set on disk: written once, opened in constant time, memory-mapped.

In: documents. Out: splits of sequences with their statistics. Open `reader.py` first, which
describes the files. `writer.py` writes them, and `packing.py` assigns documents to packs.
"""
