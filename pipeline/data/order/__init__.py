"""Prepared data set -> this rank's batches of every step, as a pure function of (seed, epoch).

In: a split's sequences, the layout, the rank. Out: tensors of each micro-batch. Open `order.py`
first.
"""
