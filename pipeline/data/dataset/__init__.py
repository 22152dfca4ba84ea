"""The prepared data set on disk: written once, opened in constant time, memory-mapped.

In: documents. Out: splits of sequences with their statistics. Open `reader.py` first; `writer.py`
writes what it reads, `packing.py` puts documents into packs.
"""
